// What any processor runs.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#define INLINE inline __attribute__((always_inline))
#define FORCED __attribute__((always_inline))  // of a lambda

namespace tierhints {

#pragma GCC push_options
#pragma GCC optimize("no-tree-slp-vectorize")  // it computes pairs of addresses in vectors
namespace portable {
#include "portable.inl"
#include "kernels.inl"
#include "attention.inl"
#include "pages.inl"
}  // namespace portable
#pragma GCC pop_options

const Kernels kPortable{"portable", portable::quantize, portable::multiply, portable::decode, portable::multiply_halves,
                       portable::attend, portable::attend_pages};

}  // namespace tierhints
