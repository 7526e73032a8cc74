// Describes a call to the copy engine and launches its forward kernel; for the files of instantiations/.
#pragma once

#include <type_traits>

#include "../attention_tiles.h"
#include "../device/head_map.h"
#include "attention_fwd_sm90.cuh"

#if !defined(FASTATTN_EMULATION)
#include "../launch.h"
#endif

namespace fastattn {

// Maps of q, k, v and out. The call has at least one query and one key.
template <class Shape>
CUresult encode_forward_maps(TensorMapEncoder encode, const AttentionParams& p, ForwardMaps* maps) {
  constexpr CUtensorMapDataType type = kMapType<typename Shape::Element>;
  const int64_t batch = p.cu_seqlens_q == nullptr ? p.batch : 1;
  CUresult error = encode_head_map(encode, &maps->q, type, p.q, p.q_strides, batch, p.num_heads, p.total_q, p.head_dim,
                                   Shape::kBlockM);
  if (error != CUDA_SUCCESS) return error;
  error = encode_head_map(encode, &maps->k, type, p.k, p.k_strides, batch, p.num_kv_heads, p.total_k, p.head_dim,
                          Shape::kBlockN);
  if (error != CUDA_SUCCESS) return error;
  error = encode_head_map(encode, &maps->v, type, p.v, p.v_strides, batch, p.num_kv_heads, p.total_k, p.head_dim,
                          Shape::kBlockN);
  if (error != CUDA_SUCCESS) return error;
  return encode_head_map(encode, &maps->out, type, p.out, p.out_strides, batch, p.num_heads, p.total_q, p.head_dim,
                         kWarpgroupRows);
}

template <class Shape>
TileSchedule forward_schedule(const AttentionParams& p) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t planes = packed ? p.num_heads : int64_t{p.batch} * p.num_heads;
  const int64_t query_blocks =
      packed ? packed_blocks<Shape::kBlockM>(p.total_q, p.batch) : (p.total_q + Shape::kBlockM - 1) / Shape::kBlockM;
  const int group_size = p.num_heads / p.num_kv_heads;
  return with_even_sections(schedule_tiles(planes, query_blocks, group_size, 4 * p.total_k * p.head_dim), group_size);
}

template <class Element, int kHeadDim, bool kWindowed, bool kSoftcap>
using ForwardShapeFor = ForwardShape<Element, kHeadDim, forward_tile(kHeadDim, kWindowed, kSoftcap).queries,
                                     forward_tile(kHeadDim, kWindowed, kSoftcap).keys, kSoftcap>;

// function(shape) for the shape of a call.
template <class Element, int kHeadDim, class Function>
auto with_forward_shape(const AttentionParams& params, Function function) {
  if (params.softcap != 0.0f) return function(ForwardShapeFor<Element, kHeadDim, true, true>());
  if (params.window_left < kUnbounded || params.window_right < kUnbounded) {
    return function(ForwardShapeFor<Element, kHeadDim, true, false>());
  }
  return function(ForwardShapeFor<Element, kHeadDim, false, false>());
}

#if !defined(FASTATTN_EMULATION)

template <class Element, int kHeadDim>
cudaError_t launch_attention_forward(const AttentionParams& params, TensorMapEncoder encode, int multiprocessors,
                                     cudaStream_t stream) {
  return with_forward_shape<Element, kHeadDim>(params, [&](auto shape) {
    using Shape = decltype(shape);
    ForwardMaps maps;
    if (encode_forward_maps<Shape>(encode, params, &maps) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    const TileSchedule schedule = forward_schedule<Shape>(params);
    if (schedule.num_tiles < 0) return cudaErrorInvalidConfiguration;
    const auto kernel = attention_fwd_sm90<Shape>;
    const cudaError_t error = prepare_kernel(reinterpret_cast<const void*>(kernel), Shape::kSharedBytes);
    if (error != cudaSuccess) return error;
    const int blocks = schedule.num_tiles < multiprocessors ? schedule.num_tiles : multiprocessors;
    kernel<<<blocks, Shape::kThreads, Shape::kSharedBytes, stream>>>(maps, params, schedule);
    return cudaGetLastError();
  });
}

#endif  // nvcc

}  // namespace fastattn
