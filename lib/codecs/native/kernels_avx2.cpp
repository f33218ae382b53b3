// For processors with AVX2.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>

namespace tierhints {

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define TIERHINTS_AVX2
namespace avx2 {
#include "kernels.inl"
}  // namespace avx2
#pragma GCC pop_options

const Kernels kAvx2{"avx2", avx2::quantize, avx2::multiply, avx2::decode};

}  // namespace tierhints

#endif
