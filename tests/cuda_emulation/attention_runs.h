// The attention launches as the emulation runs them, and the parameters that entry points get as arrays.
#pragma once

#include "emulator_test.h"
#include "kernels/attention_bwd_launch.cuh"
#include "kernels/attention_fwd_launch.cuh"

namespace fastattn {

// Blocks to a cluster of a shape's kernel.
template <class Shape, class = void>
constexpr int kClusterOf = 1;
template <class Shape>
constexpr int kClusterOf<Shape, std::void_t<decltype(Shape::kCluster)>> = Shape::kCluster;

template <class Shape>
emulator::Launch blocks_of(int64_t blocks) {
  return {.grid = {static_cast<unsigned>(blocks), 1, 1},
          .threads = Shape::kThreads,
          .shared_bytes = Shape::kSharedBytes,
          .max_shared_bytes = Shape::kSharedBytes,
          .cluster = kClusterOf<Shape>,
          .min_blocks = Shape::kMinBlocks};
}

template <class Element, int kHeadDim>
cudaError_t emulate_forward(const AttentionParams& params, TensorMapEncoder encode, bool in_clusters, int64_t blocks) {
  return with_forward_shape<Element, kHeadDim>(params, in_clusters, [&](auto shape) {
    using Shape = decltype(shape);
    ForwardMaps maps;
    if (encode_forward_maps<Shape>(encode, params, &maps) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    emulator::launch(emulator::options, blocks_of<Shape>(blocks), attention_fwd_sm90<Shape>, maps, params,
                     forward_schedule<Shape>(params));
    return cudaSuccess;
  });
}

template <class Element, int kHeadDim>
cudaError_t emulate_backward(const AttentionBackwardParams& params, TensorMapEncoder encode) {
  const emulator::Launch rows{.grid = {static_cast<unsigned>(row_pass_blocks(params.call)), 1, 1},
                              .threads = kRowPassThreads};
  emulator::launch(emulator::options, rows, attention_bwd_rows_kernel<Element, kRowThreads<kHeadDim>>, params);
  const auto pass = [&](auto shape, auto kernel, const auto& schedule) {
    using Shape = decltype(shape);
    BackwardMaps maps;
    if (encode_backward_maps<Shape>(encode, params, &maps) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    emulator::launch(emulator::options, blocks_of<Shape>(schedule.num_tiles), kernel, params, maps, schedule);
    return cudaSuccess;
  };
  if constexpr (has_one_pass(kHeadDim)) {
    if (params.dq_sum != nullptr) {
      return run_one_pass<cudaError_t, Element, kHeadDim>(
          params,
          [&](auto shape, const OnePassSchedule& schedule) {
            return pass(shape, attention_bwd_fused_kernel<decltype(shape)>, schedule);
          },
          [&](auto shape) {
            using Shape = decltype(shape);
            const emulator::Launch launch{.grid = {static_cast<unsigned>(finish_blocks<Shape>(params.call)), 1, 1},
                                          .threads = kFinishWarpgroups<Shape> * kWarpgroupThreads,
                                          .shared_bytes = kFinishSharedBytes<Shape>};
            emulator::launch(emulator::options, launch, attention_bwd_finish_kernel<Shape>, params);
            return cudaSuccess;
          });
    }
  }
  const auto key_pass = [&](auto shape, const TileSchedule& schedule) {
    return pass(shape, key_pass_kernel(shape), schedule);
  };
  const auto query_pass = [&](auto shape, const TileSchedule& schedule) {
    return pass(shape, attention_bwd_dq_kernel<decltype(shape)>, schedule);
  };
  return params.call.softcap != 0.0f
             ? run_gradient_passes<cudaError_t, Element, kHeadDim, true>(params, key_pass, query_pass)
             : run_gradient_passes<cudaError_t, Element, kHeadDim, false>(params, key_pass, query_pass);
}

inline void expect_success(cudaError_t error) {
  if (error != cudaSuccess) emulator::fail("a tensor map was refused");
}

inline Strides strides_at(const int64_t* strides, int i) {
  return {strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
}

// `strides`: (batch, head, row) of q, k, v, out and what follows. `sizes`: batch, num_heads, num_kv_heads, seqlen_q,
// seqlen_k, total_q, total_k, head_dim, top_left, window_left, window_right. Null for absent tensors.
inline AttentionParams params_of(const void* q, const void* k, const void* v, void* out, float* lse,
                                 const int64_t* strides, const int64_t* sizes, const int32_t* cu_seqlens_q,
                                 const int32_t* cu_seqlens_k, const int32_t* key_lengths, double scale,
                                 double softcap) {
  const auto size = [&](int i) { return static_cast<int>(sizes[i]); };
  AttentionParams p = {};
  p.q = q;
  p.k = k;
  p.v = v;
  p.out = out;
  p.lse = lse;
  p.q_strides = strides_at(strides, 0);
  p.k_strides = strides_at(strides, 1);
  p.v_strides = strides_at(strides, 2);
  p.out_strides = strides_at(strides, 3);
  p.batch = size(0);
  p.num_heads = size(1);
  p.num_kv_heads = size(2);
  p.seqlen_q = size(3);
  p.seqlen_k = size(4);
  p.total_q = sizes[5];
  p.total_k = sizes[6];
  p.head_dim = size(7);
  p.top_left = sizes[8] != 0;
  p.window_left = size(9);
  p.window_right = size(10);
  p.lse_strides = {p.num_heads * p.total_q, p.total_q, 1};
  p.cu_seqlens_q = cu_seqlens_q;
  p.cu_seqlens_k = cu_seqlens_k;
  p.key_lengths = key_lengths;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  return p;
}

}  // namespace fastattn
