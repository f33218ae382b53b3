// What any processor runs.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace tierhints {

namespace portable {
#include "kernels.inl"
}  // namespace portable

const Kernels kPortable{"portable", portable::quantize, portable::multiply, portable::decode};

}  // namespace tierhints
