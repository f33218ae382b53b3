// Included by kernels.cpp once for each instruction set, inside a namespace and under its target.
// TIERHINTS_AVX2 and TIERHINTS_VNNI say what may be used; without them it is plain C++, which
// compilers vectorize (NEON).

// A vector of bytes that are shifted as 16-bit words (masks drop what crosses a byte's border), or
// one 32-bit word of them: rows of planes are whole words.
typedef uint16_t Wide __attribute__((vector_size(32)));
typedef uint32_t Word;

template <typename V>
inline V load(const uint8_t* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
inline void store(uint8_t* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

template <typename V>
inline V bytes(uint8_t byte);
template <>
inline Wide bytes<Wide>(uint8_t byte) {
  return Wide{} + static_cast<uint16_t>(byte * 0x0101u);
}
template <>
inline Word bytes<Word>(uint8_t byte) {
  return byte * 0x01010101u;
}

// Moves bits of each byte by a place (right where it is positive), and masks them.
template <int kRight, uint8_t kMask, typename V>
inline V take(V value) {
  if constexpr (kRight >= 0) {
    return (value >> kRight) & bytes<V>(kMask);
  } else {
    return (value << -kRight) & bytes<V>(kMask);
  }
}

// Which bytes of a row give which codes: planes.py. `piece` is the bytes of the narrowest plane's
// row, and codes come in `8 / its bits` pieces of so many.
template <int kBits>
struct Unpack;

template <>
struct Unpack<2> {
  static constexpr int kPieces = 4;
  template <typename V>
  static inline void step(const uint8_t* const* plane, uint8_t* codes, int64_t piece, int64_t j) {
    const V a = load<V>(plane[0] + j);
    store(codes + j, take<6, 3>(a));
    store(codes + j + piece, take<4, 3>(a));
    store(codes + j + 2 * piece, take<2, 3>(a));
    store(codes + j + 3 * piece, take<0, 3>(a));
  }
};

template <>
struct Unpack<3> {
  static constexpr int kPieces = 8;
  template <int kPiece, typename V>
  static inline void put(V two, V one, uint8_t* to) {
    store(to, take<6 - kPiece / 2 * 2 - 1, 6>(two) | take<7 - kPiece, 1>(one));
  }
  template <typename V>
  static inline void step(const uint8_t* const* plane, uint8_t* codes, int64_t piece, int64_t j) {
    const V a = load<V>(plane[0] + j), b = load<V>(plane[0] + j + piece);
    const V one = load<V>(plane[1] + j);
    put<0>(a, one, codes + j);
    put<1>(b, one, codes + j + piece);
    put<2>(a, one, codes + j + 2 * piece);
    put<3>(b, one, codes + j + 3 * piece);
    put<4>(a, one, codes + j + 4 * piece);
    put<5>(b, one, codes + j + 5 * piece);
    put<6>(a, one, codes + j + 6 * piece);
    put<7>(b, one, codes + j + 7 * piece);
  }
};

template <>
struct Unpack<4> {
  static constexpr int kPieces = 2;
  template <typename V>
  static inline void step(const uint8_t* const* plane, uint8_t* codes, int64_t piece, int64_t j) {
    const V a = load<V>(plane[0] + j);
    store(codes + j, take<4, 15>(a));
    store(codes + j + piece, take<0, 15>(a));
  }
};

template <>
struct Unpack<5> {
  static constexpr int kPieces = 8;
  template <int kPiece, typename V>
  static inline void put(V four, V one, uint8_t* to) {
    store(to, take<kPiece < 4 ? 3 : -1, 30>(four) | take<7 - kPiece, 1>(one));
  }
  template <int kPiece, typename V>
  static inline void both(const uint8_t* four, V one, uint8_t* codes, int64_t piece, int64_t j) {
    const V a = load<V>(four + j + kPiece * piece);
    put<kPiece>(a, one, codes + j + kPiece * piece);
    put<kPiece + 4>(a, one, codes + j + (kPiece + 4) * piece);
  }
  template <typename V>
  static inline void step(const uint8_t* const* plane, uint8_t* codes, int64_t piece, int64_t j) {
    const V one = load<V>(plane[1] + j);
    both<0>(plane[0], one, codes, piece, j);
    both<1>(plane[0], one, codes, piece, j);
    both<2>(plane[0], one, codes, piece, j);
    both<3>(plane[0], one, codes, piece, j);
  }
};

template <>
struct Unpack<6> {
  static constexpr int kPieces = 4;
  template <typename V>
  static inline void step(const uint8_t* const* plane, uint8_t* codes, int64_t piece, int64_t j) {
    const V a = load<V>(plane[0] + j), b = load<V>(plane[0] + j + piece);
    const V two = load<V>(plane[1] + j);
    store(codes + j, take<2, 60>(a) | take<6, 3>(two));
    store(codes + j + piece, take<2, 60>(b) | take<4, 3>(two));
    store(codes + j + 2 * piece, take<-2, 60>(a) | take<2, 3>(two));
    store(codes + j + 3 * piece, take<-2, 60>(b) | take<0, 3>(two));
  }
};

template <>
struct Unpack<8> {
  static constexpr int kPieces = 4;
  template <typename V>
  static inline void step(const uint8_t* const* plane, uint8_t* codes, int64_t piece, int64_t j) {
    const V a = load<V>(plane[0] + j), b = load<V>(plane[0] + j + piece);
    const V two = load<V>(plane[1] + j), low = load<V>(plane[2] + j);
    store(codes + j, take<0, 240>(a) | take<4, 12>(two) | take<6, 3>(low));
    store(codes + j + piece, take<0, 240>(b) | take<2, 12>(two) | take<4, 3>(low));
    store(codes + j + 2 * piece, take<-4, 240>(a) | take<0, 12>(two) | take<2, 3>(low));
    store(codes + j + 3 * piece, take<-4, 240>(b) | take<-2, 12>(two) | take<0, 3>(low));
  }
};

// Writes the padded_cols codes of a row, a byte each.
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
    Unpack<kBits>::template step<Wide>(plane, codes, piece, j);
  }
  if (j < piece && piece >= kWide) {  // once more what overlaps gives the same codes
    Unpack<kBits>::template step<Wide>(plane, codes, piece, piece - kWide);
  } else {
    for (; j < piece; j += sizeof(Word)) {
      Unpack<kBits>::template step<Word>(plane, codes, piece, j);
    }
  }
}

void quantize(const float* x, const Layout& layout, Activations* to, int64_t begin, int64_t end) {
  const int64_t middle = int64_t{1} << (layout.bits - 1);
  for (int64_t row = begin; row < end; ++row) {
    const float* from = x + row * layout.cols;
    int16_t* codes = to->codes + row * layout.padded_cols;
    float* scales = to->scales + row * to->num_blocks;
    int32_t* offsets = to->offsets + row * to->num_blocks;
    float* sums = to->sums + row * to->num_groups;
    for (int64_t group = 0; group < to->num_groups; ++group) sums[group] = 0;
    for (int64_t block = 0; block < to->num_blocks; ++block) {
      const int64_t start = block * to->block;
      const int64_t padded = std::min(to->block, layout.padded_cols - start);
      const int64_t count = std::min(padded, layout.cols - start);
      alignas(32) float values[64];
      for (int64_t k = 0; k < count; ++k) values[k] = from[start + k];
      for (int64_t k = count; k < padded; ++k) values[k] = 0;
      float largest[8] = {0};
      for (int64_t k = 0; k < padded; k += 8) {
        for (int lane = 0; lane < 8; ++lane) {
          largest[lane] = std::max(largest[lane], std::fabs(values[k + lane]));
        }
      }
      float peak = 0;
      for (int lane = 0; lane < 8; ++lane) peak = std::max(peak, largest[lane]);
      // What isn't finite makes the product so, as it does in floating point.
      float check = 0;
      for (int64_t k = 0; k < padded; ++k) check += values[k] * 0;
      const bool sound = check == 0;
      const float scale = sound ? peak / 32767 : std::numeric_limits<float>::quiet_NaN();
      const float inverse = sound && peak > 1e-30f ? 32767 / peak : 0;
      int32_t sum = 0;
      for (int64_t k = 0; k < padded; ++k) {
        const float scaled = sound ? values[k] * inverse : 0;
        const int32_t code = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
        codes[start + k] = static_cast<int16_t>(code);
        sum += code;
      }
      scales[block] = scale;
      offsets[block] = static_cast<int32_t>(-middle * sum);
      sums[start / layout.group_size] += scale * static_cast<float>(sum);
    }
  }
}

#ifdef TIERHINTS_AVX2

inline __m256i widen(const uint8_t* codes) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

inline __m256i multiply_add(__m256i sum, __m256i codes, const int16_t* x) {
  const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
#ifdef TIERHINTS_VNNI
  return _mm256_dpwssd_epi32(sum, codes, other);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, other));
#endif
}

inline float add_lanes(__m256 lanes) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// Sums of 8 lanes for kRows rows of activations at a time.
template <int kRows>
struct Sums {
  __m256 lanes[kRows];
  __m256i block[kRows];

  Sums() {
    for (auto& lane : lanes) lane = _mm256_setzero_ps();
  }
  void begin(int row, int32_t offset) {
    block[row] = _mm256_zextsi128_si256(_mm_cvtsi32_si128(offset));
  }
  void add_codes(const uint8_t* codes, const int16_t* x, int64_t stride) {
    const __m256i wide = widen(codes);
    for (int row = 0; row < kRows; ++row) {
      block[row] = multiply_add(block[row], wide, x + row * stride);
    }
  }
  void end(int row, float scale) {
    const __m256 values = _mm256_cvtepi32_ps(block[row]);
    lanes[row] = _mm256_fmadd_ps(values, _mm256_set1_ps(scale), lanes[row]);
  }
  float total(int row) const { return add_lanes(lanes[row]); }
};

#else

template <int kRows>
struct Sums {
  float sum[kRows] = {0};
  int32_t block[kRows];

  void begin(int row, int32_t offset) { block[row] = offset; }
  void add_codes(const uint8_t* codes, const int16_t* x, int64_t stride) {
    for (int row = 0; row < kRows; ++row) {
      int32_t part = 0;
      for (int k = 0; k < 16; ++k) part += int32_t{codes[k]} * x[row * stride + k];
      block[row] += part;
    }
  }
  void end(int row, float scale) { sum[row] += static_cast<float>(block[row]) * scale; }
  float total(int row) const { return sum[row]; }
};

#endif

// Adds what the zeros of a row's groups contribute, for one row of activations.
inline float add_zeros(const Layout& layout, const uint16_t* scales, const uint16_t* zeros,
                       const float* sums) {
  const float half = static_cast<float>((1 << layout.dropped_bits()) - 1) / 2;
  float total = 0;
  int64_t group = 0;
#ifdef TIERHINTS_AVX2
  if (layout.num_groups >= 8) {
    __m256 lanes = _mm256_setzero_ps();
    const auto floats = [](const uint16_t* from) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    };
    for (; group + 8 <= layout.num_groups; group += 8) {
      const __m256 zero = _mm256_fmadd_ps(floats(scales + group), _mm256_set1_ps(half),
                                          floats(zeros + group));
      lanes = _mm256_fmadd_ps(zero, _mm256_loadu_ps(sums + group), lanes);
    }
    total = add_lanes(lanes);
  }
#endif
  for (; group < layout.num_groups; ++group) {
    total += (from_bfloat16(zeros[group]) + half * from_bfloat16(scales[group])) * sums[group];
  }
  return total;
}

// Products of one row of weights, unpacked, with kRows rows of activations from `first` on.
template <int kRows>
inline void multiply_row(const Layout& layout, const uint8_t* codes, const float* group_scales,
                         const Activations& x, int64_t first, float* totals) {
  Sums<kRows> sums;
  const int16_t* from = x.codes + first * layout.padded_cols;
  const float* scales = x.scales + first * x.num_blocks;
  const int32_t* offsets = x.offsets + first * x.num_blocks;
  const int64_t per_group = layout.num_groups == 1 ? x.num_blocks : layout.group_size / x.block;
  const float* scale = group_scales;
  for (int64_t block = 0, left = per_group; block < x.num_blocks; ++block) {
    const int64_t start = block * x.block;
    const int64_t end = std::min(start + x.block, layout.padded_cols);
    for (int row = 0; row < kRows; ++row) sums.begin(row, offsets[row * x.num_blocks + block]);
    for (int64_t k = start; k < end; k += 16) sums.add_codes(codes + k, from + k, layout.padded_cols);
    for (int row = 0; row < kRows; ++row) {
      sums.end(row, *scale * scales[row * x.num_blocks + block]);
    }
    if (--left == 0) {
      ++scale;
      left = per_group;
    }
  }
  for (int row = 0; row < kRows; ++row) totals[row] = sums.total(row);
}

template <int kBits>
void multiply_bits(const Record& record, const Activations& x, const float* bias, float* y,
                   int64_t stride, int64_t begin, int64_t end, uint8_t* codes) {
  const Layout& layout = record.layout;
  std::vector<float> group_scales(layout.num_groups + 1);
  const float dropped = static_cast<float>(1 << layout.dropped_bits());
  for (int64_t row = begin; row < end; ++row) {
    unpack_row<kBits>(record, row, codes);
    const uint16_t *scales = record.scales(row), *zeros = record.zeros(row);
    for (int64_t group = 0; group < layout.num_groups; ++group) {
      group_scales[group] = from_bfloat16(scales[group]) * dropped;
    }
    const float add = bias ? bias[row] : 0;
    int64_t m = 0;
    float totals[4];
    const auto put = [&](int count) {
      for (int index = 0; index < count; ++index) {
        const float* sums = x.sums + (m + index) * x.num_groups;
        const float zero = add_zeros(layout, scales, zeros, sums);
        y[(m + index) * stride + row] = totals[index] + zero + add;
      }
      m += count;
    };
    while (m + 4 <= x.rows) {
      multiply_row<4>(layout, codes, group_scales.data(), x, m, totals);
      put(4);
    }
    while (m < x.rows) {
      multiply_row<1>(layout, codes, group_scales.data(), x, m, totals);
      put(1);
    }
  }
}

void multiply(const Record& record, const Activations& x, const float* bias, float* y,
              int64_t stride, int64_t begin, int64_t end, uint8_t* codes) {
  switch (record.layout.bits) {
    case 2: return multiply_bits<2>(record, x, bias, y, stride, begin, end, codes);
    case 3: return multiply_bits<3>(record, x, bias, y, stride, begin, end, codes);
    case 4: return multiply_bits<4>(record, x, bias, y, stride, begin, end, codes);
    case 5: return multiply_bits<5>(record, x, bias, y, stride, begin, end, codes);
    case 6: return multiply_bits<6>(record, x, bias, y, stride, begin, end, codes);
    default: return multiply_bits<8>(record, x, bias, y, stride, begin, end, codes);
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
