// The operator tierhints::encode_rows, which records.py calls: writes some rows' sections of a
// record, from row `first` on. Returns the first row that can't be encoded, or -1.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "record.h"

namespace tierhints {
namespace {

// Weights as they lie in memory.
struct BFloat16Bits {
  uint16_t bits;
};
struct Float16Bits {
  uint16_t bits;
};

// A record to write.
struct EncodeTarget {
  Layout layout;
  uint8_t* data;

  uint16_t* scales(int64_t row) const { return parameters(layout.scales_offset, row); }
  uint16_t* zeros(int64_t row) const { return parameters(layout.zeros_offset, row); }
  uint8_t* plane(int index, int64_t row) const {
    if (index >= layout.num_planes) return nullptr;
    return data + layout.plane_offset[index] + row * layout.row_bytes[index];
  }

 private:
  uint16_t* parameters(int64_t offset, int64_t row) const {
    return reinterpret_cast<uint16_t*>(data + offset) + row * layout.num_groups;
  }
};

// What one thread works in, for one row.
struct EncodeScratch {
  float* values;         // cols
  int32_t *lows, *highs;  // of each group
  uint8_t* codes;        // padded_cols, 0 beyond cols
};

// Nobody looks at floating-point exceptions: without this, loops that choose between two results
// would compute one at a time.
#pragma GCC push_options
#pragma GCC optimize("no-trapping-math")

namespace portable {
#include "encode.inl"
}  // namespace portable

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#include "encode.inl"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl,prefer-vector-width=256")
namespace avx512 {
#include "encode.inl"
}  // namespace avx512
#pragma GCC pop_options

#endif

#pragma GCC pop_options

template <typename Weight>
int64_t encode(const Weight* weights, int64_t first, int64_t count, const EncodeTarget& target) {
  static const Kernels* const kernels = choose_kernels();
  const std::string_view set = kernels ? kernels->name : "portable";
  const Layout& layout = target.layout;
  std::vector<float> values(layout.cols);
  std::vector<int32_t> ends(2 * layout.num_groups);
  std::vector<uint8_t> codes(layout.padded_cols);
  const EncodeScratch scratch{values.data(), ends.data(), ends.data() + layout.num_groups,
                              codes.data()};
#if defined(__x86_64__)
  if (set == "avx512") return avx512::encode(weights, first, count, target, scratch);
  if (set == "avx2") return avx2::encode(weights, first, count, target, scratch);
#endif
  return portable::encode(weights, first, count, target, scratch);
}

template <typename Weight>
int64_t encode_in_parallel(const void* data, int64_t first, int64_t count,
                           const EncodeTarget& target) {
  const auto* weights = static_cast<const Weight*>(data);
  const int64_t cols = target.layout.cols, none = target.layout.rows;
  std::atomic<int64_t> bad{none};
  at::parallel_for(
      0, count, std::max<int64_t>(1, kGrainWeights / cols), [&](int64_t begin, int64_t end) {
        const int64_t row = encode(weights + begin * cols, first + begin, end - begin, target);
        int64_t before = bad.load();
        while (row >= 0 && row < before && !bad.compare_exchange_weak(before, row)) {
        }
      });
  return bad == none ? -1 : bad.load();
}

int64_t encode_rows(const at::Tensor& weights, const at::Tensor& record, int64_t first,
                    int64_t rows, int64_t cols, int64_t group_size, int64_t bits) {
  const Layout layout(rows, cols, group_size, bits, bits);
  TORCH_CHECK(record.scalar_type() == at::kByte && record.is_contiguous() &&
                  record.numel() >= layout.num_bytes && layout.num_planes > 0,
              "a record of ", layout.num_bytes, " bytes was expected, in one piece");
  TORCH_CHECK(weights.dim() == 2 && weights.size(1) == cols && first >= 0 &&
                  first + weights.size(0) <= rows,
              "rows of ", cols, " weights were expected, not of shape ", weights.sizes());
  const at::Tensor dense = weights.contiguous();
  const EncodeTarget target{layout, record.mutable_data_ptr<uint8_t>()};
  const int64_t count = dense.size(0);
  switch (dense.scalar_type()) {
    case at::kFloat:
      return encode_in_parallel<float>(dense.const_data_ptr(), first, count, target);
    case at::kBFloat16:
      return encode_in_parallel<BFloat16Bits>(dense.const_data_ptr(), first, count, target);
    case at::kHalf:
      return encode_in_parallel<Float16Bits>(dense.const_data_ptr(), first, count, target);
    default:
      TORCH_CHECK(false, "weights of float32, bfloat16 or float16 were expected, not of ",
                  dense.scalar_type());
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tierhints, library) {
  library.def(
      "encode_rows(Tensor weights, Tensor(a!) record, int first, int rows, int cols, "
      "int group_size, int bits) -> int");
}

TORCH_LIBRARY_IMPL(tierhints, CPU, library) { library.impl("encode_rows", encode_rows); }

}  // namespace tierhints
