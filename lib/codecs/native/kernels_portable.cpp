// What any processor runs.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#define INLINE inline __attribute__((always_inline))
#define FORCED __attribute__((always_inline))  // of a lambda

namespace tierhints {

#pragma GCC push_options
#pragma GCC optimize("no-tree-slp-vectorize")  // it computes pairs of addresses in vectors
namespace portable {
#include "portable.inl"
#include "kernels.inl"
#include "attention.inl"
}  // namespace portable
#pragma GCC pop_options

const Kernels kPortable{"portable", portable::quantize, portable::multiply, portable::decode, portable::multiply_halves,
                       portable::attend};

}  // namespace tierhints
