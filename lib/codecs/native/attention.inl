// Included behind kernels.inl: softmax(q k^T scale + mask) v of a span (Dao et al. 2022,
// arXiv:2205.14135, section 3.1: tiles and their later merging).

typedef int32_t Whole __attribute__((vector_size(sizeof(Lanes))));

// exp of numbers that aren't positive, within 2^-22 of it, and 0 below e^-87: 2^n times a polynomial
// (that of Cephes' expf).
INLINE Lanes exp_lanes(Lanes given) {
  const Lanes lowest = Lanes{} - 87.0f;
  const Lanes x = given < lowest ? lowest : given;
  const Lanes shifted = multiply_add(x, 1.44269504f, Lanes{} + 0x1.8p23f);
  const Lanes n = shifted - 0x1.8p23f;
  Lanes r = multiply_add(n, -0.693359375f, x);
  r = multiply_add(n, 2.12194440e-4f, r);
  Lanes p = multiply_add(r, 1.9875691500e-4f, Lanes{} + 1.3981999507e-3f);
  p = multiply_add(p, r, Lanes{} + 8.3334519073e-3f);
  p = multiply_add(p, r, Lanes{} + 4.1665795894e-2f);
  p = multiply_add(p, r, Lanes{} + 1.6666665459e-1f);
  p = multiply_add(p, r, Lanes{} + 5.0000001201e-1f);
  p = multiply_add(p, r * r, r + 1.0f);
  const Lanes found = (Lanes)((Whole)p + ((Whole)shifted << 23));
  return given < lowest ? Lanes{} : found;
}

// Scores of a row of queries at four positions.
INLINE void score_four(const float* query, const float* const* keys, int64_t size, float* scores) {
  Lanes sums[4] = {};
  for (int64_t d = 0; d < size; d += kLanes) {
    const Lanes q = load_floats(query + d);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[k] = multiply_add(q, load_floats(keys[k] + d), sums[k]);
  }
  total_lanes(sums, scores);
}

// Writes kCount registers of weighted values.
template <int kCount>
INLINE void weigh(const float* weights, const float* values, int64_t stride, int64_t count,
                  float* out) {
  Lanes sums[kCount] = {};
  for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      sums[k] = multiply_add(load_floats(values + j * stride + k * kLanes), weights[j], sums[k]);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) store_floats(out + k * kLanes, sums[k]);
}

void attend(const Attention& given, const Span& span, float* values, Partial* partials) {
  const Attention of = given;
  const int64_t count = span.end - span.start, padded = round_up(count, 16);
  const float* const key = of.key + span.batch * of.key_batch + span.group * of.key_group +
                           span.start * of.key_stride;
  const float* const value = of.value + span.batch * of.value_batch +
                             span.group * of.value_group + span.start * of.value_stride;
  const float* const mask = of.mask ? of.mask + span.batch * of.mask_batch + span.start : nullptr;
  const float* query =
      of.query + (span.batch * of.groups + span.group) * of.rows * of.key_size;
  alignas(64) float scores[kSpan];
  for (int64_t row = 0; row < of.rows; ++row, query += of.key_size, values += of.value_size) {
    for (int64_t j = 0; j < count; j += 4) {
      const float* keys[4];
      for (int64_t k = 0; k < 4; ++k) keys[k] = key + std::min(j + k, count - 1) * of.key_stride;
      score_four(query, keys, of.key_size, scores + j);
    }
    // Scores may all be -infinity, if they overflow: they count for nothing then.
    float peak = std::numeric_limits<float>::lowest();
    for (int64_t j = 0; j < count; ++j) {
      scores[j] = scores[j] * of.scale + (mask ? mask[j] : 0);
      peak = scores[j] > peak ? scores[j] : peak;
    }
    for (int64_t j = count; j < padded; ++j) scores[j] = -std::numeric_limits<float>::infinity();
    Lanes sums[4] = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Lanes weights = exp_lanes(load_floats(scores + j) - peak);
      store_floats(scores + j, weights);
      sums[0] = sums[0] + weights;
    }
    float totals[4];
    total_lanes(sums, totals);
    partials[row] = {peak, totals[0]};
    int64_t d = 0;
    for (; d + 8 * kLanes <= of.value_size; d += 8 * kLanes) {
      weigh<8>(scores, value + d, of.value_stride, count, values + d);
    }
    for (; d + 4 * kLanes <= of.value_size; d += 4 * kLanes) {
      weigh<4>(scores, value + d, of.value_stride, count, values + d);
    }
    for (; d < of.value_size; d += kLanes) {
      weigh<1>(scores, value + d, of.value_stride, count, values + d);
    }
  }
}
