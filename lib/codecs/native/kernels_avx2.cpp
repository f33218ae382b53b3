// For processors with AVX2.
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
#pragma GCC target("avx2,fma")
#pragma GCC optimize("no-tree-slp-vectorize")  // it computes pairs of addresses in vectors
namespace avx2 {
#include "avx2.inl"
#include "kernels.inl"
#include "attention.inl"
#include "pages.inl"
}  // namespace avx2
#pragma GCC pop_options

const Kernels kAvx2{"avx2", avx2::quantize, avx2::multiply, avx2::decode, avx2::multiply_halves,
                       avx2::attend, avx2::attend_pages};

}  // namespace tierhints

#endif
