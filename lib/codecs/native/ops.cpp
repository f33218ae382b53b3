// The operators of namespace tierhints on a CPU; lib/codecs/ops.py defines them.

#include <ATen/DimVector.h>
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels.h"

namespace tierhints {
namespace {

using at::Tensor;

const Kernels* kernels = choose_kernels();

// Rows of activations up to which products are made from codes; above, weights are expanded.
constexpr int64_t kFewRows = 32;

Record open_record(const Tensor& record, const Layout& layout) {
  TORCH_CHECK(kernels, "TIERHINTS_NATIVE names instructions that this processor doesn't have");
  TORCH_CHECK(record.scalar_type() == at::kByte && record.is_contiguous() && record.is_cpu() &&
                  record.numel() >= layout.num_bytes && layout.num_planes > 0,
              "a record of ", layout.num_bytes, " bytes was expected, in one piece");
  return {layout, record.const_data_ptr<uint8_t>()};
}

int64_t grain_of(const Layout& layout, int64_t weights = kGrainWeights) {
  return std::max<int64_t>(1, weights / layout.padded_cols);
}

uint8_t* align(uint8_t* start) {
  return start + (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64;
}

uint8_t* working_memory(const Layout& layout) {
  thread_local std::vector<uint8_t> memory;
  const int64_t needed = working_bytes(layout) + 64;
  if (static_cast<int64_t>(memory.size()) < needed) memory.resize(needed);
  return align(memory.data());
}

Activations make_activations(const float* x, int64_t rows, const Layout& layout) {
  Activations to(layout, rows);
  thread_local std::vector<uint8_t> memory;  // of the thread that calls, which outlives the product
  const int64_t needed = to.num_bytes() + 64;
  if (static_cast<int64_t>(memory.size()) < needed) memory.resize(needed);
  to.use(align(memory.data()));
  at::parallel_for(0, to.num_tiles, grain_of(layout), [&](int64_t begin, int64_t end) {
    kernels->quantize(x, layout, &to, begin, end);
  });
  return to;
}

void decode_rows(const Record& record, int64_t start, int64_t end, float* out) {
  const Layout& layout = record.layout;
  at::parallel_for(start, end, grain_of(layout), [&](int64_t first, int64_t last) {
    uint8_t* working = working_memory(layout);
    for (int64_t row = first; row < last; ++row) {
      kernels->decode(record, row, out + (row - start) * layout.cols, working);
    }
  });
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Many rows of activations: a share of the weights is expanded in cache, and multiplied by a gemm.
void multiply_expanded(const Record& record, const Tensor& x, Tensor y, int64_t scratch_bytes) {
  const Layout& layout = record.layout;
  const bool halves = x.scalar_type() == at::kBFloat16 && multiplies_bfloat16();
  const auto dtype = halves ? at::kBFloat16 : at::kFloat;
  const int64_t row_bytes = layout.cols * (dtype == at::kFloat ? 4 : 6);
  const int64_t step = std::clamp<int64_t>(scratch_bytes / row_bytes, 1, layout.rows);
  const Tensor tile = at::empty({step, layout.cols}, at::kFloat);
  const Tensor activations = x.to(dtype);
  for (int64_t start = 0; start < layout.rows; start += step) {
    const int64_t end = std::min(start + step, layout.rows);
    decode_rows(record, start, end, tile.mutable_data_ptr<float>());
    const Tensor weights = tile.narrow(0, 0, end - start).to(dtype);
    y.narrow(1, start, end - start).copy_(at::mm(activations, weights.t()));
  }
}

// One matrix of several with the same layout but for their rows, and where its share of the rows of
// outputs begins.
struct Part {
  Record record;
  Tensor bias;  // float and contiguous; or undefined
  int64_t start;
};

// Rows of x times the rows of all parts, which follow each other in the last dimension of what is
// returned.
Tensor multiply_parts(const Tensor& x, const std::vector<Part>& parts, int64_t scratch_bytes) {
  const Layout& layout = parts[0].record.layout;
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == layout.cols, "activations of ", layout.cols,
              " columns were expected, not of shape ", x.sizes());
  const int64_t rows = parts.back().start + parts.back().record.layout.rows;
  const int64_t count = layout.cols ? x.numel() / layout.cols : 0;
  at::DimVector shape(x.sizes());
  shape.back() = rows;
  Tensor y = at::empty(shape, at::kFloat);
  if (count > kFewRows) {
    const Tensor flat = x.reshape({count, layout.cols}), out = y.view({count, rows});
    for (const Part& part : parts) {
      const Tensor share = out.narrow(1, part.start, part.record.layout.rows);
      multiply_expanded(part.record, flat, share, scratch_bytes);
      if (part.bias.defined()) share.add_(part.bias);
    }
  } else if (count > 0) {
    const Tensor floats = x.to(at::kFloat).contiguous();
    const Activations activations = make_activations(floats.const_data_ptr<float>(), count, layout);
    float* out = y.mutable_data_ptr<float>();
    const int64_t grain = grain_of(layout, std::max<int64_t>(1, kGrainWeights / count));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      uint8_t* working = working_memory(layout);
      for (const Part& part : parts) {
        const int64_t first = std::max<int64_t>(begin - part.start, 0);
        const int64_t last = std::min(end - part.start, part.record.layout.rows);
        const float* bias = part.bias.defined() ? part.bias.const_data_ptr<float>() : nullptr;
        if (first >= last) continue;
        kernels->multiply(part.record, activations, bias, out + part.start, rows, first, last,
                          working);
      }
    });
  }
  return x.scalar_type() == at::kFloat ? y : y.to(x.scalar_type());
}

// A bias in float32, or null.
Tensor open_bias(const std::optional<Tensor>& bias, int64_t rows) {
  if (!bias) return Tensor();
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == rows && bias->is_cpu(), "a bias of ", rows,
              " elements was expected, not of shape ", bias->sizes());
  return bias->to(at::kFloat).contiguous();
}

Part make_part(const Tensor& record, const std::optional<Tensor>& bias, const Layout& layout,
               int64_t start) {
  return {open_record(record, layout), open_bias(bias, layout.rows), start};
}

Tensor linear(const Tensor& x, const Tensor& record, const std::optional<Tensor>& bias,
              int64_t rows, int64_t cols, int64_t group_size, int64_t stored_bits, int64_t bits,
              int64_t scratch_bytes) {
  const Layout layout(rows, cols, group_size, stored_bits, bits);
  return multiply_parts(x, {make_part(record, bias, layout, 0)}, scratch_bytes);
}

Tensor linears(const Tensor& x, at::TensorList records,
               const c10::List<std::optional<Tensor>>& biases, at::IntArrayRef rows, int64_t cols,
               int64_t group_size, int64_t stored_bits, int64_t bits, int64_t scratch_bytes) {
  TORCH_CHECK(!records.empty() && biases.size() == records.size() && rows.size() == records.size(),
              "as many records as biases and rows were expected, one at least");
  std::vector<Part> parts;
  int64_t start = 0;
  for (size_t index = 0; index < records.size(); start += rows[index++]) {
    const Layout layout(rows[index], cols, group_size, stored_bits, bits);
    parts.push_back(make_part(records[index], biases.get(index), layout, start));
  }
  return multiply_parts(x, parts, scratch_bytes);
}

// Weights as they are, a few rows of activations: torch's own product converts all of them first.
Tensor linear_bf16(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(kernels, "TIERHINTS_NATIVE names instructions that this processor doesn't have");
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() &&
                  weight.is_cpu(),
              "a matrix of bfloat16 in one piece was expected");
  TORCH_CHECK(x.dim() > 0 && x.size(-1) == weight.size(1), "activations of ", weight.size(1),
              " columns were expected, not of shape ", x.sizes());
  const Tensor floats = x.to(at::kFloat).contiguous();
  const Tensor added = open_bias(bias, weight.size(0));
  at::DimVector shape(x.sizes());
  shape.back() = weight.size(0);
  Tensor y = at::empty(shape, at::kFloat);
  const int64_t rows = weight.size(0), cols = weight.size(1);
  if (y.numel() > 0 && cols > 0) {
    const Halves of{static_cast<const uint16_t*>(weight.const_data_ptr()),
                    floats.const_data_ptr<float>(),
                    bias ? added.const_data_ptr<float>() : nullptr, rows, cols, x.numel() / cols};
    float* out = y.mutable_data_ptr<float>();
    const int64_t grain = std::max<int64_t>(1, kGrainWeights / (cols * of.x_rows));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      kernels->multiply_halves(of, out, begin, end);
    });
  }
  return x.scalar_type() == at::kFloat ? y : y.to(x.scalar_type());
}

Tensor decode(const Tensor& record, int64_t rows, int64_t cols, int64_t group_size,
              int64_t stored_bits, int64_t bits, int64_t start, int64_t end,
              at::ScalarType dtype) {
  const Layout layout(rows, cols, group_size, stored_bits, bits);
  const Record source = open_record(record, layout);
  TORCH_CHECK_INDEX(0 <= start && start <= end && end <= rows, "rows ", start, " to ", end,
                    " are outside 0 to ", rows);
  const Tensor out = at::empty({end - start, cols}, at::kFloat);
  decode_rows(source, start, end, out.mutable_data_ptr<float>());
  return out.to(dtype);
}

Tensor look_up(const Tensor& ids, const Tensor& record, int64_t rows, int64_t cols,
               int64_t group_size, int64_t stored_bits, int64_t bits, at::ScalarType dtype) {
  const Layout layout(rows, cols, group_size, stored_bits, bits);
  const Record source = open_record(record, layout);
  const Tensor flat = ids.reshape({-1}).to(at::kLong).contiguous();
  const int64_t* numbers = flat.const_data_ptr<int64_t>();
  for (int64_t index = 0; index < flat.numel(); ++index) {
    TORCH_CHECK_INDEX(0 <= numbers[index] && numbers[index] < rows, "index out of range in self");
  }
  auto shape = ids.sizes().vec();
  shape.push_back(cols);
  const Tensor out = at::empty({flat.numel(), cols}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, flat.numel(), grain_of(layout), [&](int64_t begin, int64_t end) {
    uint8_t* working = working_memory(layout);
    for (int64_t index = begin; index < end; ++index) {
      kernels->decode(source, numbers[index], to + index * cols, working);
    }
  });
  return out.view(shape).to(dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(tierhints, CPU, library) {
  library.impl("linear", linear);
  library.impl("linears", linears);
  library.impl("linear_bf16", linear_bf16);
  library.impl("decode", decode);
  library.impl("rows", look_up);
}

}  // namespace tierhints
