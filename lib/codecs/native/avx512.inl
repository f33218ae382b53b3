// What kernels.inl computes with, for processors with AVX-512 that multiply bytes (VNNI).

// The codes of a block, in order.
typedef __m512i Codes;

typedef __m512 Lanes;
constexpr int64_t kLanes = 16;

// 32, 16 or 8 bytes of a plane, as often as they fit.
INLINE __m512i repeat_32(const uint8_t* from) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
INLINE __m512i repeat_16(const uint8_t* from) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
INLINE __m512i repeat_8(const uint8_t* from) {
  int64_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm512_set1_epi64(word);
}
INLINE __m512i all(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
INLINE __m512i mask(__m512i value, int byte) { return _mm512_and_si512(value, all(byte)); }
// a where bits of the mask are set, b elsewhere; and a there, with b (nothing there) besides.
INLINE __m512i choose(__m512i a, int byte, __m512i b) {
  return _mm512_ternarylogic_epi32(a, all(byte), b, 0xe2);
}
INLINE __m512i join(__m512i a, int byte, __m512i b) {
  return _mm512_ternarylogic_epi32(a, all(byte), b, 0xea);
}
// Rotates each quarter of a register by some bits to the right.
INLINE __m512i rotate(__m512i value, int a, int b, int c, int d) {
  return _mm512_rorv_epi32(value,
                           _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d));
}
// Of eight times the same 8 bytes: a bit of each to its lowest place.
INLINE __m512i lowest_bits(const uint8_t* from) {
  return mask(_mm512_srlv_epi64(repeat_8(from), _mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0)), 1);
}

template <int kBits>
INLINE Codes unpack(const uint8_t* const* plane) {
  if constexpr (kBits == 2) return mask(rotate(repeat_16(plane[0]), 6, 4, 2, 0), 3);
  if constexpr (kBits == 3) {
    return join(rotate(repeat_16(plane[0]), 5, 3, 1, 31), 6, lowest_bits(plane[1]));
  }
  const __m512i four = repeat_32(plane[0]);
  if constexpr (kBits == 4) return mask(rotate(four, 4, 4, 0, 0), 15);
  if constexpr (kBits == 5) return join(rotate(four, 3, 3, 31, 31), 30, lowest_bits(plane[1]));
  const __m512i two = repeat_16(plane[1]);
  if constexpr (kBits == 6) {
    return join(rotate(four, 2, 2, 30, 30), 60, mask(rotate(two, 6, 4, 2, 0), 3));
  }
  const __m512i upper = choose(rotate(four, 0, 0, 28, 28), 0xf0, rotate(two, 4, 2, 0, 30));
  return choose(upper, 0xfc, rotate(repeat_16(plane[2]), 6, 4, 2, 0));
}

INLINE void store_codes(const Codes& codes, uint8_t* to) { _mm512_storeu_si512(to, codes); }

INLINE void to_floats(const Codes& codes, Lanes* floats) {
  const __m128i part[4] = {_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1),
                           _mm512_extracti32x4_epi32(codes, 2), _mm512_extracti32x4_epi32(codes, 3)};
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) floats[k] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part[k]));
}

// How the codes of half a block of activations lie: their high bytes, and what is left, as signed
// bytes, a block's bytes further on.
constexpr int64_t kHalfStride = 32;

template <int kCodes>
INLINE QuantizedBlock quantize_block(const float* values, uint8_t* to) {
  constexpr int kVectors = kCodes / 16;
  __m512 peaks = _mm512_setzero_ps(), check = _mm512_setzero_ps();
  for (int index = 0; index < kVectors; ++index) {
    const __m512 part = _mm512_loadu_ps(values + 16 * index);
    peaks = _mm512_max_ps(peaks, _mm512_abs_ps(part));
    check = _mm512_fmadd_ps(part, _mm512_setzero_ps(), check);  // NaN of what isn't finite
  }
  const float peak = _mm512_reduce_max_ps(peaks);
  const bool sound = _mm512_cmp_ps_mask(check, check, _CMP_UNORD_Q) == 0;
  auto* high = reinterpret_cast<__m128i*>(to);
  auto* low = reinterpret_cast<__m128i*>(to + kBlockCodes);
  if (!sound || peak < kSmallestPeak) {
    std::memset(high, 0, kCodes);
    std::memset(low, 0, kCodes);
    return {sound ? 0 : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const __m512 inverse = _mm512_set1_ps(kLargestCode / peak);
  __m512i sums = _mm512_setzero_si512();
  for (int index = 0; index < kVectors; ++index) {
    const __m512 part = _mm512_loadu_ps(values + 16 * index);
    const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(part, inverse));
    sums = _mm512_add_epi32(sums, codes);
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(codes, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128(high + index, _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128(low + index, _mm512_cvtepi32_epi8(codes));  // less 256 times the high byte
  }
  return {peak / kLargestCode, _mm512_reduce_add_epi32(sums)};
}

template <int kScales>
INLINE void multiply_block(const Codes& codes, const uint8_t* x, const float* scales,
                           Lanes* lanes) {
  const __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_load_si512(x));
  const __m512i sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), codes,
                                          _mm512_load_si512(x + kBlockCodes));
  __m512 scale = _mm512_set1_ps(scales[0]);
  if constexpr (kScales == 2) {
    scale = _mm512_mask_mov_ps(scale, 0xff00, _mm512_set1_ps(scales[1]));
  }
  *lanes = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, *lanes);
}

// Scales or zeros of a row; or the last `left` of it, and 0 behind them.
INLINE Lanes load_parameters(const uint16_t* from, int64_t left = kLanes) {
  const __mmask16 there = left >= kLanes ? 0xffff : (1u << left) - 1;
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm512_fmadd_ps(a, b, sum); }
INLINE Lanes multiply_add(Lanes a, float b, Lanes sum) {
  return _mm512_fmadd_ps(a, _mm512_set1_ps(b), sum);
}

INLINE Lanes load_floats(const float* from) { return _mm512_loadu_ps(from); }

INLINE void store_floats(float* to, Lanes values) { _mm512_storeu_ps(to, values); }

INLINE void total_lanes(const Lanes* four, float* totals) {
  __m256 half[kTile];
  for (int index = 0; index < kTile; ++index) {
    half[index] = _mm256_add_ps(
        _mm512_castps512_ps256(four[index]),
        _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(four[index]), 1)));
  }
  const __m256 pairs =
      _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(totals,
                _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}
