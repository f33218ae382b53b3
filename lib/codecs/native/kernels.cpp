#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace tierhints {

namespace {

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
