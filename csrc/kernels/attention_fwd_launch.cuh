// Encodes the tensor maps of a call and launches its forward kernel; for the files of instantiations/.
#pragma once

#include <type_traits>

#include "../attention_tiles.h"
#include "../device/head_map.h"
#include "attention_fwd_sm90.cuh"

#if !defined(FASTATTN_EMULATION)
#include "kernel_launch.cuh"
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
  constexpr int kShare = Shape::kBlockN / Shape::kCluster;
  error =
      encode_head_map(encode, &maps->k, type, p.k, p.k_strides, batch, p.num_kv_heads, p.total_k, p.head_dim, kShare);
  if (error != CUDA_SUCCESS) return error;
  error =
      encode_head_map(encode, &maps->v, type, p.v, p.v_strides, batch, p.num_kv_heads, p.total_k, p.head_dim, kShare);
  if (error != CUDA_SUCCESS) return error;
  return encode_head_map(encode, &maps->out, type, p.out, p.out_strides, batch, p.num_heads, p.total_q, p.head_dim,
                         kWarpgroupRows);
}

// Marks the blocks of `rows` queries at whose edge a window ends, where every sequence has them at the same places.
inline TileSchedule with_edges(TileSchedule schedule, const AttentionParams& p, int rows) {
  if (p.cu_seqlens_q != nullptr || p.key_lengths != nullptr || p.total_q != p.total_k) return schedule;
  if (p.window_left == kUnbounded || p.window_right == kUnbounded) return schedule;
  const int first_edge = static_cast<int>(ceil_div(int64_t{p.window_left}, rows));
  const int last_edge = static_cast<int>(ceil_div(int64_t{p.window_right}, rows));
  if (first_edge + last_edge >= schedule.query_blocks) return schedule;
  schedule.first_edge = first_edge;
  schedule.last_edge = last_edge;
  return schedule;
}

template <class Shape>
TileSchedule forward_schedule(const AttentionParams& p) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t batch_heads = packed ? p.num_heads : int64_t{p.batch} * p.num_heads;
  const int64_t query_blocks =
      packed ? packed_blocks<Shape::kBlockM>(p.total_q, p.batch) : ceil_div(p.total_q, Shape::kBlockM);
  const int group_size = p.num_heads / p.num_kv_heads;
  const int64_t kv_bytes = 4 * p.total_k * p.head_dim;
  if (Shape::kCluster > 1) {  // numbers of the tiles of a key head: see forward_tile_at
    const int64_t numbers = ceil_div(group_size * query_blocks, Shape::kCluster);
    return with_even_sections(schedule_tiles(batch_heads / group_size, numbers, 1, kv_bytes), 1);
  }
  const TileSchedule schedule =
      with_even_sections(schedule_tiles(batch_heads, query_blocks, group_size, kv_bytes), group_size);
  return with_edges(schedule, p, Shape::kBlockM);
}

template <class Element, int kHeadDim, bool kWindowed, bool kSoftcap, int kCluster = 1>
using ForwardShapeFor = ForwardShape<Element, kHeadDim, forward_tile(kHeadDim, kWindowed, kSoftcap).queries,
                                     forward_tile(kHeadDim, kWindowed, kSoftcap).keys, kSoftcap, kCluster>;

// The shape that runs in clusters, of a head dim that has one.
template <class Element, int kHeadDim>
using ClusterShapeFor = ForwardShapeFor<Element, kHeadDim, false, false, forward_cluster(kHeadDim)>;

inline bool is_windowed(const AttentionParams& p) { return p.window_left < kUnbounded || p.window_right < kUnbounded; }

// Whether a call runs in clusters on a device where `clusters` are resident at a time: the call allows it, a kernel
// exists, the queries see every key, and clusters add no round of tiles.
template <class Element, int kHeadDim>
bool runs_in_clusters(const AttentionParams& p, int multiprocessors, int clusters) {
  if (forward_cluster(kHeadDim) == 1 || !p.clusters) return false;
  if (p.cu_seqlens_q != nullptr || p.key_lengths != nullptr || is_windowed(p) || p.softcap != 0.0f) return false;
  using Shape = ClusterShapeFor<Element, kHeadDim>;
  const int64_t head_tiles = ceil_div(p.total_q, Shape::kBlockM) * (p.num_heads / p.num_kv_heads);
  return clusters_cost_no_round(int64_t{p.batch} * p.num_kv_heads, head_tiles, Shape::kCluster, multiprocessors,
                                clusters);
}

// function(shape) for the shape of a call.
template <class Element, int kHeadDim, class Function>
auto with_forward_shape(const AttentionParams& params, bool in_clusters, Function function) {
  if (params.softcap != 0.0f) return function(ForwardShapeFor<Element, kHeadDim, true, true>());
  if (is_windowed(params)) return function(ForwardShapeFor<Element, kHeadDim, true, false>());
  if constexpr (forward_cluster(kHeadDim) > 1) {
    if (in_clusters) return function(ClusterShapeFor<Element, kHeadDim>());
  }
  return function(ForwardShapeFor<Element, kHeadDim, false, false>());
}

// Blocks of the persistent grid.
template <class Shape>
int64_t forward_blocks(const TileSchedule& schedule, int multiprocessors, int clusters) {
  const int workers = Shape::kCluster > 1 ? clusters : multiprocessors;
  return int64_t{Shape::kCluster} * (schedule.num_tiles < workers ? schedule.num_tiles : workers);
}

#if !defined(FASTATTN_EMULATION)

template <class Shape>
LaunchShape forward_launch(int64_t blocks) {
  return {blocks, Shape::kThreads, Shape::kSharedBytes, Shape::kCluster};
}

template <class Element, int kHeadDim>
cudaError_t launch_attention_forward(const AttentionParams& params, TensorMapEncoder encode, int multiprocessors,
                                     cudaStream_t stream) {
  int clusters = 0;
  if constexpr (forward_cluster(kHeadDim) > 1) {
    using Shape = ClusterShapeFor<Element, kHeadDim>;
    const int most = multiprocessors / Shape::kCluster;  // an upper bound: the device is queried only where it would do
    if (runs_in_clusters<Element, kHeadDim>(params, multiprocessors, most)) {
      const LaunchShape one = forward_launch<Shape>(Shape::kCluster);
      const cudaError_t error = resident_clusters(one, attention_fwd_sm90<Shape>, &clusters);
      if (error != cudaSuccess) return error;
    }
  }
  const bool in_clusters = runs_in_clusters<Element, kHeadDim>(params, multiprocessors, clusters);
  return with_forward_shape<Element, kHeadDim>(params, in_clusters, [&](auto shape) {
    using Shape = decltype(shape);
    ForwardMaps maps;
    if (encode_forward_maps<Shape>(encode, params, &maps) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    const TileSchedule schedule = forward_schedule<Shape>(params);
    if (schedule.num_tiles < 0) return cudaErrorInvalidConfiguration;
    return launch_kernel(forward_launch<Shape>(forward_blocks<Shape>(schedule, multiprocessors, clusters)), stream,
                         attention_fwd_sm90<Shape>, maps, params, schedule);
  });
}

#endif  // nvcc

}  // namespace fastattn
