// Included behind attention.inl: a span of pieces. Codes are multiplied as they are: c stands for
// z + s (c - middle). Of keys each of a head's numbers d has its s and z, which go to the query, so
//
//   q . k = sum_d (q_d s_d) c_d + sum_d q_d (z_d - s_d middle)
//
// and of values each token, whose weight they go to. Codes become floats in registers, for all
// queries of their head.

// Queries that share what is loaded: their sums have to fit into registers.
constexpr int kQueryTile = kLanes == 16 ? 4 : 2;

// Rows of floats.
struct FloatRows {
  const float* at;
  int64_t stride;
};

// Rows of a full piece's keys or values: where they lie, or in `tile`.
FloatRows open_rows(const StateRows& of, const uint8_t* data, int64_t first, int64_t count,
                    float* tile) {
  if (of.bits == 32) {
    return {reinterpret_cast<const float*>(data) + first * of.stride, of.stride};
  }
  const auto* from = reinterpret_cast<const uint16_t*>(data) + first * of.stride;
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t d = 0; d < of.size; d += kLanes) {
      store_floats(tile + row * of.size + d, load_parameters(from + row * of.stride + d));
    }
  }
  return {tile, of.size};
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
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Lanes key = load_floats(row[k] + d);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          sums[m][k] = multiply_add(key, load_floats(query + m * size + d), sums[m][k]);
        }
      }
    }
    for (int m = 0; m < kRows; ++m) total_lanes(sums[m], scores + m * kSpanScores + j);
  }
}

// Rows of weights, and of sums that they add to: how far apart those of two queries are.
struct Strides {
  int64_t weights, out;
};

// Adds to kCount registers of kRows outputs the `count` rows, weighted.
template <int kRows, int kCount>
INLINE void add_weighted(const float* weights, const FloatRows& rows, int64_t count, float* out,
                         const Strides& strides) {
  Lanes sums[kRows][kCount];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) sums[m][k] = load_floats(out + m * strides.out + k * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      const Lanes value = load_floats(rows.at + j * rows.stride + k * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        sums[m][k] = multiply_add(value, weights[m * strides.weights + j], sums[m][k]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) store_floats(out + m * strides.out + k * kLanes, sums[m][k]);
  }
}

template <int kRows>
void weigh_rows(const float* weights, const FloatRows& rows, int64_t size, int64_t count,
                float* out, const Strides strides) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes) {
    add_weighted<kRows, 4>(weights, {rows.at + d, rows.stride}, count, out + d, strides);
  }
  for (; d < size; d += kLanes) {
    add_weighted<kRows, 1>(weights, {rows.at + d, rows.stride}, count, out + d, strides);
  }
}

// Adds to kRows outputs, of `size` columns, the codes of `count` rows, weighted; kPart registers
// into a block at the first column.
template <int kBits, int kRows, int kPart>
INLINE void add_codes(const Record& record, int64_t first, int64_t count, int64_t column,
                      int64_t size, const float* weights, float* out, const Strides& strides) {
  constexpr int kCount = 4;
  out += column + kPart * kLanes;
  const int64_t there = (size - column) / kLanes - kPart;
  if (there <= 0) return;
  Lanes sums[kRows][kCount];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      sums[m][k] = k < there ? load_floats(out + m * strides.out + k * kLanes) : Lanes{};
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    Lanes floats[kBlockCodes / kLanes];
    to_floats(Row<kBits>(record, first + j).at(column), floats);
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        sums[m][k] = multiply_add(floats[kPart + k], weights[m * strides.weights + j], sums[m][k]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      if (k < there) store_floats(out + m * strides.out + k * kLanes, sums[m][k]);
    }
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

template <int kBits>
void weigh_codes(const Record& record, int64_t first, int64_t count, int64_t size, int64_t rows,
                 const float* weights, float* out, const Strides& strides) {
  for (int64_t column = 0; column < size; column += kBlockCodes) {
    in_tiles(rows, [&](auto tile_rows, int64_t row) FORCED {
      constexpr int kRows = decltype(tile_rows)::value;
      const float* const given = weights + row * strides.weights;
      float* const to = out + row * strides.out;
      add_codes<kBits, kRows, 0>(record, first, count, column, size, given, to, strides);
      if constexpr (kBlockCodes > 4 * kLanes) {
        add_codes<kBits, kRows, 4>(record, first, count, column, size, given, to, strides);
      }
    });
  }
}

// Adds to outputs of `size` numbers, of so many queries, the codes of `count` rows of a page's keys
// or values, weighted.
void weigh_page(const StateRows& of, const uint8_t* data, int64_t first, int64_t count,
                int64_t size, int64_t rows, const float* weights, float* out,
                const Strides& strides) {
  const Record record{of.layout, data};
  const auto weigh = of.bits == 2   ? weigh_codes<2>
                     : of.bits == 3 ? weigh_codes<3>
                     : of.bits == 4 ? weigh_codes<4>
                     : of.bits == 5 ? weigh_codes<5>
                     : of.bits == 6 ? weigh_codes<6>
                                    : weigh_codes<8>;
  weigh(record, first, count, size, rows, weights, out, strides);
}

INLINE Lanes cap_scores(Lanes scores, float softcap) {
  const Lanes zero = {};
  const Lanes shrunk = exp_lanes((scores < zero ? scores : -scores) * (2 / softcap));
  const Lanes found = (1.0f - shrunk) / (1.0f + shrunk) * softcap;  // softcap * tanh(|score| / softcap)
  return scores < zero ? -found : found;
}

INLINE float total(Lanes lanes) {
  const Lanes four[4] = {lanes};
  float totals[4];
  total_lanes(four, totals);
  return totals[0];
}

// Scores at the codes of a page's keys; `folded` has room for a query each.
INLINE void score_codes(const PageSpan& span, const Piece& piece, const StateRows& of,
                        float* folded, float* scores) {
  const int64_t first = span.group * of.size;
  const Record record{of.layout, piece.keys};
  for (int64_t row = 0; row < span.rows; ++row) {
    Lanes common = {};
    for (int64_t d = 0; d < of.size; d += kLanes) {
      const Parameters means = row_parameters(record, first + d);
      const Lanes q = load_floats(span.query + row * of.size + d);
      store_floats(folded + row * of.size + d, q * means.scale);
      common = multiply_add(q, means.low, common);
    }
    std::fill_n(scores + row * kSpanScores, piece.rows, total(common));
  }
  weigh_page(of, piece.keys, first, of.size, piece.rows, span.rows, folded, scores,
             {of.size, kSpanScores});
}

// Scores of all queries at the tokens of a piece: -infinity at what is hidden, and behind the last
// up to a multiple of 16.
INLINE void score_piece(const PageSpan& span, const Piece& piece, const StateRows& of,
                        float* folded, float* scores, float* tile) {
  if (of.has_codes()) {
    score_codes(span, piece, of, folded, scores);
  } else {
    const FloatRows keys =
        open_rows(of, piece.keys, span.group * piece.rows, piece.count, tile);
    in_tiles(span.rows, [&](auto tile_rows, int64_t row) FORCED {
      score_rows<decltype(tile_rows)::value>(span.query + row * of.size, keys, of.size,
                                             piece.count, scores + row * kSpanScores);
    });
  }
  for (int64_t row = 0; row < span.rows; ++row) {
    float* const at = scores + row * kSpanScores;
    for (int64_t j = 0; j < piece.count; j += kLanes) {
      const Lanes found = load_floats(at + j) * span.scale;
      store_floats(at + j, span.softcap ? cap_scores(found, span.softcap) : found);
    }
    const float nothing = -std::numeric_limits<float>::infinity();
    std::fill_n(at, piece.hidden, nothing);
    std::fill(at + piece.count, at + round_up(piece.count, 16), nothing);
  }
}

// Adds values, weighted. Of codes, what all numbers of a row have in common goes to `common`.
INLINE void weigh_piece(const PageSpan& span, const Piece& piece, const StateRows& of,
                        float* weights, float* common, float* values, float* tile) {
  const int64_t first = span.group * piece.rows, count = piece.count;
  if (of.has_codes()) {
    const Record record{of.layout, piece.values};
    for (int64_t j = 0; j < count; j += kLanes) {
      Parameters means = row_parameters(record, first + j);
      for (int64_t k = count - j; k < kLanes; ++k) means.scale[k] = means.low[k] = 0;
      for (int64_t row = 0; row < span.rows; ++row) {
        float *const at = weights + row * kSpanScores + j, *const sums = common + row * 16;
        const Lanes given = load_floats(at);
        store_floats(sums, multiply_add(given, means.low, load_floats(sums)));
        store_floats(at, given * means.scale);
      }
    }
    weigh_page(of, piece.values, first, count, of.size, span.rows, weights, values,
               {kSpanScores, of.size});
    return;
  }
  const FloatRows rows = open_rows(of, piece.values, first, count, tile);
  in_tiles(span.rows, [&](auto tile_rows, int64_t row) FORCED {
    weigh_rows<decltype(tile_rows)::value>(weights + row * kSpanScores, rows, of.size, count,
                                           values + row * of.size, {kSpanScores, of.size});
  });
}

void attend_pages(const PageSpan& span, float* values, Partial* partials, float* memory) {
  float *const scores = memory, *const common = scores + span.rows * kSpanScores;
  float *const folded = common + span.rows * 16;
  float *const tile = folded + span.rows * span.keys[0]->size;
  const int64_t value_size = span.values[0]->size;
  int64_t length = 0;
  for (const Piece* piece = span.pieces; piece != span.end; ++piece) {
    score_piece(span, *piece, *span.keys[span.is_page(piece)], folded, scores + length, tile);
    length += round_up(piece->count, 16);
  }
  for (int64_t row = 0; row < span.rows; ++row) {
    float* const at = scores + row * kSpanScores;
    Lanes peaks = Lanes{} + std::numeric_limits<float>::lowest();
    for (int64_t j = 0; j < length; j += kLanes) {
      const Lanes some = load_floats(at + j);
      peaks = some > peaks ? some : peaks;
    }
    float peak = peaks[0];
    for (int64_t k = 1; k < kLanes; ++k) peak = peaks[k] > peak ? peaks[k] : peak;
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
