// The operator tierhints::attend on a CPU; lib/codecs/ops.py defines it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "kernels.h"

namespace tierhints {
namespace {

using at::Tensor;

// Products that a thread should have to itself: with fewer, waking another takes longer.
constexpr int64_t kGrainProducts = 1 << 17;

void check(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.dim() == 4 && tensor.scalar_type() == at::kFloat && tensor.is_cpu(), name,
              " of four dimensions, in float32, was expected");
}

Tensor in_rows(const Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : tensor.contiguous();
}

// What isn't masked of a sequence's positions, in spans; those masked at their ends are left away.
std::vector<Span> cut_spans(const Attention& of, int64_t batches) {
  std::vector<Span> spans;
  for (int64_t batch = 0; batch < batches; ++batch) {
    const float* mask = of.mask ? of.mask + batch * of.mask_batch : nullptr;
    const auto masked = [&](int64_t j) { return mask && std::isinf(mask[j]) && mask[j] < 0; };
    for (int64_t first = 0; first < of.length; first += kSpan) {
      int64_t start = first, end = std::min(first + kSpan, of.length);
      while (start < end && masked(start)) ++start;
      while (start < end && masked(end - 1)) --end;
      for (int64_t group = 0; start < end && group < of.groups; ++group) {
        spans.push_back({batch, group, start, end});
      }
    }
  }
  return spans;
}

Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value,
              const std::optional<Tensor>& mask, double scale) {
  static const Kernels* const kernels = choose_kernels();
  TORCH_CHECK(kernels, "TIERHINTS_NATIVE names instructions that this processor doesn't have");
  check(query, "query"), check(key, "key"), check(value, "value");
  const int64_t batches = query.size(0), groups = query.size(1), rows = query.size(2);
  const int64_t length = key.size(2), key_size = query.size(3), value_size = value.size(3);
  TORCH_CHECK(key.sizes() == at::IntArrayRef({batches, groups, length, key_size}) &&
                  value.sizes() == at::IntArrayRef({batches, groups, length, value_size}),
              "keys and values of shapes ", key.sizes(), " and ", value.sizes(),
              " don't fit queries of ", query.sizes());
  TORCH_CHECK(key_size % 16 == 0 && value_size % 16 == 0, "sizes of heads are multiples of 16");
  const Tensor queries = query.contiguous(), keys = in_rows(key), values = in_rows(value);
  Attention of{queries.const_data_ptr<float>(), keys.const_data_ptr<float>(),
               values.const_data_ptr<float>(), nullptr, groups, rows, length, key_size, value_size,
               keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1),
               values.stride(2), 0, static_cast<float>(scale)};
  Tensor added;
  if (mask) {
    check(*mask, "mask");
    TORCH_CHECK((mask->size(0) == 1 || mask->size(0) == batches) && mask->size(1) == 1 &&
                    mask->size(2) == 1 && mask->size(3) == length,
                "a mask of shape (batch or 1, 1, 1, length) was expected, not ", mask->sizes());
    added = in_rows(*mask);
    of.mask = added.const_data_ptr<float>();
    of.mask_batch = mask->size(0) == 1 ? 0 : added.stride(0);
  }
  const std::vector<Span> spans = cut_spans(of, batches);
  thread_local std::vector<float> memory;  // of the thread that calls
  const int64_t count = static_cast<int64_t>(spans.size());
  memory.resize(std::max<size_t>(memory.size(), count * rows * (value_size + 2)));
  float* const found = memory.data();
  auto* const partials = reinterpret_cast<Partial*>(found + count * rows * value_size);
  const int64_t products = std::min(length, kSpan) * rows * (key_size + value_size);
  at::parallel_for(0, count, std::max<int64_t>(1, kGrainProducts / std::max<int64_t>(products, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t index = begin; index < end; ++index) {
                       kernels->attend(of, spans[index], found + index * rows * value_size,
                                       partials + index * rows);
                     }
                   });
  const Tensor y = at::empty({batches, groups, rows, value_size}, at::kFloat);
  const auto place = [&](int64_t index) {
    const Span& span = spans[index / rows];
    return (span.batch * groups + span.group) * rows + index % rows;
  };
  merge_partials(found, partials, count * rows, value_size, place, y.mutable_data_ptr<float>(),
                 batches * groups * rows);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(tierhints, CPU, library) { library.impl("attend", attend); }

}  // namespace tierhints
