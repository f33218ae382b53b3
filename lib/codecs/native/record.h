// Where the sections of a record lie (lib/codecs/layout.py has the same arithmetic, with reasons).
#pragma once

#include <cstdint>

namespace tierhints {

constexpr int64_t kAlignment = 256;
constexpr int64_t kHeaderBytes = 256;
constexpr int64_t kBlockCodes = 64;  // that lie together in each plane; rows are padded to them
constexpr int kMaxPlanes = 3;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// The bits of each plane of a code, the most significant first; 0 ends the list.
inline constexpr int kPlaneBits[9][kMaxPlanes + 1] = {
    {0}, {0}, {2, 0}, {2, 1, 0}, {4, 0}, {4, 1, 0}, {4, 2, 0}, {0}, {4, 2, 2, 0}};

inline const int* plane_bits(int64_t bits) { return kPlaneBits[bits >= 0 && bits <= 8 ? bits : 0]; }

struct Layout {
  int64_t rows, cols, padded_cols;
  int64_t group_size, num_groups;  // weights of a row that share a scale and a zero; 0: the row
  int bits, stored_bits;           // as read, and as encoded: a prefix has fewer

  int64_t scales_offset, zeros_offset, num_bytes;
  int num_planes = 0;
  int64_t plane_offset[kMaxPlanes], row_bytes[kMaxPlanes];

  Layout(int64_t rows_, int64_t cols_, int64_t group, int64_t stored, int64_t read)
      : rows(rows_), cols(cols_), padded_cols(round_up(cols_, kBlockCodes)),
        group_size(group ? group : cols_), num_groups((cols_ + group_size - 1) / group_size),
        bits(static_cast<int>(read)), stored_bits(static_cast<int>(stored)) {
    const int64_t parameters = round_up(rows * num_groups * 2, kAlignment);
    scales_offset = kHeaderBytes;
    zeros_offset = scales_offset + parameters;
    int64_t start = zeros_offset + parameters;
    for (const int* plane = plane_bits(read); *plane; ++plane, ++num_planes) {
      plane_offset[num_planes] = start;
      row_bytes[num_planes] = padded_cols * *plane / 8;
      start += round_up(rows * row_bytes[num_planes], kAlignment);
    }
    num_bytes = start;
  }

  int dropped_bits() const { return stored_bits - bits; }
};

// The bytes of a record, of which `layout` says the places.
struct Record {
  Layout layout;
  const uint8_t* data;

  const uint8_t* plane(int index, int64_t row) const {
    return data + layout.plane_offset[index] + row * layout.row_bytes[index];
  }
  // bfloat16, one a group.
  const uint16_t* scales(int64_t row) const { return parameters(layout.scales_offset, row); }
  const uint16_t* zeros(int64_t row) const { return parameters(layout.zeros_offset, row); }

 private:
  const uint16_t* parameters(int64_t offset, int64_t row) const {
    return reinterpret_cast<const uint16_t*>(data + offset) + row * layout.num_groups;
  }
};

inline float from_bfloat16(uint16_t half) {
  uint32_t word = static_cast<uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

}  // namespace tierhints
