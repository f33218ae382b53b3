// For processors with AVX-512 that multiply bytes (VNNI).
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>

#define INLINE inline __attribute__((always_inline))
#define FORCED __attribute__((always_inline))  // of a lambda

namespace tierhints {

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,prefer-vector-width=256")
#pragma GCC optimize("no-tree-slp-vectorize")  // it computes pairs of addresses in vectors
namespace avx512 {
#include "avx512.inl"
#include "kernels.inl"
#include "attention.inl"
#include "pages.inl"
}  // namespace avx512
#pragma GCC pop_options

const Kernels kAvx512{"avx512", avx512::quantize, avx512::multiply, avx512::decode, avx512::multiply_halves,
                       avx512::attend, avx512::attend_pages};

}  // namespace tierhints

#endif
