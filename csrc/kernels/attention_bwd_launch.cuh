// Encodes the tensor maps of a call and launches the passes of its backward; for the files of instantiations/.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "../attention_tiles.h"
#include "../device/head_map.h"
#include "../launch.h"
#include "attention_bwd_dkdv_sm90.cuh"
#include "attention_bwd_dkdv_split_sm90.cuh"
#include "attention_bwd_dq_sm90.cuh"
#include "attention_bwd_fused_sm90.cuh"

namespace fastattn {

// Maps of q and dout in boxes of a shape's queries, of k and v in boxes of its keys.
template <class Shape>
CUresult encode_backward_maps(TensorMapEncoder encode, const AttentionBackwardParams& params, BackwardMaps* maps) {
  const AttentionParams& p = params.call;
  constexpr CUtensorMapDataType type = kMapType<typename Shape::Element>;
  const int64_t batch = p.cu_seqlens_q == nullptr ? p.batch : 1;
  const auto queries = [&](CUtensorMap* map, const void* data, const Strides& strides) {
    return encode_head_map(encode, map, type, data, strides, batch, p.num_heads, p.total_q, p.head_dim, Shape::kBlockM);
  };
  const auto keys = [&](CUtensorMap* map, const void* data, const Strides& strides) {
    return encode_head_map(encode, map, type, data, strides, batch, p.num_kv_heads, p.total_k, p.head_dim,
                           Shape::kBlockN);
  };
  for (CUresult error : {queries(&maps->q, p.q, p.q_strides), queries(&maps->dout, params.dout, params.dout_strides),
                         keys(&maps->k, p.k, p.k_strides), keys(&maps->v, p.v, p.v_strides)}) {
    if (error != CUDA_SUCCESS) return error;
  }
  return CUDA_SUCCESS;
}

// One block of threads per tile of keys, or of queries. The batch heads of a section share the L2 cache: q and dout of
// their query heads, and in a one-pass backward the float sums of dq, which are as large again.
template <class Shape>
TileSchedule key_schedule(const AttentionParams& p) {
  const bool packed = p.cu_seqlens_k != nullptr;
  const int64_t batch_heads = packed ? p.num_kv_heads : int64_t{p.batch} * p.num_kv_heads;
  const int64_t blocks =
      packed ? packed_blocks<Shape::kBlockN>(p.total_k, p.batch) : ceil_div(p.total_k, Shape::kBlockN);
  const int64_t head_bytes = p.total_q * (4 * p.head_dim + (Shape::kSumsOverKeys ? 4 * Shape::kHeadDim : 0));
  return schedule_tiles(batch_heads, blocks, 1, head_bytes * (p.num_heads / p.num_kv_heads));
}

// That of a call in one pass. Only where some queries do not see the last keys do tiles differ in length from the first
// to the last; elsewhere all heads are early ones. At head dim 64 fewer heads are late: a step is half as long there,
// so that more tiles would wait for the one before them to hand over its first block.
template <class Shape>
OnePassSchedule one_pass_schedule(const AttentionParams& p) {
  constexpr int kOneLateIn = Shape::kHeadDim == 64 ? 4 : 2;
  const TileSchedule all = key_schedule<Shape>(p);
  const int late_heads = p.window_right < kUnbounded ? ceil_div(p.num_kv_heads, kOneLateIn) : 0;
  const int early_heads = p.num_kv_heads - late_heads;
  if (all.num_tiles < 0) return {-1, early_heads, all, all};
  const auto part = [&](int heads) {
    TileSchedule schedule = all;
    schedule.batch_heads = all.batch_heads / p.num_kv_heads * heads;
    schedule.num_tiles = schedule.batch_heads * all.query_blocks;
    if (schedule.batch_heads < all.batch_heads_per_section) schedule.batch_heads_per_section = schedule.batch_heads;
    return with_even_sections(schedule, 1);
  };
  return {all.num_tiles, early_heads, part(early_heads), part(late_heads)};
}

template <class Shape>
TileSchedule query_schedule(const AttentionParams& p) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t batch_heads = packed ? p.num_heads : int64_t{p.batch} * p.num_heads;
  const int64_t blocks =
      packed ? packed_blocks<Shape::kBlockM>(p.total_q, p.batch) : ceil_div(p.total_q, Shape::kBlockM);
  const int group_size = p.num_heads / p.num_kv_heads;
  return with_even_sections(schedule_tiles(batch_heads, blocks, group_size, 4 * p.total_k * p.head_dim), group_size);
}

template <class Element, int kHeadDim, KeyGradients kWanted, bool kSoftcap>
using KeyGradientsShapeFor = KeyGradientsShape<Element, kHeadDim, key_gradients_tile(kHeadDim, kSoftcap).keys,
                                               key_gradients_tile(kHeadDim, kSoftcap).queries, kWanted, kSoftcap>;

// The shape of the pass for dk and dv at head dims where a warpgroup's registers hold one of the two.
template <class Element, int kHeadDim>
using SplitGradientsShapeFor = SplitGradientsShape<Element, kHeadDim, key_gradients_tile(kHeadDim, false).keys,
                                                   key_gradients_tile(kHeadDim, false).queries>;

// The kernel of a pass over keys.
template <class Element, int kHeadDim, int kBlockN, int kBlockM, KeyGradients kWanted, bool kSoftcap>
constexpr auto key_pass_kernel(KeyGradientsShape<Element, kHeadDim, kBlockN, kBlockM, kWanted, kSoftcap>) {
  return attention_bwd_dkdv_kernel<KeyGradientsShape<Element, kHeadDim, kBlockN, kBlockM, kWanted, kSoftcap>>;
}
template <class Element, int kHeadDim, int kBlockN, int kBlockM>
constexpr auto key_pass_kernel(SplitGradientsShape<Element, kHeadDim, kBlockN, kBlockM>) {
  return attention_bwd_dkdv_split_kernel<SplitGradientsShape<Element, kHeadDim, kBlockN, kBlockM>>;
}

template <class Element, int kHeadDim, bool kSoftcap>
using QueryGradientShapeFor = QueryGradientShape<Element, kHeadDim, query_gradient_tile(kHeadDim, kSoftcap).queries,
                                                 query_gradient_tile(kHeadDim, kSoftcap).keys, kSoftcap>;

// The pass for all gradients, for head dims that have one.
template <class Element, int kHeadDim>
using FusedGradientsShapeFor = FusedGradientsShape<Element, kHeadDim, key_gradients_tile(kHeadDim, false).keys,
                                                   key_gradients_tile(kHeadDim, false).queries>;

// Threads per row of the first pass, 8 columns each.
template <int kHeadDim>
constexpr int kRowThreads = kHeadDim / 8;

constexpr int kRowPassThreads = 256;

// Blocks of the first kernel.
inline int64_t row_pass_blocks(const AttentionParams& p) {
  return query_row_blocks(p) * (p.cu_seqlens_q == nullptr ? int64_t{p.batch} : 1) * p.num_heads;
}

// Blocks of the last pass of a call in one pass.
template <class Shape>
int64_t finish_blocks(const AttentionParams& p) {
  return row_pass_blocks(p) * (kRowBlock / Shape::kBlockM);
}

// key_pass(shape, schedule) for each pass over keys and query_pass(shape, schedule) for that over queries, until one of
// them returns something other than Error{}.
template <class Error, class Element, int kHeadDim, bool kSoftcap, class KeyPass, class QueryPass>
Error run_gradient_passes(const AttentionBackwardParams& params, KeyPass key_pass, QueryPass query_pass) {
  const auto keys = [&](auto shape) { return key_pass(shape, key_schedule<decltype(shape)>(params.call)); };
  Error error = {};
  if (params.dk != nullptr) {
    if constexpr (kHeadDim <= 128) {
      error = keys(KeyGradientsShapeFor<Element, kHeadDim, KeyGradients::kBoth, kSoftcap>());
    } else if constexpr (!kSoftcap) {
      error = keys(SplitGradientsShapeFor<Element, kHeadDim>());
    } else {
      error = keys(KeyGradientsShapeFor<Element, kHeadDim, KeyGradients::kKeys, kSoftcap>());
      if (error != Error{}) return error;
      error = keys(KeyGradientsShapeFor<Element, kHeadDim, KeyGradients::kValues, kSoftcap>());
    }
  }
  if (error != Error{} || params.dq == nullptr) return error;
  using Shape = QueryGradientShapeFor<Element, kHeadDim, kSoftcap>;
  return query_pass(Shape(), query_schedule<Shape>(params.call));
}

// fused_pass(shape, schedule), then finish(shape), of a call in one pass.
template <class Error, class Element, int kHeadDim, class FusedPass, class Finish>
Error run_one_pass(const AttentionBackwardParams& params, FusedPass fused_pass, Finish finish) {
  using Shape = FusedGradientsShapeFor<Element, kHeadDim>;
  const Error error = fused_pass(Shape(), one_pass_schedule<Shape>(params.call));
  return error != Error{} ? error : finish(Shape());
}

#if !defined(FASTATTN_EMULATION)

template <class Shape, class Kernel, class Schedule>
cudaError_t launch_gradient_pass(Kernel kernel, const AttentionBackwardParams& params, const Schedule& schedule,
                                 TensorMapEncoder encode, cudaStream_t stream) {
  BackwardMaps maps;
  if (encode_backward_maps<Shape>(encode, params, &maps) != CUDA_SUCCESS) return cudaErrorInvalidValue;
  if (schedule.num_tiles < 0) return cudaErrorInvalidConfiguration;
  const cudaError_t error = prepare_kernel(reinterpret_cast<const void*>(kernel), Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<schedule.num_tiles, Shape::kThreads, Shape::kSharedBytes, stream>>>(params, maps, schedule);
  return cudaGetLastError();
}

template <class Element, int kHeadDim>
cudaError_t launch_attention_backward(const AttentionBackwardParams& params, TensorMapEncoder encode,
                                      cudaStream_t stream) {
  const int64_t row_blocks = row_pass_blocks(params.call);
  if (row_blocks > int64_t{1} << 29) return cudaErrorInvalidConfiguration;
  const auto row_kernel = attention_bwd_rows_kernel<Element, kRowThreads<kHeadDim>>;
  cudaError_t error = prepare_kernel(reinterpret_cast<const void*>(row_kernel), 0);
  if (error != cudaSuccess) return error;
  row_kernel<<<static_cast<unsigned>(row_blocks), kRowPassThreads, 0, stream>>>(params);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  if constexpr (has_one_pass(kHeadDim)) {
    if (params.dq_sum != nullptr) {
      return run_one_pass<cudaError_t, Element, kHeadDim>(
          params,
          [&](auto shape, const OnePassSchedule& schedule) {
            using Shape = decltype(shape);
            return launch_gradient_pass<Shape>(attention_bwd_fused_kernel<Shape>, params, schedule, encode, stream);
          },
          [&](auto shape) {
            using Shape = decltype(shape);
            const auto kernel = attention_bwd_finish_kernel<Shape>;
            constexpr int kSharedBytes = kFinishSharedBytes<Shape>;
            const cudaError_t failure = prepare_kernel(reinterpret_cast<const void*>(kernel), kSharedBytes);
            if (failure != cudaSuccess) return failure;
            kernel<<<static_cast<unsigned>(finish_blocks<Shape>(params.call)),
                     kFinishWarpgroups<Shape> * kWarpgroupThreads, kSharedBytes, stream>>>(params);
            return cudaGetLastError();
          });
    }
  }
  const auto key_pass = [&](auto shape, const TileSchedule& schedule) {
    using Shape = decltype(shape);
    return launch_gradient_pass<Shape>(key_pass_kernel(shape), params, schedule, encode, stream);
  };
  const auto query_pass = [&](auto shape, const TileSchedule& schedule) {
    using Shape = decltype(shape);
    return launch_gradient_pass<Shape>(attention_bwd_dq_kernel<Shape>, params, schedule, encode, stream);
  };
  return params.call.softcap != 0.0f
             ? run_gradient_passes<cudaError_t, Element, kHeadDim, true>(params, key_pass, query_pass)
             : run_gradient_passes<cudaError_t, Element, kHeadDim, false>(params, key_pass, query_pass);
}

#endif  // nvcc

}  // namespace fastattn
