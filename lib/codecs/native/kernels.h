// Products with records, and their decoding, on a CPU: for each instruction set the same functions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "pages.h"
#include "record.h"

namespace tierhints {

// Rows of activations that are multiplied together, or of weights for a single one.
constexpr int kTile = 4;

// Weights that a thread should have to itself: with fewer, waking another takes longer.
constexpr int64_t kGrainWeights = 1 << 15;

inline int64_t lanes_of(int64_t count) { return round_up(count, 16); }

// Activations as products take them: int16 codes x ~ scale * code, in blocks of a row, or half
// blocks, that lie within a group of weights. int16 and not int8: products stay at memory speed,
// and rounding, at most 1/65024 of a block's largest magnitude, is far below that of bfloat16.
// Arrays of scales and of groups end with zeros, up to a multiple of 16.
constexpr int64_t kActivationBytes = 2 * kBlockCodes;  // of a block

struct Activations {
  int64_t rows;              // of activations
  int64_t tile;              // of them that are multiplied together: 1 or kTile (the last: zeros)
  int64_t num_tiles;
  int64_t num_blocks;        // of a row
  int64_t scales_per_block;  // 2 where groups of weights are half as long
  int64_t scales_per_group;
  int64_t num_scales;        // of a row
  int64_t scale_stride, group_stride;
  uint8_t* codes;  // (num_tiles * tile, num_blocks, kActivationBytes), 0 beyond cols
  float* scales;   // (num_tiles * tile, scale_stride): times 2^(bits that weights have dropped)
  float* sums;     // (num_tiles * tile, group_stride): of scale * code

  Activations(const Layout& layout, int64_t count)
      : rows(count), tile(count == 1 ? 1 : kTile), num_tiles((count + tile - 1) / tile),
        num_blocks(layout.padded_cols / kBlockCodes),
        scales_per_block(layout.group_size % kBlockCodes && layout.num_groups > 1 ? 2 : 1),
        num_scales(num_blocks * scales_per_block), scale_stride(lanes_of(num_scales)),
        group_stride(lanes_of(layout.num_groups)) {
    scales_per_group = layout.num_groups == 1
                           ? num_scales
                           : layout.group_size * scales_per_block / kBlockCodes;
  }

  int64_t row_bytes() const { return num_blocks * kActivationBytes; }
  uint8_t* row_codes(int64_t row) const { return codes + row * row_bytes(); }

  int64_t num_bytes() const {
    return num_tiles * tile * (row_bytes() + (scale_stride + group_stride) * 4);
  }
  // Takes so many bytes from `memory` on, which starts at a multiple of 64.
  void use(uint8_t* memory) {
    codes = memory;
    scales = reinterpret_cast<float*>(row_codes(num_tiles * tile));
    sums = scales + num_tiles * tile * scale_stride;
  }
};

// Codes and their scale; their sum.
struct QuantizedBlock {
  float scale;
  int32_t sum;
};

// What a thread works in: the codes of a row of weights as bytes, or scales of blocks of kTile rows.
inline int64_t working_bytes(const Layout& layout) {
  return std::max(layout.padded_cols, kTile * lanes_of(layout.padded_cols / 32) * 4);
}

// Weights that are bfloat16 (rows, cols), and what they are multiplied by; bias: or null.
struct Halves {
  const uint16_t* weights;
  const float *x, *bias;
  int64_t rows, cols, x_rows;
};

struct Kernels {
  const char* name;
  // Quantizes tiles [begin, end) of x, float (rows, cols).
  void (*quantize)(const float* x, const Layout&, Activations*, int64_t begin, int64_t end);
  // Writes y[m * stride + row] for weight rows [begin, end), bias (or null) added. `working` is
  // memory of working_bytes(layout), here and below, that starts at a multiple of 64.
  void (*multiply)(const Record&, const Activations&, const float* bias, float* y, int64_t stride,
                   int64_t begin, int64_t end, uint8_t* working);
  // Writes a row of cols floats.
  void (*decode)(const Record&, int64_t row, float* out, uint8_t* working);
  // Writes y (x_rows, rows) of weight rows [begin, end).
  void (*multiply_halves)(const Halves&, float* y, int64_t begin, int64_t end);
  // Writes (rows, value_size) floats, and of each row its partial.
  void (*attend)(const Attention&, const Span&, float* values, Partial* partials);
  // Likewise (rows of the span, size of a value), in page_floats() of memory.
  void (*attend_pages)(const PageSpan&, float* values, Partial* partials, float* memory);
};

constexpr int64_t kAheadBytes = 4096;  // two hundred nanoseconds
constexpr float kLargestCode = 32512;  // 127 * 256: VNNI takes it as two signed bytes
constexpr float kSmallestPeak = 1e-30f;  // of a block of activations: smaller ones are 0

// A file for each set of instructions, which takes long to compile, has its own.
extern const Kernels kPortable, kAvx2, kAvx512;

// The fastest that this processor runs, or those that $TIERHINTS_NATIVE names ("portable", "avx2",
// "avx512"): null where the processor can't run them.
const Kernels* choose_kernels();

}  // namespace tierhints
