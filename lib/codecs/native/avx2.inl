// What kernels.inl computes with, for processors with AVX2.

// The codes of a block as int16: those of even columns of its first half, those of odd ones, and of
// its second half likewise. Bytes of a plane give them by a shift and a mask; widened in order they
// would cross from one half of a register to the other, which takes longer than their products.
struct Codes {
  __m256i part[4];
};

typedef __m256 Lanes;
constexpr int64_t kLanes = 8;

INLINE __m256i load_bytes(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
// 16 or 8 bytes of a plane, as often as they fit.
INLINE __m256i repeat_16(const uint8_t* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
INLINE __m256i repeat_8(const uint8_t* from) {
  int64_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm256_set1_epi64x(word);
}
INLINE __m256i mask(__m256i value, int byte) {
  return _mm256_and_si256(value, _mm256_set1_epi8(static_cast<char>(byte)));
}
INLINE __m256i either(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }
// Shifts the first half of a register by some bits, the second by others.
INLINE __m256i right(__m256i value, int first, int second) {
  return _mm256_srlv_epi32(value, _mm256_setr_epi32(first, first, first, first, second, second,
                                                    second, second));
}
INLINE __m256i left(__m256i value, int first, int second) {
  return _mm256_sllv_epi32(value, _mm256_setr_epi32(first, first, first, first, second, second,
                                                    second, second));
}

// Parts codes that are bytes.
INLINE Codes part_bytes(__m256i first, __m256i second) {
  const __m256i low = _mm256_set1_epi16(255);
  return {{_mm256_and_si256(first, low), _mm256_srli_epi16(first, 8),
           _mm256_and_si256(second, low), _mm256_srli_epi16(second, 8)}};
}

template <int kBits>
INLINE Codes unpack(const uint8_t* const* plane) {
  if constexpr (kBits == 2) {
    const __m256i all = repeat_16(plane[0]), low = _mm256_set1_epi16(3);
    return {{_mm256_and_si256(right(all, 6, 4), low), _mm256_and_si256(right(all, 14, 12), low),
             _mm256_and_si256(right(all, 2, 0), low), _mm256_and_si256(right(all, 10, 8), low)}};
  }
  if constexpr (kBits == 3) {
    const __m256i two = repeat_16(plane[0]), one = repeat_8(plane[1]);
    const __m256i first = _mm256_srlv_epi64(one, _mm256_setr_epi64x(7, 6, 5, 4));
    const __m256i second = _mm256_srlv_epi64(one, _mm256_setr_epi64x(3, 2, 1, 0));
    return part_bytes(either(mask(right(two, 5, 3), 6), mask(first, 1)),
                      either(mask(right(_mm256_slli_epi32(two, 1), 2, 0), 6), mask(second, 1)));
  }
  const __m256i four = load_bytes(plane[0]);
  if constexpr (kBits == 4) {
    const __m256i low = _mm256_set1_epi16(15);
    return {{_mm256_and_si256(_mm256_srli_epi16(four, 4), low), _mm256_srli_epi16(four, 12),
             _mm256_and_si256(four, low), _mm256_and_si256(_mm256_srli_epi16(four, 8), low)}};
  }
  if constexpr (kBits == 5) {
    const __m256i one = repeat_8(plane[1]);
    const __m256i first = _mm256_srlv_epi64(one, _mm256_setr_epi64x(7, 6, 5, 4));
    const __m256i second = _mm256_srlv_epi64(one, _mm256_setr_epi64x(3, 2, 1, 0));
    return part_bytes(either(mask(_mm256_srli_epi16(four, 3), 30), mask(first, 1)),
                      either(mask(_mm256_slli_epi16(four, 1), 30), mask(second, 1)));
  }
  const __m256i two = repeat_16(plane[1]);
  if constexpr (kBits == 6) {
    return part_bytes(
        either(mask(_mm256_srli_epi16(four, 2), 60), mask(right(two, 6, 4), 3)),
        either(mask(_mm256_slli_epi16(four, 2), 60), mask(right(two, 2, 0), 3)));
  }
  // The lower halves of all codes, as they would lie in a second plane of 4 bits.
  const __m256i lower = either(mask(left(two, 0, 2), 0xcc),
                               mask(right(repeat_16(plane[2]), 2, 0), 0x33));
  return part_bytes(either(mask(four, 0xf0), mask(_mm256_srli_epi16(lower, 4), 15)),
                    either(mask(_mm256_slli_epi16(four, 4), 0xf0), mask(lower, 15)));
}

INLINE void store_codes(const Codes& codes, uint8_t* to) {
  for (int half = 0; half < 2; ++half) {
    const __m256i odd = _mm256_slli_epi16(codes.part[2 * half + 1], 8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + half, either(codes.part[2 * half], odd));
  }
}

INLINE void to_floats(const Codes& codes, Lanes* floats) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i even = codes.part[2 * half], odd = codes.part[2 * half + 1];
    const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
    const __m128i eight[4] = {_mm256_castsi256_si128(low), _mm256_castsi256_si128(high),
                              _mm256_extracti128_si256(low, 1), _mm256_extracti128_si256(high, 1)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      floats[4 * half + k] = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(eight[k]));
    }
  }
}

// How the codes of half a block of activations lie: int16 of even columns, then of odd ones.
constexpr int64_t kHalfStride = 64;

template <int kCodes>
INLINE QuantizedBlock quantize_block(const float* values, uint8_t* to) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 peaks = _mm256_setzero_ps(), check = _mm256_setzero_ps();
  for (int k = 0; k < kCodes; k += 8) {
    const __m256 part = _mm256_loadu_ps(values + k);
    peaks = _mm256_max_ps(peaks, _mm256_and_ps(part, magnitude));
    check = _mm256_fmadd_ps(part, _mm256_setzero_ps(), check);  // NaN of what isn't finite
  }
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(peaks), _mm256_extractf128_ps(peaks, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  const float peak = _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  const bool sound = _mm256_movemask_ps(_mm256_cmp_ps(check, check, _CMP_UNORD_Q)) == 0;
  auto* codes = reinterpret_cast<__m256i*>(to);
  if (!sound || peak < kSmallestPeak) {
    std::memset(to, 0, 2 * kCodes);
    return {sound ? 0 : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const __m256 inverse = _mm256_set1_ps(kLargestCode / peak);
  __m256i sums = _mm256_setzero_si256();
  for (int k = 0; k < kCodes; k += 32, codes += 2) {
    __m256i even[2], odd[2];
    for (int part = 0; part < 2; ++part) {
      const float* from = values + k + 16 * part;
      const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from), inverse));
      const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8), inverse));
      sums = _mm256_add_epi32(sums, _mm256_add_epi32(first, second));
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
      even[part] = _mm256_srai_epi32(_mm256_slli_epi32(packed, 16), 16);
      odd[part] = _mm256_srai_epi32(packed, 16);
    }
    _mm256_storeu_si256(codes, _mm256_permute4x64_epi64(_mm256_packs_epi32(even[0], even[1]), 0xd8));
    _mm256_storeu_si256(codes + 1,
                        _mm256_permute4x64_epi64(_mm256_packs_epi32(odd[0], odd[1]), 0xd8));
  }
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  const int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  return {peak / kLargestCode, sum};
}

template <int kScales>
INLINE void multiply_block(const Codes& codes, const uint8_t* x, const float* scales,
                           Lanes* lanes) {
  const auto* other = reinterpret_cast<const __m256i*>(x);
  __m256i half[2];
#pragma GCC unroll 2
  for (int index = 0; index < 2; ++index) {
    half[index] = _mm256_add_epi32(
        _mm256_madd_epi16(codes.part[2 * index], _mm256_load_si256(other + 2 * index)),
        _mm256_madd_epi16(codes.part[2 * index + 1], _mm256_load_si256(other + 2 * index + 1)));
  }
  if constexpr (kScales == 1) half[0] = _mm256_add_epi32(half[0], half[1]);
#pragma GCC unroll 2
  for (int part = 0; part < kScales; ++part) {
    *lanes = _mm256_fmadd_ps(_mm256_cvtepi32_ps(half[part]), _mm256_broadcast_ss(scales + part),
                             *lanes);
  }
}

// Scales or zeros of a row; or the last `left` of it, and 0 behind them. What is read there is still
// the record's: planes follow.
INLINE Lanes load_parameters(const uint16_t* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
INLINE Lanes load_parameters(const uint16_t* from, int64_t left) {
  const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(left)),
                                           _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_and_ps(_mm256_castsi256_ps(there), load_parameters(from));
}

INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm256_fmadd_ps(a, b, sum); }
INLINE Lanes multiply_add(Lanes a, float b, Lanes sum) {
  return _mm256_fmadd_ps(a, _mm256_set1_ps(b), sum);
}

INLINE Lanes load_floats(const float* from) { return _mm256_loadu_ps(from); }

INLINE void store_floats(float* to, Lanes values) { _mm256_storeu_ps(to, values); }

INLINE void total_lanes(const Lanes* four, float* totals) {
  const Lanes pairs = _mm256_hadd_ps(_mm256_hadd_ps(four[0], four[1]),
                                     _mm256_hadd_ps(four[2], four[3]));
  _mm_storeu_ps(totals,
                _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}
