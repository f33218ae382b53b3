// The operators tierhints::encode_residuals and decode_residuals: what records lack of the weights
// that they were made from, bit for bit; lib/codecs/residuals.py says how it is laid out.
//
// scale * (2 q - 2^b - 1) / 2 is exact in float32 (8 and 9 significant bits), so an interval is the
// same with and without fused multiply-add: all instructions decode alike.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "record.h"

#define INLINE inline __attribute__((always_inline))

namespace tierhints {
namespace {

constexpr int64_t kChunkBytes = 256 << 10;  // of a payload, that are coded by themselves
constexpr int64_t kEscapeBytes = 6;         // place in the chunk (u32), upper half (u16)
constexpr uint32_t kAsItIs = 0xffffffff;    // in the place of the number of escapes
constexpr int64_t kFields = 8;              // of a part in the list of them

// Rows of a matrix in a payload, from `first_row` on, and the record of all of it.
struct Part {
  Record record;
  int64_t offset, num_bytes, item_bytes, first_row;
};

// Weights of one row.
struct Span {
  int64_t row, first, end;
};

// Numbers of float32 in their order.
inline uint32_t in_order(uint32_t bits) {
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
inline uint32_t in_order(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return in_order(bits);
}
inline uint16_t upper_half(uint32_t index) {
  return static_cast<uint16_t>(index ^ (index & 0x8000u ? 0x8000u : 0xffffu));
}

struct Group {
  float half, zero;
};

inline Group group_of(const Record& record, int64_t row, int64_t col) {
  const int64_t group = col / record.layout.group_size;
  return {from_bfloat16(record.scales(row)[group]) * 0.5f,
          from_bfloat16(record.zeros(row)[group])};
}

struct Interval {
  uint32_t first;  // the least bfloat16 in it, in their order
  int width;       // bits of a rank
};

// kWhole: weights are bfloat16; else these are the upper halves of float32, cut off.
template <bool kWhole>
inline Interval interval(Group group, int bits, int code) {
  const float place = static_cast<float>(2 * code - (1 << bits) - 1);
  const uint32_t low = in_order(group.half * place + group.zero);
  const uint32_t high = in_order(group.half * (place + 2) + group.zero);
  uint32_t first = low >> 16, last = high >> 16;
  if (kWhole) {  // without those just outside
    first = (low + (low >> 31 ? 0xffffu : 0)) >> 16;
    last = high >> 31 ? high >> 16 : ((high + 1) >> 16) - 1;
  }
  const uint32_t more = static_cast<int32_t>(last - first) > 0 ? last - first : 0;
  return {first, more ? 32 - __builtin_clz(more) : 0};
}

namespace portable {
#include "portable.inl"

template <int kBits, bool kWhole>
int64_t decode(const Part& part, Span span, const uint8_t* stream, int64_t position,
               const uint8_t* lower, uint8_t* out) {
  const uint8_t* plane[kMaxPlanes];
  for (int64_t col = span.first; col < span.end;) {
    const int64_t block = col / kBlockCodes, end = std::min((block + 1) * kBlockCodes, span.end);
    for (int index = 0; index < part.record.layout.num_planes; ++index) {
      plane[index] = part.record.plane(index, span.row) +
                     block * kBlockCodes * kPlaneBits[kBits][index] / 8;
    }
    const Codes codes = unpack<kBits>(plane);
    for (; col < end; ++col) {
      const Interval of = interval<kWhole>(group_of(part.record, span.row, col), kBits,
                                           codes.bytes[col % kBlockCodes]);
      uint32_t word;
      std::memcpy(&word, stream + position / 8, 4);
      const uint32_t rank = word >> (position & 7) & ((1u << of.width) - 1);
      position += of.width;
      const uint16_t upper = upper_half(of.first + rank);
      const int64_t place = col - span.first;
      if constexpr (!kWhole) std::memcpy(out + 4 * place, lower + 2 * place, 2);
      std::memcpy(kWhole ? out + 2 * place : out + 4 * place + 2, &upper, 2);
    }
  }
  return position;
}

}  // namespace portable

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512cd,avx512vl,avx512vnni,avx512vbmi")
}  // namespace
}  // namespace tierhints
#include <immintrin.h>
namespace tierhints {
namespace {
namespace wide {
#include "avx512.inl"

// Sums of a register's numbers up to each one.
INLINE __m512i sums_up_to(__m512i value) {
  const __m512i none = _mm512_setzero_si512();
  value = _mm512_add_epi32(value, _mm512_alignr_epi32(value, none, 15));
  value = _mm512_add_epi32(value, _mm512_alignr_epi32(value, none, 14));
  value = _mm512_add_epi32(value, _mm512_alignr_epi32(value, none, 12));
  return _mm512_add_epi32(value, _mm512_alignr_epi32(value, none, 8));
}

INLINE __m512i all_words(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }

INLINE __m512i in_order(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  return _mm512_xor_si512(bits,
                          _mm512_or_si512(_mm512_srai_epi32(bits, 31), all_words(1u << 31)));
}

// Sixteen weights: `there` says which; returns where the next ones' ranks begin.
template <int kBits, bool kWhole>
INLINE int64_t decode_few(__m128i codes, Group group, __mmask16 there, const uint8_t* stream,
                          int64_t position, const uint8_t* lower, uint8_t* out) {
  const __m512i ones = all_words(~0u), one = all_words(1);
  const __m512 place = _mm512_cvtepi32_ps(_mm512_sub_epi32(
      _mm512_slli_epi32(_mm512_cvtepu8_epi32(codes), 1), all_words((1 << kBits) + 1)));
  const __m512 half = _mm512_set1_ps(group.half), zero = _mm512_set1_ps(group.zero);
  const __m512i low = in_order(_mm512_fmadd_ps(half, place, zero));
  const __m512i high =
      in_order(_mm512_fmadd_ps(half, _mm512_add_ps(place, _mm512_set1_ps(2)), zero));
  __m512i first = _mm512_srli_epi32(low, 16), last = _mm512_srli_epi32(high, 16);
  if constexpr (kWhole) {
    first = _mm512_srli_epi32(
        _mm512_add_epi32(low, _mm512_srli_epi32(_mm512_srai_epi32(low, 31), 16)), 16);
    const __m512i negative = _mm512_add_epi32(_mm512_srai_epi32(high, 31), one);  // 1 or 0
    last = _mm512_sub_epi32(_mm512_srli_epi32(_mm512_add_epi32(high, negative), 16), negative);
  }
  const __m512i more = _mm512_max_epi32(_mm512_sub_epi32(last, first), _mm512_setzero_si512());
  const __m512i width =
      _mm512_maskz_sub_epi32(there, all_words(32), _mm512_lzcnt_epi32(more));
  const __m512i ends = sums_up_to(width);
  const __m512i places = _mm512_add_epi32(_mm512_sub_epi32(ends, width),
                                          all_words(static_cast<uint32_t>(position & 7)));
  const __m512i bytes = _mm512_add_epi8(
      _mm512_shuffle_epi8(_mm512_srli_epi32(places, 3),
                          _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0)),
      all_words(0x03020100));
  const __m512i words = _mm512_permutexvar_epi8(bytes, _mm512_loadu_si512(stream + position / 8));
  const __m512i rank =
      _mm512_andnot_si512(_mm512_sllv_epi32(ones, width),
                          _mm512_srlv_epi32(words, _mm512_and_si512(places, all_words(7))));
  const __m512i index = _mm512_slli_epi32(_mm512_add_epi32(first, rank), 16);
  const __m512i sign = _mm512_srai_epi32(_mm512_xor_si512(index, ones), 31);
  const __m512i value = _mm512_xor_si512(index, _mm512_or_si512(sign, all_words(1u << 31)));
  if constexpr (kWhole) {
    _mm512_mask_cvtepi32_storeu_epi16(out, there, _mm512_srli_epi32(value, 16));
  } else {
    const __m512i rest = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, lower));
    _mm512_mask_storeu_epi32(
        out, there, _mm512_or_si512(_mm512_and_si512(value, all_words(0xffff0000)), rest));
  }
  return position + _mm_extract_epi32(_mm512_extracti32x4_epi32(ends, 3), 3);
}

template <int kBits, bool kWhole>
int64_t decode(const Part& part, Span span, const uint8_t* stream, int64_t position,
               const uint8_t* lower, uint8_t* out) {
  constexpr int64_t kItem = kWhole ? 2 : 4;
  const uint8_t* plane[kMaxPlanes];
  for (int64_t start = span.first / kBlockCodes * kBlockCodes; start < span.end;
       start += kBlockCodes) {
    for (int index = 0; index < part.record.layout.num_planes; ++index) {
      plane[index] = part.record.plane(index, span.row) + start * kPlaneBits[kBits][index] / 8;
    }
    alignas(64) uint8_t codes[kBlockCodes];
    store_codes(unpack<kBits>(plane), codes);
    for (int64_t col = start; col < std::min(start + kBlockCodes, span.end); col += 16) {
      if (col + 16 <= span.first) continue;
      const int64_t skipped = std::max<int64_t>(span.first - col, 0);
      const int64_t count = std::min<int64_t>(span.end - col, 16);
      const auto there = static_cast<__mmask16>(((1u << count) - 1) & ~((1u << skipped) - 1));
      const __m128i few =
          _mm_load_si128(reinterpret_cast<const __m128i*>(codes + col - start));
      const int64_t place = col - span.first;
      position = decode_few<kBits, kWhole>(few, group_of(part.record, span.row, col), there,
                                           stream, position, kWhole ? lower : lower + 2 * place,
                                           out + kItem * place);
    }
  }
  return position;
}

}  // namespace wide
#pragma GCC pop_options

#endif

// Writes a row's weights; returns where the next ranks begin, in bits.
using Decode = int64_t (*)(const Part&, Span, const uint8_t* stream, int64_t position,
                           const uint8_t* lower, uint8_t* out);

#define CHOOSE(set, bits) (whole ? set::decode<bits, true> : set::decode<bits, false>)
#define OF_BITS(set)                       \
  switch (bits) {                          \
    case 2: return CHOOSE(set, 2);         \
    case 3: return CHOOSE(set, 3);         \
    case 4: return CHOOSE(set, 4);         \
    case 5: return CHOOSE(set, 5);         \
    case 6: return CHOOSE(set, 6);         \
    default: return CHOOSE(set, 8);        \
  }

bool is_wide() {
#if defined(__x86_64__)
  static const Kernels* const kernels = choose_kernels();
  return kernels == &kAvx512 && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

Decode choose_decode(int bits, bool whole) {
#if defined(__x86_64__)
  if (is_wide()) OF_BITS(wide)
#endif
  OF_BITS(portable)
}

// The bytes of a chunk, in order: calls `plain` for those that no record knows of, and `coded` for
// weights. Both are told where in the chunk they begin, and how many bytes they are.
template <typename Plain, typename Coded>
void walk(const std::vector<Part>& parts, int64_t start, int64_t end, Plain plain, Coded coded) {
  int64_t at = start;
  for (const Part& part : parts) {
    const int64_t first = std::max(part.offset, at);
    const int64_t last = std::min(part.offset + part.num_bytes, end);
    if (first >= last) continue;
    if (first > at) plain(at - start, first - at);
    coded(part, (first - part.offset) / part.item_bytes, first - start, last - first);
    at = last;
  }
  if (at < end) plain(at - start, end - at);
}

template <typename Visit>
void each_row(const Part& part, int64_t weight, int64_t count, Visit visit) {
  const int64_t cols = part.record.layout.cols;
  for (int64_t done = 0; done < count;) {
    const int64_t row = (weight + done) / cols, first = (weight + done) % cols;
    const int64_t end = std::min(cols, first + count - done);
    visit(Span{part.first_row + row, first, end}, done);
    done += end - first;
  }
}

// Packs bits one after another.
struct Packer {
  uint8_t* to;
  uint64_t word = 0;
  int filled = 0;

  void put(uint32_t value, int width) {
    word |= static_cast<uint64_t>(value) << filled;
    for (filled += width; filled >= 8; filled -= 8, word >>= 8) *to++ = static_cast<uint8_t>(word);
  }
  void end() {
    if (filled) *to++ = static_cast<uint8_t>(word);
    word = 0, filled = 0;
  }
};

template <bool kWhole>
void encode_row(const Part& part, Span span, const uint8_t* from, int64_t place, Packer* packer,
                std::vector<uint8_t>* escapes) {
  constexpr int64_t kItem = kWhole ? 2 : 4;
  const Layout& layout = part.record.layout;
  for (int64_t col = span.first; col < span.end; ++col) {
    int code = 0;
    for (int index = 0, left = layout.bits; index < layout.num_planes; ++index) {
      const int bits = plane_bits(layout.bits)[index];
      const int64_t piece = kBlockCodes * bits / 8, k = col % kBlockCodes;
      const uint8_t byte =
          part.record.plane(index, span.row)[col / kBlockCodes * piece + k % piece];
      left -= bits;
      code |= (byte >> (8 - bits * (k / piece + 1)) & ((1 << bits) - 1)) << left;
    }
    const Interval of = interval<kWhole>(group_of(part.record, span.row, col), layout.bits, code);
    const int64_t at = (col - span.first) * kItem;
    uint16_t upper;
    std::memcpy(&upper, from + at + kItem - 2, 2);
    const uint32_t own = in_order(static_cast<uint32_t>(upper) << 16) >> 16;
    uint32_t rank = own - of.first;
    if (own < of.first || rank >> of.width) {
      rank = 0;
      const auto where = static_cast<uint32_t>(place + at + kItem - 2);
      const size_t size = escapes->size();
      escapes->resize(size + kEscapeBytes);
      std::memcpy(escapes->data() + size, &where, 4);
      std::memcpy(escapes->data() + size + 4, &upper, 2);
    }
    packer->put(rank, of.width);
  }
}

// Writes a chunk [start, end) of a payload in fewer bytes, at most as many and 4; returns how many.
int64_t encode_chunk(const std::vector<Part>& parts, const uint8_t* from, int64_t start,
                     int64_t end, uint8_t* out) {
  std::vector<uint8_t> escapes, coded(2 * (end - start) + 64);
  Packer packer{coded.data()};
  walk(
      parts, start, end,
      [&](int64_t place, int64_t count) {
        std::memcpy(packer.to, from + place, count);
        packer.to += count;
      },
      [&](const Part& part, int64_t weight, int64_t place, int64_t count) {
        const int64_t item = part.item_bytes;
        for (int64_t at = 0; item == 4 && at < count; at += 4, packer.to += 2) {
          std::memcpy(packer.to, from + place + at, 2);
        }
        each_row(part, weight, count / item, [&](Span span, int64_t done) {
          (item == 2 ? encode_row<true> : encode_row<false>)(
              part, span, from + place + done * item, place + done * item, &packer, &escapes);
        });
        packer.end();
      });
  const int64_t size = packer.to - coded.data();
  uint32_t head = static_cast<uint32_t>(escapes.size() / kEscapeBytes);
  if (static_cast<int64_t>(escapes.size()) + size >= end - start) {
    head = kAsItIs;
    std::memcpy(out, &head, 4);
    std::memcpy(out + 4, from, end - start);
    return 4 + end - start;
  }
  std::memcpy(out, &head, 4);
  std::copy(escapes.begin(), escapes.end(), out + 4);
  std::memcpy(out + 4 + escapes.size(), coded.data(), size);
  return 4 + static_cast<int64_t>(escapes.size()) + size;
}

// Makes a chunk again; returns whether its `size` bytes are of such a chunk. Reads at most 2 bytes
// a weight beyond them, and 64.
bool decode_chunk(const std::vector<Part>& parts, const uint8_t* from, int64_t size, int64_t start,
                  int64_t end, uint8_t* out) {
  uint32_t head;
  if (size < 4) return false;
  std::memcpy(&head, from, 4);
  if (head == kAsItIs) {
    if (size != 4 + end - start) return false;
    std::memcpy(out, from + 4, end - start);
    return true;
  }
  const int64_t escaped = head * kEscapeBytes;
  if (4 + escaped > size) return false;
  const uint8_t *escapes = from + 4, *stream = escapes + escaped, *const last = from + size;
  bool sound = true;
  walk(
      parts, start, end,
      [&](int64_t place, int64_t count) {
        sound = sound && last - stream >= count;
        if (!sound) return;
        std::memcpy(out + place, stream, count);
        stream += count;
      },
      [&](const Part& part, int64_t weight, int64_t place, int64_t count) {
        const int64_t item = part.item_bytes;
        const uint8_t* const lower = stream;
        if (item == 4) stream += count / 2;
        if (!(sound = sound && stream <= last)) return;
        const Decode decode = choose_decode(part.record.layout.bits, item == 2);
        int64_t position = 0;
        each_row(part, weight, count / item, [&](Span span, int64_t done) {
          position = decode(part, span, stream, position, lower + 2 * done,
                            out + place + done * item);
        });
        stream += (position + 7) / 8;
        sound = stream <= last;
      });
  if (!sound || stream != last) return false;
  for (int64_t at = 0; at < escaped; at += kEscapeBytes) {
    uint32_t place;
    std::memcpy(&place, escapes + at, 4);
    if (place > end - start - 2) return false;
    std::memcpy(out + place, escapes + at + 4, 2);
  }
  return true;
}

std::vector<Part> read_parts(at::TensorList records, at::IntArrayRef fields) {
  TORCH_CHECK(fields.size() == records.size() * kFields, "parts of ", kFields,
              " numbers each were expected");
  std::vector<Part> parts;
  for (size_t index = 0; index < records.size(); ++index) {
    const int64_t* of = fields.data() + index * kFields;
    const Layout layout(of[3], of[4], of[5], of[6], of[6]);
    const at::Tensor& record = records[index];
    TORCH_CHECK(record.scalar_type() == at::kByte && record.is_contiguous() &&
                    record.numel() >= layout.num_bytes && layout.num_planes > 0,
                "a record of ", layout.num_bytes, " bytes was expected, in one piece");
    const int64_t row_bytes = of[2] * layout.cols;
    TORCH_CHECK((of[2] == 2 || of[2] == 4) && of[1] % row_bytes == 0 && of[7] >= 0 &&
                    of[7] + of[1] / row_bytes <= layout.rows,
                "weights of ", of[1], " bytes don't fit their record");
    parts.push_back({{layout, record.const_data_ptr<uint8_t>()}, of[0], of[1], of[2], of[7]});
  }
  return parts;
}

void check_bytes(const at::Tensor& bytes, int64_t least, const char* name) {
  TORCH_CHECK(bytes.scalar_type() == at::kByte && bytes.is_contiguous() && bytes.numel() >= least,
              name, " of ", least, " bytes were expected, in one piece");
}

int64_t num_chunks(const at::Tensor& payload) {
  return (payload.numel() + kChunkBytes - 1) / kChunkBytes;
}

at::Tensor encode_residuals(const at::Tensor& payload, int64_t start, at::TensorList records,
                            at::IntArrayRef fields, const at::Tensor& out) {
  const std::vector<Part> parts = read_parts(records, fields);
  const int64_t count = num_chunks(payload), stride = kChunkBytes + 4;
  check_bytes(payload, 0, "weights"), check_bytes(out, count * stride, "room");
  const at::Tensor sizes = at::empty({count}, at::kLong);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunkBytes;
      const int64_t last = std::min<int64_t>(first + kChunkBytes, payload.numel());
      sizes.mutable_data_ptr<int64_t>()[chunk] =
          encode_chunk(parts, payload.const_data_ptr<uint8_t>() + first, start + first,
                       start + last, out.mutable_data_ptr<uint8_t>() + chunk * stride);
    }
  });
  return sizes;
}

// Returns the first chunk that isn't sound, or -1. Runs on the thread that calls.
int64_t decode_residuals(const at::Tensor& stream, at::IntArrayRef ends, int64_t start,
                         at::TensorList records, at::IntArrayRef fields, const at::Tensor& out) {
  const std::vector<Part> parts = read_parts(records, fields);
  const int64_t count = num_chunks(out);
  TORCH_CHECK(static_cast<int64_t>(ends.size()) == count + 1,
              "a chunk's end was expected for each");
  check_bytes(out, 0, "memory"), check_bytes(stream, ends[count] + kChunkBytes + 64, "a stream");
  for (int64_t chunk = 0; chunk < count; ++chunk) {
    const int64_t first = chunk * kChunkBytes;
    const int64_t last = std::min<int64_t>(first + kChunkBytes, out.numel());
    if (ends[chunk] < 0 || ends[chunk] > ends[chunk + 1] ||
        !decode_chunk(parts, stream.const_data_ptr<uint8_t>() + ends[chunk],
                      ends[chunk + 1] - ends[chunk], start + first, start + last,
                      out.mutable_data_ptr<uint8_t>() + first)) {
      return chunk;
    }
  }
  return -1;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tierhints, library) {
  library.def(
      "encode_residuals(Tensor payload, int start, Tensor[] records, int[] parts, Tensor(a!) out) "
      "-> Tensor");
  library.def(
      "decode_residuals(Tensor stream, int[] ends, int start, Tensor[] records, int[] parts, "
      "Tensor(a!) out) -> int");
}

TORCH_LIBRARY_IMPL(tierhints, CPU, library) {
  library.impl("encode_residuals", encode_residuals);
  library.impl("decode_residuals", decode_residuals);
}

}  // namespace tierhints
