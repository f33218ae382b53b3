// Included behind attention.inl: a span of pieces. Codes c of a row stand for z + s (c - middle), so
// with q . k = s (q . c) + (z - s middle) sum(q), and likewise for values, they are multiplied as
// they are: a piece's become floats that stay in the nearest cache, for all queries of its head.

// Queries that share what is loaded: their sums have to fit into registers.
constexpr int kQueryTile = kLanes == 16 ? 4 : 2;

// Rows of floats.
struct FloatRows {
  const float* at;
  int64_t stride;
};

template <int kBits>
INLINE void expand_codes(const Record record, int64_t first, int64_t count, float* to) {
  for (int64_t row = first; row < first + count; ++row) {
    const Row<kBits> codes(record, row);
    for (int64_t column = 0; column < record.layout.padded_cols; column += kBlockCodes) {
      store_as_floats(codes.at(column), to);
      to += kBlockCodes;
    }
  }
}

// Rows of a piece's keys or values, codes and not what they stand for: where they lie, or in `tile`.
FloatRows open_rows(const StateRows& of, const uint8_t* data, int64_t first, int64_t count,
                    float* tile) {
  if (of.bits == 32) {
    return {reinterpret_cast<const float*>(data) + first * of.stride, of.stride};
  }
  if (of.bits == 16) {
    const auto* from = reinterpret_cast<const uint16_t*>(data) + first * of.stride;
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t d = 0; d < of.size; d += kLanes) {
        store_floats(tile + row * of.size + d, load_parameters(from + row * of.stride + d));
      }
    }
    return {tile, of.size};
  }
  const Record record{of.layout, data};
  switch (of.bits) {
    case 2: expand_codes<2>(record, first, count, tile); break;
    case 3: expand_codes<3>(record, first, count, tile); break;
    case 4: expand_codes<4>(record, first, count, tile); break;
    case 5: expand_codes<5>(record, first, count, tile); break;
    case 6: expand_codes<6>(record, first, count, tile); break;
    default: expand_codes<8>(record, first, count, tile); break;
  }
  return {tile, of.layout.padded_cols};
}

// Scale and value of code 0 of the rows of codes that lie from `row` on, one in each lane.
struct Parameters {
  Lanes scale, low;
};

INLINE Parameters row_parameters(const Record& record, int64_t row) {
  const float dropped = static_cast<float>(1 << record.layout.dropped_bits());
  const float middle = static_cast<float>(1 << (record.layout.stored_bits - 1));
  const Lanes scale = load_parameters(record.scales(row));
  return {scale * dropped,
          multiply_add(scale, (dropped - 1) / 2 - middle, load_parameters(record.zeros(row)))};
}

// Writes scores of kRows queries, kSpanScores apart, at rows of keys; up to 3 beyond them.
template <int kRows>
INLINE void score_rows(const float* query, const FloatRows& keys, int64_t size, int64_t count,
                       float* scores) {
  for (int64_t j = 0; j < count; j += 4) {
    const float* row[4];
    for (int64_t k = 0; k < 4; ++k) row[k] = keys.at + std::min(j + k, count - 1) * keys.stride;
    Lanes sums[kRows][4] = {};
    for (int64_t d = 0; d < size; d += kLanes) {
      const Lanes key[4] = {load_floats(row[0] + d), load_floats(row[1] + d),
                            load_floats(row[2] + d), load_floats(row[3] + d)};
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const Lanes q = load_floats(query + m * size + d);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[m][k] = multiply_add(q, key[k], sums[m][k]);
      }
    }
    for (int m = 0; m < kRows; ++m) total_lanes(sums[m], scores + m * kSpanScores + j);
  }
}

// Adds to kCount registers of kRows outputs their weighted values; `weights`: kSpanScores apart.
template <int kRows, int kCount>
INLINE void add_weighted(const float* weights, const FloatRows& values, int64_t count, float* out,
                         int64_t stride) {
  Lanes sums[kRows][kCount];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) sums[m][k] = load_floats(out + m * stride + k * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      const Lanes value = load_floats(values.at + j * values.stride + k * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        sums[m][k] = multiply_add(value, weights[m * kSpanScores + j], sums[m][k]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) store_floats(out + m * stride + k * kLanes, sums[m][k]);
  }
}

template <int kRows>
void weigh_rows(const float* weights, const FloatRows& values, int64_t size, int64_t count,
                float* out) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes) {
    add_weighted<kRows, 4>(weights, {values.at + d, values.stride}, count, out + d, size);
  }
  for (; d < size; d += kLanes) {
    add_weighted<kRows, 1>(weights, {values.at + d, values.stride}, count, out + d, size);
  }
}

// Calls `of` with numbers of queries that are multiplied together, and the first of them.
template <typename Function>
INLINE void in_tiles(int64_t rows, const Function& of) {
  int64_t row = 0;
  for (; row + kQueryTile <= rows; row += kQueryTile) {
    of(std::integral_constant<int, kQueryTile>(), row);
  }
  if constexpr (kQueryTile > 2) {
    if (rows - row == 3) of(std::integral_constant<int, 3>(), row);
    if (rows - row == 2) of(std::integral_constant<int, 2>(), row);
  }
  if (rows - row == 1) of(std::integral_constant<int, 1>(), row);
}

INLINE Lanes cap_scores(Lanes scores, float softcap) {
  const Lanes zero = {};
  const Lanes shrunk = exp_lanes((scores < zero ? scores : -scores) * (2 / softcap));
  const Lanes found = (1.0f - shrunk) / (1.0f + shrunk) * softcap;  // softcap * tanh(|score| / softcap)
  return scores < zero ? -found : found;
}

// Scores of all queries at the tokens of a piece, which end with -infinity up to a multiple of 16.
INLINE void score_piece(const PageSpan& span, const Piece& piece, const StateRows& of,
                        const float* query_sums, float* scores, float* tile) {
  const int64_t first = span.group * piece.rows + piece.start, count = piece.count;
  const FloatRows keys = open_rows(of, piece.keys, first, count, tile);
  in_tiles(span.rows, [&](auto tile_rows, int64_t row) FORCED {
    score_rows<decltype(tile_rows)::value>(span.query + row * of.size, keys, of.size, count,
                                           scores + row * kSpanScores);
  });
  const Record record{of.layout, piece.keys};
  for (int64_t j = 0; j < count; j += kLanes) {
    Parameters means{};
    if (of.has_codes()) means = row_parameters(record, first + j);
    for (int64_t row = 0; row < span.rows; ++row) {
      float* const at = scores + row * kSpanScores + j;
      Lanes found = load_floats(at);
      if (of.has_codes()) found = multiply_add(means.low, query_sums[row], found * means.scale);
      found = found * span.scale;
      store_floats(at, span.softcap ? cap_scores(found, span.softcap) : found);
    }
  }
  for (int64_t row = 0; row < span.rows; ++row) {
    std::fill(scores + row * kSpanScores + count,
              scores + row * kSpanScores + round_up(count, 16),
              -std::numeric_limits<float>::infinity());
  }
}

// Adds values, weighted. Of codes, what all numbers of a row have in common goes to `common`.
INLINE void weigh_piece(const PageSpan& span, const Piece& piece, const StateRows& of,
                        float* weights, float* common, float* values, float* tile) {
  const int64_t first = span.group * piece.rows + piece.start, count = piece.count;
  const FloatRows rows = open_rows(of, piece.values, first, count, tile);
  if (of.has_codes()) {
    const Record record{of.layout, piece.values};
    for (int64_t j = 0; j < count; j += kLanes) {
      Parameters means = row_parameters(record, first + j);
      for (int64_t k = count - j; k < kLanes; ++k) means.scale[k] = means.low[k] = 0;
      for (int64_t row = 0; row < span.rows; ++row) {
        float* const at = weights + row * kSpanScores + j;
        const Lanes given = load_floats(at);
        store_floats(common + row * 16, multiply_add(given, means.low, load_floats(common + row * 16)));
        store_floats(at, given * means.scale);
      }
    }
  }
  in_tiles(span.rows, [&](auto tile_rows, int64_t row) FORCED {
    weigh_rows<decltype(tile_rows)::value>(weights + row * kSpanScores, rows, of.size, count,
                                           values + row * of.size);
  });
}

INLINE float total(Lanes lanes) {
  const Lanes four[4] = {lanes};
  float totals[4];
  total_lanes(four, totals);
  return totals[0];
}

void attend_pages(const PageSpan& span, float* values, Partial* partials, float* memory) {
  float *const scores = memory, *const common = scores + span.rows * kSpanScores;
  float *const sums = common + span.rows * 16, *const tile = sums + round_up(span.rows, 16);
  const int64_t key_size = span.keys[0]->size, value_size = span.values[0]->size;
  for (int64_t row = 0; row < span.rows; ++row) {
    Lanes sum = {};
    for (int64_t d = 0; d < key_size; d += kLanes) {
      sum = sum + load_floats(span.query + row * key_size + d);
    }
    sums[row] = total(sum);
  }
  int64_t length = 0;
  for (const Piece* piece = span.pieces; piece != span.end; ++piece) {
    score_piece(span, *piece, *span.keys[span.is_page(piece)], sums, scores + length, tile);
    length += round_up(piece->count, 16);
  }
  for (int64_t row = 0; row < span.rows; ++row) {
    float* const at = scores + row * kSpanScores;
    float peak = std::numeric_limits<float>::lowest();
    for (int64_t j = 0; j < length; ++j) peak = at[j] > peak ? at[j] : peak;
    Lanes sum = {};
    for (int64_t j = 0; j < length; j += kLanes) {
      const Lanes weights = exp_lanes(load_floats(at + j) - peak);
      store_floats(at + j, weights);
      sum = sum + weights;
    }
    partials[row] = {peak, total(sum)};
  }
  std::fill_n(values, span.rows * value_size, 0.0f);
  std::fill_n(common, span.rows * 16, 0.0f);
  length = 0;
  for (const Piece* piece = span.pieces; piece != span.end; ++piece) {
    weigh_piece(span, *piece, *span.values[span.is_page(piece)], scores + length, common, values,
                tile);
    length += round_up(piece->count, 16);
  }
  for (int64_t row = 0; row < span.rows; ++row) {
    const float added = total(load_floats(common + row * 16));
    for (int64_t d = 0; d < value_size; ++d) values[row * value_size + d] += added;
  }
}
