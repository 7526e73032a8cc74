// Attention ops: convert tensors to the parameters of a call and launch it.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "api.h"
#include "attention_call.h"
#include "attention_tiles.h"
#include "check.h"
#include "dispatch.h"
#include "launch.h"

namespace fastattn {
namespace {

// An uninitialised dense tensor of the same shape, with its outer dimensions in the same order in memory.
at::Tensor empty_like(const at::Tensor& tensor) {
  std::vector<int64_t> order(tensor.dim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end() - 1,
                   [&](int64_t a, int64_t b) { return tensor.stride(a) > tensor.stride(b); });
  std::vector<int64_t> sizes, place(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    sizes.push_back(tensor.size(order[i]));
    place[order[i]] = static_cast<int64_t>(i);
  }
  return at::empty(sizes, tensor.options()).permute(place);
}

std::tuple<at::Tensor, at::Tensor> run_forward(AttentionParams params, const at::Tensor& query,
                                               at::IntArrayRef lse_shape) {
  const c10::cuda::CUDAGuard guard(query.device());
  at::Tensor out = empty_like(query);
  at::Tensor lse = at::empty(lse_shape, query.options().dtype(at::kFloat));
  if (lse.numel() == 0) return {out, lse};
  if (params.total_k == 0) return {out.zero_(), lse.fill_(-std::numeric_limits<float>::infinity())};
  params.out = out.mutable_data_ptr();
  params.out_strides = head_strides(out);
  params.lse = lse.mutable_data_ptr<float>();
  params.lse_strides = {params.num_heads * params.total_q, params.total_q, 1};
#if FASTATTN_SM90
  const int multiprocessors = hopper_multiprocessors();
  at::Tensor counter;
  if (wants_tile_counter(params, multiprocessors)) {
    counter = at::zeros({1}, query.options().dtype(at::kInt));
    params.tile_counter = reinterpret_cast<uint32_t*>(counter.mutable_data_ptr<int32_t>());
  }
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch("attention_forward",
               dispatch_attention(query.scalar_type(), params.head_dim, [&](auto tag, auto head_dim) {
                 return launch_attention_forward<typename decltype(tag)::type, decltype(head_dim)::value>(
                     params, tensor_map_encoder(), multiprocessors, stream);
               }));
  return {out, lse};
#else
  TORCH_CHECK_NOT_IMPLEMENTED(false, "the extension is built without 9.0a, which the attention kernels need");
#endif
}

using Gradients = std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>>;

Gradients run_backward(const AttentionParams& call, const at::Tensor& dout, const at::Tensor& query,
                       const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
                       const std::optional<at::Tensor>& dlse, at::IntArrayRef lse_shape, bool query_grad,
                       bool key_grads, bool one_pass) {
  AttentionBackwardParams params = {};
  params.call = call;
  check_heads("dout", dout, query);
  check_heads("out", out, query);
  check_shape("dout", dout, query.sizes());
  check_shape("out", out, query.sizes());
  const auto check_row_values = [&](const char* name, const at::Tensor& tensor) {
    check_dtype(name, tensor, at::kFloat);
    check_same_device(name, tensor, query);
    check_shape(name, tensor, lse_shape);
    TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": needs to be contiguous");
  };
  check_row_values("lse", lse);
  if (dlse.has_value()) check_row_values("dlse", *dlse);
  const int head_dim = padded_head_dim(call.head_dim);
  TORCH_CHECK_VALUE(!one_pass || (has_one_pass(head_dim) && call.softcap == 0.0f && query_grad && key_grads),
                    "one_pass: needs a head dim of at most 128, no softcap and all gradients");

  const c10::cuda::CUDAGuard guard(query.device());
  Gradients gradients;
  auto& [dq, dk, dv] = gradients;
  const auto allocate = [](std::optional<at::Tensor>& gradient, const at::Tensor& tensor, void*& data,
                           Strides& strides) {
    gradient = empty_like(tensor);
    data = gradient->mutable_data_ptr();
    strides = head_strides(*gradient);
  };
  if (query_grad) allocate(dq, query, params.dq, params.dq_strides);
  if (key_grads) {
    allocate(dk, key, params.dk, params.dk_strides);
    allocate(dv, value, params.dv, params.dv_strides);
  }
  if (query.numel() == 0 || key.numel() == 0) {
    for (auto* gradient : {&dq, &dk, &dv}) {
      if (gradient->has_value()) (*gradient)->zero_();
    }
    return gradients;
  }

  params.dout = dout.const_data_ptr();
  params.dout_strides = head_strides(dout);
  params.call.out = const_cast<void*>(out.const_data_ptr());
  params.call.out_strides = head_strides(out);
  params.call.lse = const_cast<float*>(lse.const_data_ptr<float>());
  params.call.lse_strides = {call.num_heads * call.total_q, call.total_q, 1};
  params.dlse = dlse.has_value() ? dlse->const_data_ptr<float>() : nullptr;
  const int64_t batch_heads = call.cu_seqlens_q == nullptr ? int64_t{call.batch} * call.num_heads : call.num_heads;
  const at::Tensor rows = at::empty({2, batch_heads, query_row_blocks(call) * kRowBlock}, lse.options());
  params.lse_log2 = rows.mutable_data_ptr<float>();
  params.delta = params.lse_log2 + rows.stride(0);
  at::Tensor sums, counters;
  if (one_pass) {
    sums = at::zeros({rows.stride(0), head_dim}, rows.options());
    const int64_t semaphores = rows.stride(0) / kSemaphoreRows;
    counters = at::zeros({semaphores + 1}, rows.options().dtype(at::kInt));
    params.dq_sum = sums.mutable_data_ptr<float>();
    params.dq_semaphore = reinterpret_cast<uint32_t*>(counters.mutable_data_ptr<int32_t>());
    params.ticket = params.dq_semaphore + semaphores;
  }
#if FASTATTN_SM90
  hopper_multiprocessors();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch("attention_backward",
               dispatch_attention(query.scalar_type(), call.head_dim, [&](auto tag, auto head_dim) {
                 return launch_attention_backward<typename decltype(tag)::type, decltype(head_dim)::value>(
                     params, tensor_map_encoder(), stream);
               }));
  return gradients;
#else
  TORCH_CHECK_NOT_IMPLEMENTED(false, "the extension is built without 9.0a, which the attention kernels need");
#endif
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& query, const at::Tensor& key,
                                                     const at::Tensor& value,
                                                     const std::optional<at::Tensor>& key_lengths, bool top_left,
                                                     int64_t window_left, int64_t window_right, double softcap,
                                                     double scale, bool clusters) {
  AttentionParams params =
      dense_call(query, key, value, key_lengths, {top_left, window_left, window_right, softcap, scale});
  params.clusters = clusters;
  return run_forward(params, query, query.sizes().slice(0, 3));
}

std::tuple<at::Tensor, at::Tensor> varlen_forward(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value, const at::Tensor& cu_seqlens_q,
                                                  const at::Tensor& cu_seqlens_k, bool top_left, int64_t window_left,
                                                  int64_t window_right, double softcap, double scale) {
  const AttentionParams params =
      packed_call(query, key, value, cu_seqlens_q, cu_seqlens_k, {top_left, window_left, window_right, softcap, scale});
  return run_forward(params, query, {query.size(1), query.size(0)});
}

Gradients attention_backward(const at::Tensor& dout, const at::Tensor& query, const at::Tensor& key,
                             const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
                             const std::optional<at::Tensor>& dlse, const std::optional<at::Tensor>& key_lengths,
                             bool top_left, int64_t window_left, int64_t window_right, double softcap, double scale,
                             bool query_grad, bool key_grads, bool one_pass) {
  const AttentionParams call =
      dense_call(query, key, value, key_lengths, {top_left, window_left, window_right, softcap, scale});
  return run_backward(call, dout, query, key, value, out, lse, dlse, query.sizes().slice(0, 3), query_grad, key_grads,
                      one_pass);
}

Gradients varlen_backward(const at::Tensor& dout, const at::Tensor& query, const at::Tensor& key,
                          const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
                          const std::optional<at::Tensor>& dlse, const at::Tensor& cu_seqlens_q,
                          const at::Tensor& cu_seqlens_k, bool top_left, int64_t window_left, int64_t window_right,
                          double softcap, double scale, bool query_grad, bool key_grads, bool one_pass) {
  const AttentionParams call =
      packed_call(query, key, value, cu_seqlens_q, cu_seqlens_k, {top_left, window_left, window_right, softcap, scale});
  return run_backward(call, dout, query, key, value, out, lse, dlse, {query.size(1), query.size(0)}, query_grad,
                      key_grads, one_pass);
}

std::tuple<int, int, int, int> attention_backward_tiles(int64_t head_dim, bool softcap) {
  const int padded = padded_head_dim(static_cast<int>(head_dim));
  const TileSize keys = key_gradients_tile(padded, softcap);
  const TileSize queries = query_gradient_tile(padded, softcap);
  return {keys.queries, keys.keys, queries.queries, queries.keys};
}

int64_t attention_forward_cluster(int64_t head_dim) {
  return forward_cluster(padded_head_dim(static_cast<int>(head_dim)));
}

std::tuple<int, int> attention_forward_tile(int64_t head_dim, bool windowed, bool softcap) {
  const TileSize tile = forward_tile(padded_head_dim(static_cast<int>(head_dim)), windowed, softcap);
  return {tile.queries, tile.keys};
}

}  // namespace fastattn
