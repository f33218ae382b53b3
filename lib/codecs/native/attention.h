// Attention of one token for each sequence, on a CPU.
#pragma once

#include <cstdint>

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

}  // namespace tierhints
