// The ops of the extension: each checks its arguments, allocates its results and launches on the current stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastattn {

// Returns (out, lse) of (B, H, Sq, D) tensors. A window side of -1 is unbounded; a softcap of 0 disables it. `clusters`
// allows the blocks of a thread block cluster to load keys and values for each other, which does not change any bit of
// the result. It takes effect at head dims 65 to 128 when every query sees every key and clusters need no more rounds
// of tiles.
std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& query, const at::Tensor& key,
                                                     const at::Tensor& value,
                                                     const std::optional<at::Tensor>& key_lengths, bool top_left,
                                                     int64_t window_left, int64_t window_right, double softcap,
                                                     double scale, bool clusters);

// (out (T, H, D), lse (H, T)) of packed sequences.
std::tuple<at::Tensor, at::Tensor> varlen_forward(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value, const at::Tensor& cu_seqlens_q,
                                                  const at::Tensor& cu_seqlens_k, bool top_left, int64_t window_left,
                                                  int64_t window_right, double softcap, double scale);

// Returns (dq, dk, dv) of (B, H, S, D) tensors, given the forward's out and lse and their gradients. dq is computed
// only with query_grad, dk and dv only with key_grads. one_pass: five matrix products instead of seven, with dq summed
// in a fixed order; for head dims of at most 128 without softcap, and only when all gradients are computed.
std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>> attention_backward(
    const at::Tensor& dout, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& lse, const std::optional<at::Tensor>& dlse,
    const std::optional<at::Tensor>& key_lengths, bool top_left, int64_t window_left, int64_t window_right,
    double softcap, double scale, bool query_grad, bool key_grads, bool one_pass);

// The same of packed sequences.
std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>> varlen_backward(
    const at::Tensor& dout, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& lse, const std::optional<at::Tensor>& dlse, const at::Tensor& cu_seqlens_q,
    const at::Tensor& cu_seqlens_k, bool top_left, int64_t window_left, int64_t window_right, double softcap,
    double scale, bool query_grad, bool key_grads, bool one_pass);

// Cluster size, in blocks, of the forward calls that use clusters; 1 if no call does.
int64_t attention_forward_cluster(int64_t head_dim);

// (queries, keys) of the forward's tiles.
std::tuple<int, int> attention_forward_tile(int64_t head_dim, bool windowed, bool softcap);

// (queries, keys) of the tiles of the pass over keys, then of that over queries.
std::tuple<int, int, int, int> attention_backward_tiles(int64_t head_dim, bool softcap);

at::Tensor softmax_forward(const at::Tensor& x, const std::optional<at::Tensor>& mask, int64_t dim, double scale,
                           bool causal, bool log, at::ScalarType dtype);

at::Tensor softmax_backward(const at::Tensor& dout, const at::Tensor& out, int64_t dim, double scale, bool log,
                            at::ScalarType dtype);

std::tuple<at::Tensor, at::Tensor> cross_entropy_forward(const at::Tensor& logits, const at::Tensor& target,
                                                         int64_t ignore_index, double label_smoothing,
                                                         const std::optional<at::Tensor>& class_weight, double z_loss);

at::Tensor cross_entropy_backward(const at::Tensor& dlosses, const at::Tensor& norms, const at::Tensor& logits,
                                  const at::Tensor& target, int64_t ignore_index, double label_smoothing,
                                  const std::optional<at::Tensor>& class_weight, double z_loss,
                                  const std::optional<at::Tensor>& out);

// (elements, lanes, warps, blocks) of a row: see RowPlan.
std::tuple<int, int, int, int> softmax_plan(int64_t columns, int64_t element_size, bool backward, bool clusters);

}  // namespace fastattn
