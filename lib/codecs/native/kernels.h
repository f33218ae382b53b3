// Products with records, and their decoding, on a CPU: for each instruction set the same functions.
#pragma once

#include <cstdint>

#include "record.h"

namespace tierhints {

// Activations as products take them: int16 codes x ~ scale * code, in blocks of a row that lie
// within a group of weights. int16 and not int8: products stay at memory speed, and rounding, at
// most 2^-16 of a block's largest magnitude, is far below that of bfloat16.
struct Activations {
  int64_t rows;        // of activations
  int64_t block;       // codes of a block: 32 or 64
  int64_t num_blocks;  // of a row; the last may be half as long
  int64_t num_groups;
  int16_t* codes;      // (rows, padded_cols), 0 beyond cols
  float* scales;       // (rows, num_blocks)
  int32_t* offsets;    // (rows, num_blocks): -2^(bits-1) times the sum of the block's codes
  float* sums;         // (rows, num_groups): of scale * code

  static int64_t block_of(const Layout& layout) {
    return layout.group_size % 64 == 0 || layout.num_groups == 1 ? 64 : 32;
  }
};

struct Kernels {
  const char* name;
  // Quantizes rows [begin, end) of x, float (rows, cols).
  void (*quantize)(const float* x, const Layout&, Activations*, int64_t begin, int64_t end);
  // Writes y[m * stride + row] for weight rows [begin, end), bias (or null) added. `codes` is
  // memory for padded_cols codes.
  void (*multiply)(const Record&, const Activations&, const float* bias, float* y, int64_t stride,
                   int64_t begin, int64_t end, uint8_t* codes);
  // Writes a row of cols floats.
  void (*decode)(const Record&, int64_t row, float* out, uint8_t* codes);
};

// The fastest that this processor runs; `name` forces one ("portable", "avx2", "avx512").
const Kernels* choose_kernels(const char* name = nullptr);

}  // namespace tierhints
