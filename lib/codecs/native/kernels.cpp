#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tierhints {

constexpr int64_t kAheadBytes = 4096;  // two hundred nanoseconds
constexpr float kLargestCode = 32512;  // 127 * 256: VNNI takes it as two signed bytes
constexpr float kSmallestPeak = 1e-30f;  // of a block of activations: smaller ones are 0

namespace portable {
#include "kernels.inl"
}  // namespace portable

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define TIERHINTS_AVX2
namespace avx2 {
#include "kernels.inl"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni,prefer-vector-width=256")
#define TIERHINTS_VNNI
namespace avx512 {
#include "kernels.inl"
}  // namespace avx512
#pragma GCC pop_options

#endif

namespace {

const Kernels kPortable{"portable", portable::quantize, portable::multiply, portable::decode};
#if defined(__x86_64__)
const Kernels kAvx2{"avx2", avx2::quantize, avx2::multiply, avx2::decode};
const Kernels kAvx512{"avx512", avx512::quantize, avx512::multiply, avx512::decode};
#endif

bool allowed(const char* name, const char* which) {
  return !name || !*name || !std::strcmp(name, which);
}

}  // namespace

const Kernels* choose_kernels() {
  const char* name = std::getenv("TIERHINTS_NATIVE");
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_vnni = has_avx2 && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vnni");
  if (has_vnni && allowed(name, "avx512")) return &kAvx512;
  if (has_avx2 && allowed(name, "avx2")) return &kAvx2;
#endif
  return allowed(name, "portable") ? &kPortable : nullptr;
}

}  // namespace tierhints
