// Attention of one token for each sequence, on a CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace tierhints {

// Positions that are attended to at a time. What a sequence gets doesn't depend on how many threads
// share them, or on the other sequences.
constexpr int64_t kSpan = 128;

// Rows of queries that share keys and values: `rows` of each of (batch, groups). A position lies
// `key_stride` floats behind the one before it; `mask` is added to scores, or null.
struct Attention {
  const float *query, *key, *value, *mask;
  int64_t groups, rows, length, key_size, value_size;  // sizes: multiples of 16
  int64_t key_batch, key_group, key_stride;
  int64_t value_batch, value_group, value_stride;
  int64_t mask_batch;
  float scale;
};

// Some positions of a sequence that a group attends to: the first and last aren't masked.
struct Span {
  int64_t batch, group, start, end;
};

// What a row of queries finds in a span: values weighted by exp(score - peak), and the sum of weights.
struct Partial {
  float peak, sum;
};

// Joins `count` partials and what they found, of `size` values each, in their order: `place` says
// which of `rows` of `out` one belongs to. A row without any is 0.
template <typename Place>
void merge_partials(const float* found, const Partial* partials, int64_t count, int64_t size,
                    const Place& place, float* out, int64_t rows) {
  std::fill_n(out, rows * size, 0.0f);
  std::vector<float> peaks(rows, std::numeric_limits<float>::lowest()), sums(rows, 0.0f);
  for (int64_t index = 0; index < count; ++index) {
    float& peak = peaks[place(index)];
    peak = std::max(peak, partials[index].peak);
  }
  for (int64_t index = 0; index < count; ++index) {
    const int64_t row = place(index);
    const float weight = std::exp(partials[index].peak - peaks[row]);
    sums[row] += weight * partials[index].sum;
    const float* const from = found + index * size;
    for (int64_t d = 0; d < size; ++d) out[row * size + d] += weight * from[d];
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float factor = sums[row] == 0 ? 0 : 1 / sums[row];
    for (int64_t d = 0; d < size; ++d) out[row * size + d] *= factor;
  }
}

}  // namespace tierhints
