// Included by encode.cpp once for each instruction set, inside a namespace and under its target:
// plain loops, which the compiler makes vectors of. The arithmetic is that of quantize.py and
// planes.py, in their order, for the same bytes. No product is added to: there is nothing that a
// fused operation would round otherwise.

static inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Integers in the order of the floats whose bits they are made of, NaN beyond both ends.
static inline int32_t in_order(uint32_t bits) {
  const int32_t whole = (int32_t)bits;
  return whole ^ (int32_t)((uint32_t)(whole >> 31) >> 1);
}

static inline float float_in_order(int32_t order) {
  return float_of((uint32_t)in_order((uint32_t)order));
}

// As torch rounds a double to bfloat16: to a float first, ties to even numbers both times.
static inline uint16_t round_to_bfloat16(double value) {
  const uint32_t bits = bits_of((float)value);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline double larger(double a, double b) { return a > b ? a : b; }

// A row as fp32, in scratch where it is none.
static inline const float* row_values(const float* row, int64_t, float*) { return row; }

static inline const float* row_values(const BFloat16Bits* row, int64_t cols, float* values) {
  for (int64_t i = 0; i < cols; ++i) values[i] = float_of((uint32_t)row[i].bits << 16);
  return values;
}

static inline const float* row_values(const Float16Bits* row, int64_t cols, float* values) {
  for (int64_t i = 0; i < cols; ++i) {
    const uint32_t half = row[i].bits, exponent = half & 0x7c00;
    const uint32_t magnitude = (half & 0x7fff) << 13;
    const uint32_t normal = magnitude + ((exponent == 0x7c00 ? 224u : 112u) << 23);
    const uint32_t small = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    values[i] = float_of((exponent ? normal : small) | (half & 0x8000) << 16);
  }
  return values;
}

// Smallest and largest weight of a group, as ordered integers.
static inline void find_ends(const float* values, int64_t count, int32_t* low, int32_t* high) {
  int32_t least = INT32_MAX, most = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t order = in_order(bits_of(values[i]));
    least = order < least ? order : least;
    most = order > most ? order : most;
  }
  *low = least;
  *high = most;
}

// Scales and zeros that cover the ranges of some groups.
static inline void fit_groups(const int32_t* lows, const int32_t* highs, int64_t count,
                              double below, double above, uint16_t* scales, uint16_t* zeros) {
  for (int64_t i = 0; i < count; ++i) {
    const double low = float_in_order(lows[i]), high = float_in_order(highs[i]);
    const double width = (high - low) / (below + above);
    const uint16_t zero = round_to_bfloat16((low + high + width) / 2);
    // The rounded zero must not push an end of the range out of reach.
    const double centre = from_bfloat16(zero);
    const double reach = larger((centre - low) / below, (high - centre) / above);
    const double scale = larger(larger(width, reach), 0x1p-100);
    const uint16_t rounded = round_to_bfloat16(scale);
    scales[i] = (uint16_t)(rounded + (from_bfloat16(rounded) < scale));
    zeros[i] = zero;
  }
}

static inline void quantize_group(const float* values, int64_t count, float zero, float scale,
                                  float middle, uint8_t* codes) {
  const float whole_numbers = 0x1.8p23f + middle;  // its neighbours differ by 1
  for (int64_t i = 0; i < count; ++i) {
    float code = (values[i] - zero) / scale;
    code = code < -middle ? -middle : code;
    code = code > middle - 1 ? middle - 1 : code;
    codes[i] = (uint8_t)bits_of(code + whole_numbers);
  }
}

// One plane of a row: `width` bits of each code, of which `dropped` follow in other planes.
template <int width, int dropped>
static inline void pack_plane(const uint8_t* codes, int64_t row_bytes, uint8_t* plane) {
  constexpr int64_t kBytes = kBlockCodes * width / 8;
  for (int64_t block = 0; block < row_bytes; block += kBytes, codes += kBlockCodes) {
    for (int64_t i = 0; i < kBytes; ++i) {
      uint8_t packed = 0;
      for (int piece = 0; piece < 8 / width; ++piece) {
        const uint8_t code = (uint8_t)(codes[i + piece * kBytes] >> dropped) & ((1 << width) - 1);
        packed = (uint8_t)(packed << width | code);
      }
      plane[block + i] = packed;
    }
  }
}

static inline void pack_row(const uint8_t* codes, int64_t row, const EncodeTarget& target) {
  const auto& bytes = target.layout.row_bytes;
  uint8_t* const planes[] = {target.plane(0, row), target.plane(1, row), target.plane(2, row)};
  switch (target.layout.bits) {
    case 8:
      pack_plane<4, 4>(codes, bytes[0], planes[0]);
      pack_plane<2, 2>(codes, bytes[1], planes[1]);
      return pack_plane<2, 0>(codes, bytes[2], planes[2]);
    case 6:
      pack_plane<4, 2>(codes, bytes[0], planes[0]);
      return pack_plane<2, 0>(codes, bytes[1], planes[1]);
    case 5:
      pack_plane<4, 1>(codes, bytes[0], planes[0]);
      return pack_plane<1, 0>(codes, bytes[1], planes[1]);
    case 4:
      return pack_plane<4, 0>(codes, bytes[0], planes[0]);
    case 3:
      pack_plane<2, 1>(codes, bytes[0], planes[0]);
      return pack_plane<1, 0>(codes, bytes[1], planes[1]);
    default:
      return pack_plane<2, 0>(codes, bytes[0], planes[0]);
  }
}

// Encode `count` rows as those of the record from `first` on. Returns the number of the first row
// with a weight that is NaN, infinite or beyond 2^120, -1 where there is none.
template <typename Weight>
static int64_t encode(const Weight* weights, int64_t first, int64_t count,
                      const EncodeTarget& target, const EncodeScratch& scratch) {
  const Layout& layout = target.layout;
  const int64_t cols = layout.cols, size = layout.group_size, groups = layout.num_groups;
  const double margin = layout.bits <= 3 ? 0.375 : layout.bits == 4 ? 0.125 : 0;
  const double middle = 1 << (layout.bits - 1);
  const int32_t largest = in_order(bits_of(0x1p120f)), smallest = in_order(bits_of(-0x1p120f));
  for (int64_t row = first; row < first + count; ++row, weights += cols) {
    const float* const values = row_values(weights, cols, scratch.values);
    bool sound = true;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t start = group * size;
      find_ends(values + start, std::min(size, cols - start), scratch.lows + group,
                scratch.highs + group);
      sound &= scratch.lows[group] >= smallest && scratch.highs[group] <= largest;
    }
    if (!sound) return row;
    uint16_t *const scales = target.scales(row), *const zeros = target.zeros(row);
    fit_groups(scratch.lows, scratch.highs, groups, middle + margin, middle - 1 + margin, scales,
               zeros);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t start = group * size;
      quantize_group(values + start, std::min(size, cols - start), from_bfloat16(zeros[group]),
                     from_bfloat16(scales[group]), (float)middle, scratch.codes + start);
    }
    pack_row(scratch.codes, row, target);
  }
  return -1;
}
