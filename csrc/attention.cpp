// Attention: tensors become the parameters of a call, these a launch.
#include <ATen/ops/empty.h>
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

// An uninitialised dense tensor of the query's shape whose outer dimensions lie in memory in the order of the query's.
at::Tensor empty_like_query(const at::Tensor& query) {
  std::vector<int64_t> order(query.dim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end() - 1,
                   [&](int64_t a, int64_t b) { return query.stride(a) > query.stride(b); });
  std::vector<int64_t> sizes, place(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    sizes.push_back(query.size(order[i]));
    place[order[i]] = static_cast<int64_t>(i);
  }
  return at::empty(sizes, query.options()).permute(place);
}

std::tuple<at::Tensor, at::Tensor> run_forward(AttentionParams params, const at::Tensor& query, at::IntArrayRef lse_shape) {
  const c10::cuda::CUDAGuard guard(query.device());
  at::Tensor out = empty_like_query(query);
  at::Tensor lse = at::empty(lse_shape, query.options().dtype(at::kFloat));
  if (lse.numel() == 0) return {out, lse};
  if (params.total_k == 0) return {out.zero_(), lse.fill_(-std::numeric_limits<float>::infinity())};
  params.out = out.mutable_data_ptr();
  params.out_strides = head_strides(out);
  params.lse = lse.mutable_data_ptr<float>();
  params.lse_strides = {params.num_heads * params.total_q, params.total_q, 1};
#if FASTATTN_SM90
  const int multiprocessors = hopper_multiprocessors();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  check_launch("attention_forward", dispatch_attention(query.scalar_type(), params.head_dim, [&](auto tag, auto head_dim) {
                 return launch_attention_forward<typename decltype(tag)::type, decltype(head_dim)::value>(
                     params, tensor_map_encoder(), multiprocessors, stream);
               }));
  return {out, lse};
#else
  TORCH_CHECK_NOT_IMPLEMENTED(false, "the extension is built without 9.0a, which the attention kernels need");
#endif
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& query, const at::Tensor& key,
                                                     const at::Tensor& value,
                                                     const std::optional<at::Tensor>& key_lengths, bool top_left,
                                                     int64_t window_left, int64_t window_right, double softcap,
                                                     double scale) {
  const AttentionParams params =
      dense_call(query, key, value, key_lengths, {top_left, window_left, window_right, softcap, scale});
  return run_forward(params, query, query.sizes().slice(0, 3));
}

std::tuple<at::Tensor, at::Tensor> varlen_forward(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value, const at::Tensor& cu_seqlens_q,
                                                  const at::Tensor& cu_seqlens_k, bool top_left, int64_t window_left,
                                                  int64_t window_right, double softcap, double scale) {
  const AttentionParams params = packed_call(query, key, value, cu_seqlens_q, cu_seqlens_k,
                                             {top_left, window_left, window_right, softcap, scale});
  return run_forward(params, query, {query.size(1), query.size(0)});
}

std::tuple<int, int> attention_forward_tile(int64_t head_dim, bool windowed, bool softcap) {
  const TileSize tile = forward_tile(padded_head_dim(static_cast<int>(head_dim)), windowed, softcap);
  return {tile.queries, tile.keys};
}

}  // namespace fastattn
