// Softmax and cross-entropy ops: convert tensors to rows and rows to parameters, then launch.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "api.h"
#include "check.h"
#include "dispatch.h"
#include "launch.h"
#include "row_layout.h"
#include "row_plan.h"

namespace fastattn {
namespace {

cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

int64_t checked_dim(const at::Tensor& x, int64_t dim) {
  TORCH_CHECK_VALUE(dim >= 0 && dim < x.dim(), "dim: got ", dim, ", needs 0 to ", x.dim() - 1);
  return dim;
}

}  // namespace

at::Tensor softmax_forward(const at::Tensor& x, const std::optional<at::Tensor>& mask, int64_t dim, double scale,
                           bool causal, bool log, at::ScalarType dtype) {
  check_cuda("x", x);
  checked_dim(x, dim);
  TORCH_CHECK_VALUE(!causal || x.dim() >= 2, "causal: got True for shape ", x.sizes(), ", needs 2 dimensions");
  TORCH_CHECK_VALUE(!causal || dim >= x.dim() - 2, "causal: got True for dim ", dim, " of ", x.dim(),
                    ", needs one of the last two, or a mask instead");
  at::Tensor keep;
  if (mask.has_value()) {
    check_dtype("mask", *mask, at::kBool);
    check_same_device("mask", *mask, x);
    keep = mask->expand(x.sizes());
  }
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty_like(x, x.options().dtype(dtype));
  if (x.numel() == 0) {
    return out;
  }
  const int64_t rank = x.dim();
  Causal kind = Causal::kNone;
  if (causal) {
    kind = dim == rank - 1 ? Causal::kColumnsAreKeys : Causal::kColumnsAreQueries;
  }
  std::array<at::Tensor, 3> tensors = {keep.defined() ? keep : x, x, out};  // mask (if any), x, y
  for (at::Tensor& tensor : tensors) {
    tensor = tensor.movedim(dim, -1);
  }
  auto layout = row_layout(tensors, kind != Causal::kNone);
  if (!layout || layout->column_strides[1] != 1 || layout->column_strides[2] != 1) {
    tensors[0] = tensors[0].contiguous();
    tensors[1] = tensors[1].contiguous();
    tensors[2] = at::empty(tensors[2].sizes(), out.options());
    layout = row_layout(tensors, kind != Causal::kNone);
  }
  SoftmaxForward params = {};
  params.x = tensors[1].const_data_ptr();
  params.mask = keep.defined() ? static_cast<const uint8_t*>(tensors[0].const_data_ptr()) : nullptr;
  params.y = tensors[2].mutable_data_ptr();
  params.sizes = layout->sizes;
  params.x_strides = layout->strides[1];
  params.mask_strides = layout->strides[0];
  params.mask_column_stride = layout->column_strides[0];
  params.y_strides = layout->strides[2];
  params.shift = x.size(-1) - x.size(rank < 2 ? -1 : -2);
  params.scale = static_cast<float>(scale);
  params.causal = kind;
  params.log = log;
  check_launch("softmax_forward", dispatch_pair(x.scalar_type(), dtype, [&](auto in, auto result) {
                 return launch_softmax_forward<typename decltype(in)::type, typename decltype(result)::type>(
                     params, has_clusters(), current_stream());
               }));
  const at::Tensor written = tensors[2].movedim(-1, dim);
  return written.const_data_ptr() == out.const_data_ptr() ? out : out.copy_(written);
}

at::Tensor softmax_backward(const at::Tensor& dout, const at::Tensor& out, int64_t dim, double scale, bool log,
                            at::ScalarType dtype) {
  check_cuda("out", out);
  checked_dim(out, dim);
  check_same_device("dout", dout, out);
  check_shape("dout", dout, out.sizes());
  check_dtype("dout", dout, out.scalar_type());
  const c10::cuda::CUDAGuard guard(out.device());
  at::Tensor dx = at::empty_like(out, out.options().dtype(dtype));
  if (out.numel() == 0) {
    return dx;
  }
  std::array<at::Tensor, 3> tensors = {out.movedim(dim, -1), dout.movedim(dim, -1), dx.movedim(dim, -1)};
  auto layout = row_layout(tensors, false);
  if (!layout || layout->column_strides != std::array<int64_t, 3>{1, 1, 1}) {
    tensors[0] = tensors[0].contiguous();
    tensors[1] = tensors[1].contiguous();
    tensors[2] = at::empty(tensors[2].sizes(), dx.options());
    layout = row_layout(tensors, false);
  }
  SoftmaxBackward params = {};
  params.y = tensors[0].const_data_ptr();
  params.dy = tensors[1].const_data_ptr();
  params.dx = tensors[2].mutable_data_ptr();
  params.sizes = layout->sizes;
  params.y_strides = layout->strides[0];
  params.dy_strides = layout->strides[1];
  params.dx_strides = layout->strides[2];
  params.scale = static_cast<float>(scale);
  params.log = log;
  check_launch("softmax_backward", dispatch_pair(dtype, out.scalar_type(), [&](auto grad, auto result) {
                 return launch_softmax_backward<typename decltype(result)::type, typename decltype(grad)::type>(
                     params, has_clusters(), current_stream());
               }));
  const at::Tensor written = tensors[2].movedim(-1, dim);
  return written.const_data_ptr() == dx.const_data_ptr() ? dx : dx.copy_(written);
}

namespace {

// Logits (rows, classes) with adjacent classes, and one int64 target each.
void check_logits(const at::Tensor& logits, const at::Tensor& target) {
  check_cuda("logits", logits);
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0, "logits: got shape ", logits.sizes(),
                    ", needs (rows, classes) with at least one class");
  TORCH_CHECK_VALUE(logits.size(1) == 1 || logits.stride(1) == 1, "logits: got strides ", logits.strides(),
                    ", needs adjacent classes");
  check_dtype("target", target, at::kLong);
  check_same_device("target", target, logits);
  check_shape("target", target, {logits.size(0)});
  TORCH_CHECK_VALUE(target.is_contiguous(), "target: needs to be contiguous");
}

// Sets the class weights of a launch, if there are any; returns their mean, which the kernel reads.
template <class Params>
at::Tensor set_class_weight(Params& params, const std::optional<at::Tensor>& class_weight, const at::Tensor& logits) {
  if (!class_weight.has_value()) {
    return {};
  }
  check_dtype("class_weight", *class_weight, at::kFloat);
  check_same_device("class_weight", *class_weight, logits);
  check_shape("class_weight", *class_weight, {logits.size(1)});
  TORCH_CHECK_VALUE(class_weight->is_contiguous(), "class_weight: needs to be contiguous");
  at::Tensor mean = class_weight->mean();
  params.class_weight = class_weight->const_data_ptr<float>();
  params.weight_mean = mean.const_data_ptr<float>();
  return mean;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> cross_entropy_forward(const at::Tensor& logits, const at::Tensor& target,
                                                         int64_t ignore_index, double label_smoothing,
                                                         const std::optional<at::Tensor>& class_weight, double z_loss) {
  check_logits(logits, target);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto options = logits.options().dtype(at::kFloat);
  at::Tensor losses = at::empty({logits.size(0)}, options);
  at::Tensor norms = at::empty({logits.size(0), 2}, options);
  CrossEntropyForward params = {};
  params.logits = logits.const_data_ptr();
  params.target = target.const_data_ptr<int64_t>();
  params.losses = losses.mutable_data_ptr<float>();
  params.norms = norms.mutable_data_ptr<float>();
  params.rows = logits.size(0);
  params.classes = logits.size(1);
  params.row_stride = logits.stride(0);
  params.ignore_index = ignore_index;
  params.smoothing = static_cast<float>(label_smoothing);
  const at::Tensor weight_mean = set_class_weight(params, class_weight, logits);
  params.z_loss = static_cast<float>(z_loss);
  check_launch("cross_entropy_forward", dispatch_dtype("logits", logits.scalar_type(), [&](auto tag) {
                 return launch_cross_entropy_forward<typename decltype(tag)::type>(params, current_stream());
               }));
  return {losses, norms};
}

at::Tensor cross_entropy_backward(const at::Tensor& dlosses, const at::Tensor& norms, const at::Tensor& logits,
                                  const at::Tensor& target, int64_t ignore_index, double label_smoothing,
                                  const std::optional<at::Tensor>& class_weight, double z_loss,
                                  const std::optional<at::Tensor>& out) {
  check_logits(logits, target);
  const int64_t rows = logits.size(0);
  for (const auto& [name, tensor] : {std::pair{"dlosses", dlosses}, std::pair{"norms", norms}}) {
    check_dtype(name, tensor, at::kFloat);
    check_same_device(name, tensor, logits);
    TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": needs to be contiguous");
  }
  check_shape("dlosses", dlosses, {rows});
  check_shape("norms", norms, {rows, 2});
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor dlogits = out.has_value() ? *out : at::empty(logits.sizes(), logits.options());
  check_dtype("out", dlogits, logits.scalar_type());
  check_same_device("out", dlogits, logits);
  check_shape("out", dlogits, logits.sizes());
  TORCH_CHECK_VALUE(dlogits.size(1) == 1 || dlogits.stride(1) == 1, "out: needs adjacent classes");
  CrossEntropyBackward params = {};
  params.logits = logits.const_data_ptr();
  params.target = target.const_data_ptr<int64_t>();
  params.dlosses = dlosses.const_data_ptr<float>();
  params.norms = norms.const_data_ptr<float>();
  params.dlogits = dlogits.mutable_data_ptr();
  params.rows = rows;
  params.classes = logits.size(1);
  params.row_stride = logits.stride(0);
  params.dlogits_row_stride = dlogits.stride(0);
  params.ignore_index = ignore_index;
  params.smoothing = static_cast<float>(label_smoothing);
  const at::Tensor weight_mean = set_class_weight(params, class_weight, logits);
  params.z_loss = static_cast<float>(z_loss);
  check_launch("cross_entropy_backward", dispatch_dtype("logits", logits.scalar_type(), [&](auto tag) {
                 return launch_cross_entropy_backward<typename decltype(tag)::type>(params, current_stream());
               }));
  return dlogits;
}

std::tuple<int, int, int, int> softmax_plan(int64_t columns, int64_t element_size, bool backward, bool clusters) {
  const RowPlan plan = backward || element_size != 2 ? plan_for(kWidePlans, columns, clusters)
                                                     : plan_for(kNarrowPlans, columns, clusters);
  return {plan.elements, plan.lanes(), plan.warps(), plan.blocks()};
}

}  // namespace fastattn
