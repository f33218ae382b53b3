// What kernels.inl computes with, for any processor: plain loops, which compilers make vectors of.

// The codes of a block, in order.
struct Codes {
  uint8_t bytes[kBlockCodes];
};

// Eight sums at a time, which are added up pairwise in the end.
typedef float Lanes __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8;

// Adds to each code what the block's part of a plane has of it, at `place` in the code.
template <int kBits>
INLINE void join(const uint8_t* plane, int place, Codes* codes) {
  constexpr int kPiece = kBlockCodes * kBits / 8;
  for (int piece = 0; piece < 8 / kBits; ++piece) {
    for (int j = 0; j < kPiece; ++j) {
      const int bits = plane[j] >> (8 - kBits * (piece + 1)) & ((1 << kBits) - 1);
      codes->bytes[piece * kPiece + j] |= static_cast<uint8_t>(bits << place);
    }
  }
}

template <int kBits>
INLINE Codes unpack(const uint8_t* const* plane) {
  Codes codes{};
  constexpr const int* kPlanes = kPlaneBits[kBits];
  int place = kBits;
  if constexpr (kPlanes[0] == 4) join<4>(plane[0], place -= 4, &codes);
  if constexpr (kPlanes[0] == 2) join<2>(plane[0], place -= 2, &codes);
  if constexpr (kPlanes[1] == 2) join<2>(plane[1], place -= 2, &codes);
  if constexpr (kPlanes[1] == 1) join<1>(plane[1], place -= 1, &codes);
  if constexpr (kPlanes[2] == 2) join<2>(plane[2], place -= 2, &codes);
  return codes;
}

INLINE void store_codes(const Codes& codes, uint8_t* to) {
  std::memcpy(to, codes.bytes, sizeof codes.bytes);
}

INLINE void to_floats(const Codes& codes, Lanes* floats) {
  for (int64_t k = 0; k < kBlockCodes; ++k) floats[k / kLanes][k % kLanes] = codes.bytes[k];
}

// How the codes of half a block of activations lie: int16 in order.
constexpr int64_t kHalfStride = 64;

template <int kCodes>
INLINE QuantizedBlock quantize_block(const float* values, uint8_t* to) {
  float peak = 0;
  bool sound = true;
  for (int k = 0; k < kCodes; ++k) {
    sound = sound && std::isfinite(values[k]);
    peak = std::max(peak, std::fabs(values[k]));
  }
  auto* codes = reinterpret_cast<int16_t*>(to);
  if (!sound || peak < kSmallestPeak) {
    std::fill_n(codes, kCodes, int16_t{0});
    return {sound ? 0 : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const float inverse = kLargestCode / peak;
  int32_t sum = 0;
  for (int k = 0; k < kCodes; ++k) {
    const int32_t code = static_cast<int32_t>(std::nearbyint(values[k] * inverse));
    codes[k] = static_cast<int16_t>(code);
    sum += code;
  }
  return {peak / kLargestCode, sum};
}

template <int kScales>
INLINE void multiply_block(const Codes& codes, const uint8_t* x, const float* scales,
                           Lanes* lanes) {
  const auto* activations = reinterpret_cast<const int16_t*>(x);
  constexpr int kCodes = kBlockCodes / kScales;
  for (int part = 0; part < kScales; ++part) {
    int32_t sum = 0;
    for (int k = part * kCodes; k < (part + 1) * kCodes; ++k) {
      sum += int32_t{codes.bytes[k]} * activations[k];
    }
    (*lanes)[0] += static_cast<float>(sum) * scales[part];
  }
}

// Scales or zeros of a row; or the last `left` of it, and 0 behind them.
INLINE Lanes load_parameters(const uint16_t* from, int64_t left = kLanes) {
  Lanes values = {};
  for (int64_t index = 0; index < left; ++index) values[index] = from_bfloat16(from[index]);
  return values;
}

INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return a * b + sum; }
INLINE Lanes multiply_add(Lanes a, float b, Lanes sum) { return a * b + sum; }

INLINE Lanes load_floats(const float* from) {
  Lanes values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

INLINE void store_floats(float* to, Lanes values) { std::memcpy(to, &values, sizeof values); }

INLINE void total_lanes(const Lanes* four, float* totals) {
  for (int index = 0; index < kTile; ++index) {
    const Lanes& of = four[index];
    totals[index] = ((of[0] + of[1]) + (of[2] + of[3])) + ((of[4] + of[5]) + (of[6] + of[7]));
  }
}
