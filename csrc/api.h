// The ops of the extension: each checks its arguments, allocates its results and launches on the current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastattn {

at::Tensor softmax_forward(const at::Tensor& x, const std::optional<at::Tensor>& mask, int64_t dim, double scale,
                           bool causal, bool log, at::ScalarType dtype);

at::Tensor softmax_backward(const at::Tensor& dout, const at::Tensor& out, int64_t dim, double scale, bool log,
                            at::ScalarType dtype);

std::tuple<at::Tensor, at::Tensor> cross_entropy_forward(const at::Tensor& logits, const at::Tensor& target,
                                                         int64_t ignore_index, double label_smoothing);

at::Tensor cross_entropy_backward(const at::Tensor& dlosses, const at::Tensor& norms, const at::Tensor& logits,
                                  const at::Tensor& target, int64_t ignore_index, double label_smoothing,
                                  const std::optional<at::Tensor>& out);

// (elements, lanes, warps, blocks) of a row: see RowPlan.
std::tuple<int, int, int, int> softmax_plan(int64_t columns, int64_t element_size, bool backward, bool clusters);

}  // namespace fastattn
