// For processors with AVX-512 that multiply bytes (VNNI).
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
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,prefer-vector-width=256")
#define TIERHINTS_AVX2
#define TIERHINTS_VNNI
namespace avx512 {
#include "kernels.inl"
}  // namespace avx512
#pragma GCC pop_options

const Kernels kAvx512{"avx512", avx512::quantize, avx512::multiply, avx512::decode};

}  // namespace tierhints

#endif
