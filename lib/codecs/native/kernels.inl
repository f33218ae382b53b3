// Included by kernels_*.cpp behind portable.inl, avx2.inl or avx512.inl, in a namespace of its own
// and under its target.

// Multiplies the scales of a row's groups by those of kRows of activations, which gives those of
// blocks, and sets `lanes` to what codes don't hold: x * (zero + low * scale). Of a single group
// the scale is left for the end.
template <int kRows>
INLINE void fold_parameters(const Record& record, int64_t row, const Activations& x, int64_t first,
                            float low, float* scales, Lanes* lanes) {
  const int64_t num_groups = record.layout.num_groups;
  const uint16_t *from = record.scales(row), *zeros = record.zeros(row);
  const float *x_scales = x.scales + first * x.scale_stride,
              *x_sums = x.sums + first * x.group_stride;
  for (int m = 0; m < kRows; ++m) lanes[m] = Lanes{};
  const auto fold = [&](int64_t group, Lanes scale, Lanes zero) FORCED {
    const Lanes offset = multiply_add(scale, low, zero);
    for (int m = 0; m < kRows; ++m) {
      lanes[m] = multiply_add(offset, load_floats(x_sums + m * x.group_stride + group), lanes[m]);
      if (x.scales_per_group == 1) {
        store_floats(scales + m * x.scale_stride + group,
                     scale * load_floats(x_scales + m * x.scale_stride + group));
      }
    }
  };
  int64_t group = 0;
  for (; group + kLanes <= num_groups; group += kLanes) {
    fold(group, load_parameters(from + group), load_parameters(zeros + group));
  }
  if (group < num_groups) {
    const int64_t left = num_groups - group;
    fold(group, load_parameters(from + group, left), load_parameters(zeros + group, left));
  }
  if (x.scales_per_group == 1 || num_groups == 1) return;
  for (int m = 0; m < kRows; ++m) {
    const float* factors = x_scales + m * x.scale_stride;
    float* products = scales + m * x.scale_stride;
    for (int64_t index = 0; index < x.num_scales; ++index) {
      products[index] = factors[index] * from_bfloat16(from[index / x.scales_per_group]);
    }
  }
}

// A row of weights: where its planes begin.
template <int kBits>
struct Row {
  static constexpr const int* kPlanes = kPlaneBits[kBits];
  const uint8_t* plane[kMaxPlanes] = {};

  INLINE Row(const Record& record, int64_t row) {
    for (int index = 0; kPlanes[index]; ++index) plane[index] = record.plane(index, row);
  }
  // The codes of the block that begins at a column.
  INLINE Codes at(int64_t column) const {
    const uint8_t* here[kMaxPlanes] = {};
    for (int index = 0; kPlanes[index]; ++index) {
      here[index] = plane[index] + column / 8 * kPlanes[index];
    }
    return unpack<kBits>(here);
  }
  // Asks for what is some rows further on than the block that begins at a column.
  INLINE void fetch_ahead(int64_t column) const {
    for (int index = 0; kPlanes[index]; ++index) {
      __builtin_prefetch(plane[index] + column / 8 * kPlanes[index] + kAheadBytes);
    }
  }
};

// Adds to each of `lanes` a row of weights times one of kRows of activations from `first` on.
// `scales`: as fold_parameters made them.
template <int kBits, int kScales, int kRows>
INLINE void multiply_row(const Record& record, int64_t row, const Activations& x, int64_t first,
                         const float* scales, Lanes* lanes) {
  const Row<kBits> weights(record, row);
  const uint8_t* activations = x.row_codes(first);
  const bool one_group = record.layout.num_groups == 1;
  if (one_group) scales = x.scales + first * x.scale_stride;
  Lanes sums[kRows] = {};
  for (int64_t column = 0; column < record.layout.padded_cols; column += kBlockCodes) {
    const Codes codes = weights.at(column);
    weights.fetch_ahead(column);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
      multiply_block<kScales>(codes, activations + m * x.row_bytes(), scales + m * x.scale_stride,
                              sums + m);
    }
    activations += kActivationBytes;
    scales += kScales;
  }
  const float scale = one_group ? from_bfloat16(*record.scales(row)) : 1;
  for (int m = 0; m < kRows; ++m) lanes[m] = multiply_add(sums[m], scale, lanes[m]);
}

// What is given by value has its fields in registers: what is stored can't be part of it.
template <int kBits, int kScales>
void multiply_rows(const Record record, const Activations x, const float* bias, float* y,
                   int64_t stride, int64_t begin, int64_t end, uint8_t* memory) {
  const Layout& layout = record.layout;
  const float dropped = static_cast<float>(1 << layout.dropped_bits());
  const float low = (dropped - 1) / 2 - dropped * static_cast<float>(1 << (layout.bits - 1));
  auto* const scales = reinterpret_cast<float*>(memory);
  float totals[kTile];
  if (x.tile == 1) {
    for (int64_t row = begin; row < end; row += kTile) {
      const int64_t count = std::min<int64_t>(kTile, end - row);
      Lanes lanes[kTile] = {};
      // All of them first, since each waits for what it looks up.
      for (int64_t index = 0; index < count; ++index) {
        fold_parameters<1>(record, row + index, x, 0, low, scales + index * x.scale_stride,
                           lanes + index);
      }
      for (int64_t index = 0; index < count; ++index) {
        multiply_row<kBits, kScales, 1>(record, row + index, x, 0, scales + index * x.scale_stride,
                                        lanes + index);
      }
      total_lanes(lanes, totals);
      for (int64_t index = 0; index < count; ++index) {
        y[row + index] = totals[index] + (bias ? bias[row + index] : 0);
      }
    }
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < x.rows; first += kTile) {
      Lanes lanes[kTile] = {};
      fold_parameters<kTile>(record, row, x, first, low, scales, lanes);
      multiply_row<kBits, kScales, kTile>(record, row, x, first, scales, lanes);
      total_lanes(lanes, totals);
      const int64_t last = std::min<int64_t>(first + kTile, x.rows);
      for (int64_t m = first; m < last; ++m) {
        y[m * stride + row] = totals[m - first] + (bias ? bias[row] : 0);
      }
    }
  }
}

template <int kBits>
void multiply_bits(const Record& record, const Activations& x, const float* bias, float* y,
                   int64_t stride, int64_t begin, int64_t end, uint8_t* memory) {
  auto* const rows = x.scales_per_block == 2 ? multiply_rows<kBits, 2> : multiply_rows<kBits, 1>;
  rows(record, x, bias, y, stride, begin, end, memory);
}

void multiply(const Record& record, const Activations& x, const float* bias, float* y,
              int64_t stride, int64_t begin, int64_t end, uint8_t* memory) {
  switch (record.layout.bits) {
    case 2: return multiply_bits<2>(record, x, bias, y, stride, begin, end, memory);
    case 3: return multiply_bits<3>(record, x, bias, y, stride, begin, end, memory);
    case 4: return multiply_bits<4>(record, x, bias, y, stride, begin, end, memory);
    case 5: return multiply_bits<5>(record, x, bias, y, stride, begin, end, memory);
    case 6: return multiply_bits<6>(record, x, bias, y, stride, begin, end, memory);
    default: return multiply_bits<8>(record, x, bias, y, stride, begin, end, memory);
  }
}

// A row of weights that are bfloat16, times one of activations.
INLINE float multiply_halves_row(const uint16_t* weights, const float* x, int64_t cols) {
  Lanes sums[kTile] = {};
  int64_t column = 0;
  for (; column + kTile * kLanes <= cols; column += kTile * kLanes) {
#pragma GCC unroll 4
    for (int part = 0; part < kTile; ++part) {
      const int64_t at = column + part * kLanes;
      sums[part] = multiply_add(load_parameters(weights + at), load_floats(x + at), sums[part]);
    }
  }
  for (; column + kLanes <= cols; column += kLanes) {
    sums[0] =
        multiply_add(load_parameters(weights + column), load_floats(x + column), sums[0]);
  }
  float totals[kTile], rest = 0;
  total_lanes(sums, totals);
  for (; column < cols; ++column) rest += from_bfloat16(weights[column]) * x[column];
  return ((totals[0] + totals[1]) + (totals[2] + totals[3])) + rest;
}

void multiply_halves(const Halves& of, float* y, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint16_t* weights = of.weights + row * of.cols;
    for (int64_t byte = 0; byte < 2 * of.cols; byte += 64) {
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(weights) + byte + kAheadBytes);
    }
    for (int64_t m = 0; m < of.x_rows; ++m) {
      const float bias = of.bias ? of.bias[row] : 0;
      y[m * of.rows + row] = multiply_halves_row(weights, of.x + m * of.cols, of.cols) + bias;
    }
  }
}

void quantize(const float* x, const Layout& layout, Activations* to, int64_t begin, int64_t end) {
  const float dropped = static_cast<float>(1 << layout.dropped_bits());
  const int64_t size = kBlockCodes / to->scales_per_block;
  for (int64_t row = begin * to->tile; row < end * to->tile; ++row) {
    const float* from = row < to->rows ? x + row * layout.cols : nullptr;
    float* scales = to->scales + row * to->scale_stride;
    float* sums = to->sums + row * to->group_stride;
    std::fill_n(scales, to->scale_stride, 0.0f);
    std::fill_n(sums, to->group_stride, 0.0f);
    for (int64_t index = 0, start = 0; start < layout.padded_cols; ++index, start += size) {
      float padded[kBlockCodes];
      const float* values = from ? from + start : padded;
      if (!from || start + size > layout.cols) {
        for (int64_t k = 0; k < size; ++k) {
          padded[k] = from && start + k < layout.cols ? from[start + k] : 0;
        }
        values = padded;
      }
      uint8_t* place = to->row_codes(row) + start / kBlockCodes * kActivationBytes +
                       start % kBlockCodes / 32 * kHalfStride;
      const QuantizedBlock found = size == kBlockCodes
                                       ? quantize_block<kBlockCodes>(values, place)
                                       : quantize_block<kBlockCodes / 2>(values, place);
      scales[index] = found.scale * dropped;
      if (start < layout.cols) {
        sums[index / to->scales_per_group] += found.scale * static_cast<float>(found.sum);
      }
    }
  }
}

template <int kBits>
INLINE void unpack_row(const Record& record, int64_t row, uint8_t* codes) {
  const Row<kBits> weights(record, row);
  for (int64_t column = 0; column < record.layout.padded_cols; column += kBlockCodes) {
    store_codes(weights.at(column), codes + column);
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
