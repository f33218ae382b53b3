// Included by kernels_*.cpp, for one set of instructions each, in a namespace and under its target.
// TIERHINTS_AVX2 and TIERHINTS_VNNI say what may be used; without them it is plain C++, which
// compilers vectorize (NEON).

// A vector of bytes that are shifted as 16-bit words (masks drop what crosses a byte's border), or
// one 32-bit word of them: rows of planes are whole words.
typedef uint16_t Half __attribute__((vector_size(32)));
#ifdef TIERHINTS_VNNI
typedef uint16_t Wide __attribute__((vector_size(64)));
#else
typedef Half Wide;
#endif
typedef uint32_t Word;

#define TIERHINTS_INLINE inline __attribute__((always_inline))
#define TIERHINTS_FORCED __attribute__((always_inline))

template <typename V>
TIERHINTS_INLINE V load(const uint8_t* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
TIERHINTS_INLINE void store(uint8_t* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

template <typename V>
TIERHINTS_INLINE V bytes(uint8_t byte) {
  return V{} + static_cast<uint16_t>(byte * 0x0101u);
}
template <>
TIERHINTS_INLINE Word bytes<Word>(uint8_t byte) {
  return byte * 0x01010101u;
}

// Moves bits of each byte by a place (right where it is positive), and masks them.
template <int kRight, uint8_t kMask, typename V>
TIERHINTS_INLINE V take(V value) {
  if constexpr (kRight >= 0) {
    return (value >> kRight) & bytes<V>(kMask);
  } else {
    return (value << -kRight) & bytes<V>(kMask);
  }
}

// Which bytes of a row give which codes: planes.py. Codes come in `8 / its bits` pieces of as many
// as the narrowest plane's row has bytes. From the vectors that `load` returns of a plane, by piece,
// `put` gets a vector of codes of each piece.
template <int kBits>
struct Unpack;

// The pieces in which the codes of a row come.
TIERHINTS_INLINE int64_t pieces(int bits) {
  return bits == 4 ? 2 : bits == 3 || bits == 5 ? 8 : 4;
}

template <int kNumber>
using Index = std::integral_constant<int, kNumber>;

template <>
struct Unpack<2> {
  static constexpr int kPieces = 4;
  template <typename V, typename Load, typename Put>
  static TIERHINTS_INLINE void step(Load load, Put put) {
    const V a = load(0, 0);
    put(Index<0>(), take<6, 3>(a));
    put(Index<1>(), take<4, 3>(a));
    put(Index<2>(), take<2, 3>(a));
    put(Index<3>(), take<0, 3>(a));
  }
};

template <>
struct Unpack<3> {
  static constexpr int kPieces = 8;
  template <int kPiece, typename V, typename Put>
  static TIERHINTS_INLINE void join(V two, V one, Put put) {
    put(Index<kPiece>(), take<6 - kPiece / 2 * 2 - 1, 6>(two) | take<7 - kPiece, 1>(one));
  }
  template <typename V, typename Load, typename Put>
  static TIERHINTS_INLINE void step(Load load, Put put) {
    const V a = load(0, 0), b = load(0, 1), one = load(1, 0);
    join<0>(a, one, put);
    join<1>(b, one, put);
    join<2>(a, one, put);
    join<3>(b, one, put);
    join<4>(a, one, put);
    join<5>(b, one, put);
    join<6>(a, one, put);
    join<7>(b, one, put);
  }
};

template <>
struct Unpack<4> {
  static constexpr int kPieces = 2;
  template <typename V, typename Load, typename Put>
  static TIERHINTS_INLINE void step(Load load, Put put) {
    const V a = load(0, 0);
    put(Index<0>(), take<4, 15>(a));
    put(Index<1>(), take<0, 15>(a));
  }
};

template <>
struct Unpack<5> {
  static constexpr int kPieces = 8;
  template <int kPiece, typename V, typename Put>
  static TIERHINTS_INLINE void join(V four, V one, Put put) {
    put(Index<kPiece>(), take<kPiece < 4 ? 3 : -1, 30>(four) | take<7 - kPiece, 1>(one));
  }
  template <int kPiece, typename V, typename Load, typename Put>
  static TIERHINTS_INLINE void both(Load load, V one, Put put) {
    const V a = load(0, kPiece);
    join<kPiece>(a, one, put);
    join<kPiece + 4>(a, one, put);
  }
  template <typename V, typename Load, typename Put>
  static TIERHINTS_INLINE void step(Load load, Put put) {
    const V one = load(1, 0);
    both<0>(load, one, put);
    both<1>(load, one, put);
    both<2>(load, one, put);
    both<3>(load, one, put);
  }
};

template <>
struct Unpack<6> {
  static constexpr int kPieces = 4;
  template <typename V, typename Load, typename Put>
  static TIERHINTS_INLINE void step(Load load, Put put) {
    const V a = load(0, 0), b = load(0, 1), two = load(1, 0);
    put(Index<0>(), take<2, 60>(a) | take<6, 3>(two));
    put(Index<1>(), take<2, 60>(b) | take<4, 3>(two));
    put(Index<2>(), take<-2, 60>(a) | take<2, 3>(two));
    put(Index<3>(), take<-2, 60>(b) | take<0, 3>(two));
  }
};

template <>
struct Unpack<8> {
  static constexpr int kPieces = 4;
  template <typename V, typename Load, typename Put>
  static TIERHINTS_INLINE void step(Load load, Put put) {
    const V a = load(0, 0), b = load(0, 1), two = load(1, 0), low = load(2, 0);
    put(Index<0>(), take<0, 240>(a) | take<4, 12>(two) | take<6, 3>(low));
    put(Index<1>(), take<0, 240>(b) | take<2, 12>(two) | take<4, 3>(low));
    put(Index<2>(), take<-4, 240>(a) | take<0, 12>(two) | take<2, 3>(low));
    put(Index<3>(), take<-4, 240>(b) | take<-2, 12>(two) | take<0, 3>(low));
  }
};

// Asks for what is read some rows later of each plane, in the place of `count` bytes of the
// narrowest.
template <int kBits>
TIERHINTS_INLINE void fetch_ahead(const uint8_t* const* plane, int64_t j, int64_t count) {
  constexpr int kWidths[] = {kBits == 5 ? 4 : kBits == 2 || kBits == 4 ? 1 : 2, 1, 1};
  constexpr int kPlanes = kBits == 8 ? 3 : kBits == 2 || kBits == 4 ? 1 : 2;
  for (int index = 0; index < kPlanes; ++index) {
    const uint8_t* start = plane[index] + j * kWidths[index] + kAheadBytes;
    for (int64_t byte = 0; byte < count * kWidths[index]; byte += 64) {
      __builtin_prefetch(start + byte);
    }
  }
}

// Writes codes j to j + sizeof(V) of each piece, a byte each.
template <int kBits, typename V>
TIERHINTS_INLINE void store_codes(const uint8_t* const* plane, uint8_t* codes, int64_t piece,
                                  int64_t j) {
  Unpack<kBits>::template step<V>(
      [=](int index, int part) TIERHINTS_FORCED { return load<V>(plane[index] + part * piece + j); },
      [=](auto part, V value) TIERHINTS_FORCED { store(codes + part * piece + j, value); });
}

// Writes the padded_cols codes of a row, a byte each. Rows follow each other in memory, but planes
// are more streams than a processor foresees: they are asked for some rows ahead.
template <int kBits>
inline void unpack_row(const Record& record, int64_t row, uint8_t* codes) {
  const uint8_t* plane[kMaxPlanes];
  for (int index = 0; index < record.layout.num_planes; ++index) {
    plane[index] = record.plane(index, row);
  }
  const int64_t piece = record.layout.padded_cols / Unpack<kBits>::kPieces;
  constexpr int64_t kWide = sizeof(Wide);
  int64_t j = 0;
  for (; j + kWide <= piece; j += kWide) {
    fetch_ahead<kBits>(plane, j, kWide);
    store_codes<kBits, Wide>(plane, codes, piece, j);
  }
  // What overlaps gives the same codes once more.
  constexpr int64_t kHalf = sizeof(Half);
  const int64_t left = piece - j;
  if (left > 0) fetch_ahead<kBits>(plane, j, left);
  if (left > kHalf && piece >= kWide) {
    store_codes<kBits, Wide>(plane, codes, piece, piece - kWide);
  } else if (left > 0 && piece >= kHalf) {
    if (left > kHalf) store_codes<kBits, Half>(plane, codes, piece, j);
    store_codes<kBits, Half>(plane, codes, piece, piece - kHalf);
  } else {
    for (; j < piece; j += sizeof(Word)) {
      store_codes<kBits, Word>(plane, codes, piece, j);
    }
  }
}

// A block of activations as codes: writes kCodes of them, 32 at each stride (bytes), returns their
// scale and their sum. Of each 32, with AVX2 those of even columns go to `to`, those of odd ones
// to `rest`: what a vector of bytes gives in one step each (widening them in order takes longer
// than their products). With VNNI, which multiplies bytes, their high bytes go to `to`, and what
// is left, as signed bytes, to `rest`.
struct QuantizedBlock {
  float scale;
  int32_t sum;
};

#ifdef TIERHINTS_AVX2

template <int kCodes>
TIERHINTS_INLINE QuantizedBlock quantize_block(const float* values, uint8_t* to,
                                               uint8_t* rest, int64_t stride) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 peaks = _mm256_setzero_ps(), check = _mm256_setzero_ps();
  for (int k = 0; k < kCodes; k += 8) {
    const __m256 part = _mm256_loadu_ps(values + k);
    peaks = _mm256_max_ps(peaks, _mm256_and_ps(part, magnitude));
    check = _mm256_fmadd_ps(part, _mm256_setzero_ps(), check);  // NaN of what isn't finite
  }
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(peaks), _mm256_extractf128_ps(peaks, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  const float peak = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  const bool sound = _mm256_movemask_ps(_mm256_cmp_ps(check, check, _CMP_UNORD_Q)) == 0;
  if (!sound || peak < kSmallestPeak) {
    for (int k = 0; k < kCodes; k += 32) {
      std::memset(to + k / 32 * stride, 0, 32);
      std::memset(rest + k / 32 * stride, 0, 32);
    }
    return {sound ? 0 : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const __m256 inverse = _mm256_set1_ps(kLargestCode / peak);
  __m256i sums = _mm256_setzero_si256();
  for (int k = 0; k < kCodes; k += 32) {
    [[maybe_unused]] __m256i even[2], odd[2];
    for (int part = 0; part < 2; ++part) {
      const float* from = values + k + 16 * part;
      const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), inverse));
      const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8), inverse));
      sums = _mm256_add_epi32(sums, _mm256_add_epi32(first, second));
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
#ifdef TIERHINTS_VNNI
      const __m256i high = _mm256_srai_epi16(_mm256_add_epi16(packed, _mm256_set1_epi16(128)), 8);
      const int64_t place = k / 32 * stride + 16 * part;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + place), _mm256_cvtepi16_epi8(high));
      // Less 256 times the high bytes.
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rest + place), _mm256_cvtepi16_epi8(packed));
#else
      even[part] = _mm256_srai_epi32(_mm256_slli_epi32(packed, 16), 16);
      odd[part] = _mm256_srai_epi32(packed, 16);
#endif
    }
#ifndef TIERHINTS_VNNI
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k / 32 * stride),
                        _mm256_permute4x64_epi64(_mm256_packs_epi32(even[0], even[1]), 0xd8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rest + k / 32 * stride),
                        _mm256_permute4x64_epi64(_mm256_packs_epi32(odd[0], odd[1]), 0xd8));
#endif
  }
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return {peak / kLargestCode, _mm_cvtsi128_si32(four)};
}

#else

template <int kCodes>
TIERHINTS_INLINE QuantizedBlock quantize_block(const float* values, uint8_t* to,
                                               uint8_t* rest, int64_t stride) {
  float peak = 0, check = 0;
  for (int k = 0; k < kCodes; ++k) {
    peak = std::max(peak, std::fabs(values[k]));
    check += values[k] * 0;  // NaN of what isn't finite
  }
  if (check != 0 || peak < kSmallestPeak) {
    for (int k = 0; k < kCodes; k += 32) {
      std::memset(to + k / 32 * stride, 0, 32);
      std::memset(rest + k / 32 * stride, 0, 32);
    }
    return {check == 0 ? 0 : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const float inverse = kLargestCode / peak;
  int32_t sum = 0;
  for (int k = 0; k < kCodes; ++k) {
    const int32_t code = static_cast<int32_t>(std::nearbyint(values[k] * inverse));
    uint8_t* place = (k % 32 < 16 ? to : rest) + k / 32 * stride;
    reinterpret_cast<int16_t*>(place)[k % 16] = static_cast<int16_t>(code);
    sum += code;
  }
  return {peak / kLargestCode, sum};
}

#endif

// Says whether codes are multiplied in registers as they are unpacked: by vectors of 64, which take
// a scale for each 4, from 32 at most, or lie within a block. Each row of activations is then two
// arrays of bytes, in the order of columns; else those of a tile take turns every 32, and codes are
// stored before they are multiplied.
TIERHINTS_INLINE bool in_registers(const Layout& layout, const Activations& x) {
#ifdef TIERHINTS_VNNI
  const int64_t piece = layout.padded_cols / pieces(layout.bits);
  return x.num_blocks <= 32 || (x.block == 64 && piece % 64 == 0);
#else
  (void)layout, (void)x;
  return false;
#endif
}


void quantize(const float* x, const Layout& layout, Activations* to, int64_t begin, int64_t end) {
  const float dropped = static_cast<float>(1 << layout.dropped_bits());
  const int64_t tile = to->tile;
  const bool ordered = in_registers(layout, *to);
  const int64_t stride = ordered ? 32 : tile * 64, rest = ordered ? to->array_bytes : 32;
  for (int64_t row = begin * tile; row < end * tile; ++row) {
    const float* from = row < to->rows ? x + row * layout.cols : nullptr;
    uint8_t* codes = ordered ? to->row_codes(row)
                             : to->row_codes(row / tile * tile) + row % tile * 64;
    if (ordered) {  // multiplied by codes that aren't there
      std::memset(codes + layout.padded_cols, 0, rest - layout.padded_cols);
      std::memset(codes + rest + layout.padded_cols, 0, rest - layout.padded_cols);
    }
    float* scales = to->scales + row * to->block_stride;
    float* sums = to->sums + row * to->group_stride;
    std::fill_n(scales, to->block_stride, 0.0f);
    std::fill_n(sums, to->group_stride, 0.0f);
    for (int64_t block = 0, start = 0; block < to->num_blocks; ++block, start += to->block) {
      const int64_t size = std::min(to->block, layout.padded_cols - start);
      float padded[64];
      const float* values = from ? from + start : padded;
      if (!from || start + size > layout.cols) {
        for (int64_t k = 0; k < size; ++k) {
          padded[k] = from && start + k < layout.cols ? from[start + k] : 0;
        }
        values = padded;
      }
      uint8_t* place = codes + start / 32 * stride;
      const QuantizedBlock found =
          size == 64 ? quantize_block<64>(values, place, place + rest, stride)
                     : quantize_block<32>(values, place, place + rest, stride);
      scales[block] = found.scale * dropped;
      sums[block / to->blocks_per_group] += found.scale * static_cast<float>(found.sum);
    }
  }
}

// Eight sums at a time, which are added up pairwise in the end.
#ifdef TIERHINTS_AVX2
typedef __m256 Lanes;

TIERHINTS_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
  return _mm256_fmadd_ps(a, b, sum);
}
TIERHINTS_INLINE void total_lanes(const Lanes* four, float* totals) {
  const Lanes pairs = _mm256_hadd_ps(_mm256_hadd_ps(four[0], four[1]),
                                     _mm256_hadd_ps(four[2], four[3]));
  _mm_storeu_ps(totals,
                _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

#ifdef TIERHINTS_VNNI

// The products of a block of codes with one of activations, in 8 lanes.
template <int kCodes, int kWeights, int kRows>
TIERHINTS_INLINE void multiply_block(const uint8_t* codes, int64_t code_stride, const uint8_t* x,
                                     const float* scales, int64_t scale_stride, Lanes* lanes) {
  __m256i high[kWeights * kRows], low[kWeights * kRows];
#pragma GCC unroll 4
  for (int pair = 0; pair < kWeights * kRows; ++pair) {
    high[pair] = low[pair] = _mm256_setzero_si256();
  }
#pragma GCC unroll 2
  for (int k = 0; k < kCodes; k += 32) {
#pragma GCC unroll 4
    for (int w = 0; w < kWeights; ++w) {
      const __m256i those =
          _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + w * code_stride + k));
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const __m256i* other = reinterpret_cast<const __m256i*>(x + (k * kRows + row * 32) * 2);
        const int pair = w * kRows + row;
        high[pair] = _mm256_dpbusd_epi32(high[pair], those, _mm256_load_si256(other));
        low[pair] = _mm256_dpbusd_epi32(low[pair], those, _mm256_load_si256(other + 1));
      }
    }
  }
#pragma GCC unroll 4
  for (int pair = 0; pair < kWeights * kRows; ++pair) {
    const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high[pair], 8), low[pair]);
    const __m256 scale = _mm256_broadcast_ss(scales + pair * scale_stride);
    lanes[pair] = multiply_add(_mm256_cvtepi32_ps(sum), scale, lanes[pair]);
  }
}

#else

// The products of a block of codes with one of activations, in 8 lanes.
template <int kCodes, int kWeights, int kRows>
TIERHINTS_INLINE void multiply_block(const uint8_t* codes, int64_t code_stride, const uint8_t* x,
                                     const float* scales, int64_t scale_stride, Lanes* lanes) {
  __m256i sums[kWeights * kRows];
#pragma GCC unroll 4
  for (auto& sum : sums) sum = _mm256_setzero_si256();
#pragma GCC unroll 2
  for (int k = 0; k < kCodes; k += 32) {
    __m256i even[kWeights], odd[kWeights];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const __m256i* other = reinterpret_cast<const __m256i*>(x + (k * kRows + row * 32) * 2);
      __m256i x_even = _mm256_load_si256(other), x_odd = _mm256_load_si256(other + 1);
      if constexpr (kWeights > 1) asm("" : "+x"(x_even), "+x"(x_odd));  // loaded once
#pragma GCC unroll 4
      for (int w = 0; w < kWeights; ++w) {
        if (row == 0) {
          __m256i pairs =
              _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + w * code_stride + k));
          asm("" : "+x"(pairs));
          even[w] = _mm256_and_si256(pairs, _mm256_set1_epi16(255));
          odd[w] = _mm256_srli_epi16(pairs, 8);
        }
        __m256i& sum = sums[w * kRows + row];
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even[w], x_even));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd[w], x_odd));
        asm("" : "+x"(sum));  // or GCC adds products up first, more than there are registers
      }
    }
  }
#pragma GCC unroll 4
  for (int pair = 0; pair < kWeights * kRows; ++pair) {
    const __m256 scale = _mm256_broadcast_ss(scales + pair * scale_stride);
    lanes[pair] = multiply_add(_mm256_cvtepi32_ps(sums[pair]), scale, lanes[pair]);
  }
}

#endif

#else
typedef float Lanes __attribute__((vector_size(32)));

TIERHINTS_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return a * b + sum; }
TIERHINTS_INLINE void total_lanes(const Lanes* four, float* totals) {
  for (int index = 0; index < kTile; ++index) {
    const Lanes& of = four[index];
    totals[index] = ((of[0] + of[1]) + (of[2] + of[3])) + ((of[4] + of[5]) + (of[6] + of[7]));
  }
}

template <int kCodes, int kWeights, int kRows>
TIERHINTS_INLINE void multiply_block(const uint8_t* codes, int64_t code_stride, const uint8_t* x,
                                     const float* scales, int64_t scale_stride, Lanes* lanes) {
  for (int w = 0; w < kWeights; ++w) {
    for (int row = 0; row < kRows; ++row) {
      int32_t sum = 0;
      for (int k = 0; k < kCodes; k += 32) {
        const uint8_t* from = codes + w * code_stride + k;
        const int16_t* chunk = reinterpret_cast<const int16_t*>(x) + k * kRows + row * 32;
        for (int index = 0; index < 32; ++index) sum += int32_t{from[index]} * chunk[index];
      }
      const int pair = w * kRows + row;
      lanes[pair][0] += static_cast<float>(sum) * scales[pair * scale_stride];
    }
  }
}

#endif

// As many scales or zeros of a row as are converted at a time; `left` of them are left, and 0 comes
// behind them.
#if defined(TIERHINTS_VNNI)
typedef __m512 Floats;

TIERHINTS_INLINE Floats load_parameters(const uint16_t* from, int64_t left) {
  const __mmask16 there = left >= 16 ? 0xffff : (1u << left) - 1;
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
TIERHINTS_INLINE Lanes fold_lanes(Floats sums) {
  return _mm256_add_ps(_mm512_castps512_ps256(sums),
                       _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sums), 1)));
}
#elif defined(TIERHINTS_AVX2)
typedef __m256 Floats;

// What is read behind the last is still the record's: planes follow.
TIERHINTS_INLINE Floats load_parameters(const uint16_t* from, int64_t left) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)),
                                           _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_castsi256_ps(
      _mm256_and_si256(there, _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
}
TIERHINTS_INLINE Lanes fold_lanes(Floats sums) { return sums; }
#else
typedef Lanes Floats;

TIERHINTS_INLINE Floats load_parameters(const uint16_t* from, int64_t left) {
  Floats values = {};
  for (int64_t index = 0; index < std::min<int64_t>(left, 8); ++index) {
    values[index] = from_bfloat16(from[index]);
  }
  return values;
}
TIERHINTS_INLINE Lanes fold_lanes(Floats sums) { return sums; }
#endif

TIERHINTS_INLINE Floats load_floats(const float* from) {
  return load<Floats>(reinterpret_cast<const uint8_t*>(from));
}

// What a thread keeps of the rows of weights that it multiplies.
struct Working {
  uint8_t* codes;  // (kTile, code_stride)
  float* scales;   // (kTile, block_stride): of blocks of weights, times those of activations
  int64_t code_stride, block_stride;
  float low;       // of codes as they are stored, less their middle, in scales

  Working(const Layout& layout, const Activations& x, uint8_t* memory)
      : codes(memory), code_stride(round_up(layout.padded_cols, 64)),
        block_stride(x.block_stride) {
    scales = reinterpret_cast<float*>(memory + kTile * code_stride);
    const float dropped = static_cast<float>(1 << layout.dropped_bits());
    low = (dropped - 1) / 2 - dropped * static_cast<float>(1 << (layout.bits - 1));
  }
};

// Multiplies the scales of a row of weights by those of kRows of activations, and begins `lanes`
// with what codes don't hold: x * (zero + low * scale).
template <int kRows>
TIERHINTS_INLINE void fold_parameters(const Record& record, int64_t row, const Activations& x,
                                      int64_t first, const Working& to, float* scales,
                                      Lanes* lanes) {
  const int64_t num_groups = record.layout.num_groups;
  const uint16_t *from = record.scales(row), *zeros = record.zeros(row);
  const float *x_scales = x.scales + first * x.block_stride,
              *x_sums = x.sums + first * x.group_stride;
  constexpr int64_t kFloats = sizeof(Floats) / 4;
  Floats sums[kRows] = {};
  for (int64_t group = 0; group < num_groups; group += kFloats) {
    const Floats scale = load_parameters(from + group, num_groups - group);
    const Floats offset = load_parameters(zeros + group, num_groups - group) + scale * to.low;
    for (int index = 0; index < kRows; ++index) {
      sums[index] += offset * load_floats(x_sums + index * x.group_stride + group);
      if (x.blocks_per_group == 1) {
        store(reinterpret_cast<uint8_t*>(scales + index * to.block_stride + group),
              scale * load_floats(x_scales + index * x.block_stride + group));
      }
    }
  }
  for (int index = 0; index < kRows; ++index) lanes[index] = fold_lanes(sums[index]);
  if (x.blocks_per_group == 1) return;
  for (int index = 0; index < kRows; ++index) {
    const float* factors = x_scales + index * x.block_stride;
    float* products = scales + index * to.block_stride;
    for (int64_t group = 0, block = 0; group < num_groups; ++group) {
      const float scale = from_bfloat16(from[group]);
      const int64_t end = std::min(block + x.blocks_per_group, x.num_blocks);
      for (; block < end; ++block) products[block] = factors[block] * scale;
    }
  }
}

// Totals of kWeights rows of weights, whose codes are unpacked, times kRows of activations from
// `first` on; one of both is 1.
template <int kWeights, int kRows, int kBlock>
TIERHINTS_INLINE void multiply_tile(const Record& record, int64_t row, const Working& working,
                                    const Activations& from, int64_t first, float* totals) {
  Lanes lanes[kTile] = {};
  for (int w = 0; w < kWeights; ++w) {
    fold_parameters<kRows>(record, row + w, from, first, working,
                           working.scales + w * working.block_stride, lanes + w);
  }
  const int64_t padded_cols = record.layout.padded_cols;
  const uint8_t* x = from.row_codes(first);
  const int64_t whole = padded_cols / kBlock;
  for (int64_t block = 0; block < whole; ++block) {
    multiply_block<kBlock, kWeights, kRows>(working.codes + block * kBlock, working.code_stride,
                                            x + block * kBlock * kRows * 2, working.scales + block,
                                            working.block_stride, lanes);
  }
  if (whole < from.num_blocks) {
    multiply_block<32, kWeights, kRows>(working.codes + whole * kBlock, working.code_stride,
                                        x + whole * kBlock * kRows * 2, working.scales + whole,
                                        working.block_stride, lanes);
  }
  total_lanes(lanes, totals);
}

#ifdef TIERHINTS_VNNI

// Scales of a row of weights, times those of activations, for vectors of codes from any column on:
// kRegisters of 16, or (0) one in memory for each vector.
template <int kRegisters>
struct Scales {
  const float* from;
  __m512 values[kRegisters > 0 ? kRegisters : 1];

  explicit TIERHINTS_INLINE Scales(const float* row) : from(row) {
    for (int index = 0; index < kRegisters; ++index) values[index] = load_floats(row + 16 * index);
  }
  template <int kBlock>
  TIERHINTS_INLINE __m512 at(int64_t column) const {
    if constexpr (kRegisters == 0) return _mm512_set1_ps(from[column / kBlock]);
    const __m512i fours = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i blocks =
        _mm512_srli_epi32(_mm512_add_epi32(fours, _mm512_set1_epi32(static_cast<int>(column / 4))),
                          kBlock == 64 ? 4 : 3);
    if constexpr (kRegisters == 1) return _mm512_permutexvar_ps(blocks, values[0]);
    return _mm512_permutex2var_ps(values[0], blocks, values[kRegisters - 1]);
  }
};

// Totals of kWeights rows of weights times kRows of activations from `first` on, multiplied as they
// are unpacked; one of both is 1.
template <int kBits, int kBlock, int kRegisters, int kWeights, int kRows>
TIERHINTS_INLINE void multiply_in_registers(const Record& record, int64_t row,
                                            const Activations& x, int64_t first,
                                            const Working& working, float* totals) {
  const uint8_t* high = x.row_codes(first);
  const int64_t piece = record.layout.padded_cols / Unpack<kBits>::kPieces;
  Lanes lanes[kTile] = {};
  __m512 sums[kWeights * kRows];
  const uint8_t* plane[kWeights][kMaxPlanes];
#pragma GCC unroll 4
  for (int w = 0; w < kWeights; ++w) {
    fold_parameters<kRows>(record, row + w, x, first, working,
                           working.scales + w * working.block_stride, lanes + w);
    for (int index = 0; index < record.layout.num_planes; ++index) {
      plane[w][index] = record.plane(index, row + w);
    }
  }
#pragma GCC unroll 4
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < piece; j += 64) {
    const __mmask64 there = piece - j < 64 ? (uint64_t{1} << (piece - j)) - 1 : ~uint64_t{0};
#pragma GCC unroll 4
    for (int w = 0; w < kWeights; ++w) {
      fetch_ahead<kBits>(plane[w], j, std::min<int64_t>(piece - j, 64));
      Unpack<kBits>::template step<Wide>(
          [&](int index, int part) TIERHINTS_FORCED {
            return (Wide)_mm512_maskz_loadu_epi8(there, plane[w][index] + part * piece + j);
          },
          [&](auto part, Wide codes) TIERHINTS_FORCED {
            const int64_t column = part * piece + j;
#pragma GCC unroll 4
            for (int m = 0; m < kRows; ++m) {
              const int pair = w * kRows + m;
              const uint8_t* activations = high + m * x.row_bytes() + column;
              const Scales<kRegisters> scales(working.scales + pair * working.block_stride);
              const __m512i coarse = _mm512_dpbusd_epi32(_mm512_setzero_si512(), (__m512i)codes,
                                                         _mm512_loadu_si512(activations));
              const __m512i sum =
                  _mm512_dpbusd_epi32(_mm512_slli_epi32(coarse, 8), (__m512i)codes,
                                      _mm512_loadu_si512(activations + x.array_bytes));
              sums[pair] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum),
                                           scales.template at<kBlock>(column), sums[pair]);
            }
          });
    }
  }
#pragma GCC unroll 4
  for (int pair = 0; pair < kWeights * kRows; ++pair) {
    lanes[pair] = _mm256_add_ps(lanes[pair], fold_lanes(sums[pair]));
  }
  total_lanes(lanes, totals);
}

template <int kBits, int kBlock, int kRegisters>
struct InRegisters {
  static TIERHINTS_INLINE void prepare(const Record&, int64_t, int, const Working&) {}
  template <int kWeights, int kRows>
  static TIERHINTS_INLINE void multiply(const Record& record, int64_t row, const Activations& x,
                                        int64_t first, const Working& working, float* totals) {
    multiply_in_registers<kBits, kBlock, kRegisters, kWeights, kRows>(record, row, x, first,
                                                                      working, totals);
  }
};

#endif

template <int kBits, int kBlock>
struct Stored {
  static TIERHINTS_INLINE void prepare(const Record& record, int64_t row, int count,
                                       const Working& working) {
    for (int index = 0; index < count; ++index) {
      unpack_row<kBits>(record, row + index, working.codes + index * working.code_stride);
    }
  }
  template <int kWeights, int kRows>
  static TIERHINTS_INLINE void multiply(const Record& record, int64_t row, const Activations& x,
                                        int64_t first, const Working& working, float* totals) {
    multiply_tile<kWeights, kRows, kBlock>(record, row, working, x, first, totals);
  }
};

template <typename Way>
void multiply_rows(const Record& record, const Activations& x, const float* bias, float* y,
                   int64_t stride, int64_t begin, int64_t end, uint8_t* memory) {
  const Working working(record.layout, x, memory);
  float totals[kTile];
  int64_t row = begin;
  if (x.tile == 1) {
    for (; row + kTile <= end; row += kTile) {
      Way::prepare(record, row, kTile, working);
      Way::template multiply<kTile, 1>(record, row, x, 0, working, totals);
      for (int index = 0; index < kTile; ++index) {
        y[row + index] = totals[index] + (bias ? bias[row + index] : 0);
      }
    }
    for (; row < end; ++row) {
      Way::prepare(record, row, 1, working);
      Way::template multiply<1, 1>(record, row, x, 0, working, totals);
      y[row] = totals[0] + (bias ? bias[row] : 0);
    }
  }
  for (; row < end; ++row) {
    Way::prepare(record, row, 1, working);
    for (int64_t first = 0; first < x.rows; first += kTile) {
      Way::template multiply<1, kTile>(record, row, x, first, working, totals);
      const int64_t last = std::min<int64_t>(first + kTile, x.rows);
      for (int64_t m = first; m < last; ++m) {
        y[m * stride + row] = totals[m - first] + (bias ? bias[row] : 0);
      }
    }
  }
}

template <int kBits, int kBlock>
void multiply_blocks(const Record& record, const Activations& x, const float* bias, float* y,
                     int64_t stride, int64_t begin, int64_t end, uint8_t* working) {
  auto rows = multiply_rows<Stored<kBits, kBlock>>;
#ifdef TIERHINTS_VNNI
  if (in_registers(record.layout, x)) {
    rows = x.num_blocks <= 16   ? multiply_rows<InRegisters<kBits, kBlock, 1>>
           : x.num_blocks <= 32 ? multiply_rows<InRegisters<kBits, kBlock, 2>>
                                : multiply_rows<InRegisters<kBits, kBlock, 0>>;
  }
#endif
  rows(record, x, bias, y, stride, begin, end, working);
}

template <int kBits>
void multiply_bits(const Record& record, const Activations& x, const float* bias, float* y,
                   int64_t stride, int64_t begin, int64_t end, uint8_t* working) {
  if (x.block == 64) {
    multiply_blocks<kBits, 64>(record, x, bias, y, stride, begin, end, working);
  } else {
    multiply_blocks<kBits, 32>(record, x, bias, y, stride, begin, end, working);
  }
}

void multiply(const Record& record, const Activations& x, const float* bias, float* y,
              int64_t stride, int64_t begin, int64_t end, uint8_t* working) {
  switch (record.layout.bits) {
    case 2: return multiply_bits<2>(record, x, bias, y, stride, begin, end, working);
    case 3: return multiply_bits<3>(record, x, bias, y, stride, begin, end, working);
    case 4: return multiply_bits<4>(record, x, bias, y, stride, begin, end, working);
    case 5: return multiply_bits<5>(record, x, bias, y, stride, begin, end, working);
    case 6: return multiply_bits<6>(record, x, bias, y, stride, begin, end, working);
    default: return multiply_bits<8>(record, x, bias, y, stride, begin, end, working);
  }
}

void decode(const Record& record, int64_t row, float* out, uint8_t* codes) {
  switch (record.layout.bits) {
    case 2: unpack_row<2>(record, row, codes); break;
    case 3: unpack_row<3>(record, row, codes); break;
    case 4: unpack_row<4>(record, row, codes); break;
    case 5: unpack_row<5>(record, row, codes); break;
    case 6: unpack_row<6>(record, row, codes); break;
    default: unpack_row<8>(record, row, codes); break;
  }
  const Layout& layout = record.layout;
  const uint16_t *scales = record.scales(row), *zeros = record.zeros(row);
  const float dropped = static_cast<float>(1 << layout.dropped_bits());
  const float middle = static_cast<float>(1 << (layout.stored_bits - 1));
  for (int64_t group = 0; group < layout.num_groups; ++group) {
    const float stored = from_bfloat16(scales[group]);
    const float low = from_bfloat16(zeros[group]) + stored * ((dropped - 1) / 2 - middle);
    const float scale = stored * dropped;
    const int64_t start = group * layout.group_size;
    const int64_t stop = std::min(start + layout.group_size, layout.cols);
    for (int64_t k = start; k < stop; ++k) out[k] = static_cast<float>(codes[k]) * scale + low;
  }
}
