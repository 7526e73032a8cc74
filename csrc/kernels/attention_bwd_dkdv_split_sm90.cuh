// Attention backward for Hopper: the gradients of keys and values where the sums of both do not fit a warpgroup.
//
// The two consumer warpgroups own the same 64 keys: one accumulates dv, the other dk. The first computes the scores and
// their probabilities and passes them through shared memory as floats, in the layout of its accumulators; the second
// computes dp meanwhile. The scores are thus computed once, where one pass per gradient would compute them twice.
#pragma once

#include "attention_bwd_dkdv_common.cuh"

namespace fastattn {

template <class Element_, int kHeadDim_, int kBlockN_, int kBlockM_>
struct SplitGradientsShape : KeyGradientsShape<Element_, kHeadDim_, kBlockN_, kBlockM_, KeyGradients::kBoth, false> {
  using Base = KeyGradientsShape<Element_, kHeadDim_, kBlockN_, kBlockM_, KeyGradients::kBoth, false>;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kBlockM = kBlockM_;

  static constexpr uint32_t kProbabilitiesAt = Base::kBarriersAt + 128;
  static constexpr uint32_t kSharedBytes = kProbabilitiesAt + kBlockN * kBlockM * 4 + 1024;  // 1024 to align the tiles

  static_assert(kBlockN == 64, "of both warpgroups");
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

// Named barriers besides those of warpgroup_sync.
constexpr int kProbabilitiesWritten = 3;
constexpr int kProbabilitiesTaken = 4;
constexpr int kSplitThreads = 2 * kWarpgroupThreads;

// The probabilities in shared memory: groups of four elements, each for all threads of a warpgroup, at this thread's
// place.
template <class Shape>
FASTATTN_DEVICE float4* probability_tile(const KeyGradientsShared<Shape>& shared) {
  return reinterpret_cast<float4*>(shared.base + Shape::kProbabilitiesAt) + thread_index() % kWarpgroupThreads;
}

// dv of the tile's keys over all the queries that see them. The next block's score product is in flight while this
// block's gradient is accumulated.
template <class Shape, int Accumulators>
FASTATTN_DEVICE void accumulate_value_gradients(const AttentionBackwardParams& params, const KeyTile& tile,
                                                const BlockRange& blocks, const KeyGradientsShared<Shape>& shared,
                                                float (&dv)[Accumulators]) {
  using T = typename Shape::Element;
  constexpr int kBlockM = Shape::kBlockM;
  const ScoreScale score_scale(params.call);
  auto& queries = shared.barriers->queries;
  int steps_left = (blocks.end - blocks.begin) * (params.call.num_heads / params.call.num_kv_heads);
  float scores[kBlockM / 2];
  typename Pipeline<Shape::kStages>::State state;
  const auto start_scores = [&](int stage) {
    wgmma_fence();
    multiply_transposed<T, Shape::kBlockN, kBlockM, Shape::kHeadDim>(scores, shared.keys, 0, shared.queries(stage));
    wgmma_commit();
  };

  mbarrier_wait(&shared.barriers->keys, 0);
  if (steps_left == 0) return;
  queries.wait_full(state);
  start_scores(state.stage);
  for (int block = blocks.begin;;) {
    wgmma_wait<0>();
    pin_registers(scores);
    float p[kBlockM / 2];
    float slope[1];
    probabilities<Shape>(score_scale, tile, blocks, 0, block, shared.lse_log2(state.stage), scores, p, slope);
    named_barrier_sync(kProbabilitiesTaken, kSplitThreads);
#pragma unroll
    for (int i = 0; i < kBlockM / 2; i += 4) {
      st_shared(probability_tile(shared) + i / 4 * kWarpgroupThreads, make_float4(p[i], p[i + 1], p[i + 2], p[i + 3]));
    }
    named_barrier_arrive(kProbabilitiesWritten, kSplitThreads);
    uint32_t p_operand[kBlockM / 16][4];
    to_operand<T>(p, p_operand);
    pin_registers(p_operand);
    wgmma_fence();
    multiply_add<T, kBlockM>(dv, p_operand, shared.dout(state.stage));
    wgmma_commit();
    if (--steps_left == 0) break;
    auto next = state;
    next.advance();
    queries.wait_full(next);
    start_scores(next.stage);
    wgmma_wait<1>();
    release_stage(queries, state);
    state = next;
    block = block + 1 < blocks.end ? block + 1 : blocks.begin;
  }
  wgmma_wait<0>();
  pin_registers(dv);
}

// dk of the same keys. The next block's dp product is in flight while this block's gradient is accumulated.
template <class Shape, int Accumulators>
FASTATTN_DEVICE void accumulate_key_gradients_of_probabilities(const AttentionBackwardParams& params,
                                                               const BlockRange& blocks,
                                                               const KeyGradientsShared<Shape>& shared,
                                                               float (&dk)[Accumulators]) {
  using T = typename Shape::Element;
  constexpr int kBlockM = Shape::kBlockM;
  const ScoreScale score_scale(params.call);
  auto& queries = shared.barriers->queries;
  int steps_left = (blocks.end - blocks.begin) * (params.call.num_heads / params.call.num_kv_heads);
  float dp[kBlockM / 2];
  typename Pipeline<Shape::kStages>::State state;
  const auto start_dp = [&](int stage) {
    wgmma_fence();
    multiply_transposed<T, Shape::kBlockN, kBlockM, Shape::kHeadDim>(dp, shared.values, 0, shared.dout(stage));
    wgmma_commit();
  };

  mbarrier_wait(&shared.barriers->keys, 0);
  if (steps_left == 0) return;
  named_barrier_arrive(kProbabilitiesTaken, kSplitThreads);
  queries.wait_full(state);
  start_dp(state.stage);
  for (;;) {
    const bool last = --steps_left == 0;
    float p[kBlockM / 2];
    named_barrier_sync(kProbabilitiesWritten, kSplitThreads);
#pragma unroll
    for (int i = 0; i < kBlockM / 2; i += 4) {
      const float4 four = ld_shared(probability_tile(shared) + i / 4 * kWarpgroupThreads);
      p[i] = four.x;
      p[i + 1] = four.y;
      p[i + 2] = four.z;
      p[i + 3] = four.w;
    }
    if (!last) named_barrier_arrive(kProbabilitiesTaken, kSplitThreads);
    wgmma_wait<0>();
    pin_registers(dp);
    float ds[kBlockM / 2];
    const float slope[1] = {};
    score_gradients<Shape>(score_scale, shared.delta(state.stage), p, dp, slope, ds);
    uint32_t ds_operand[kBlockM / 16][4];
    to_operand<T>(ds, ds_operand);
    pin_registers(ds_operand);
    wgmma_fence();
    multiply_add<T, kBlockM>(dk, ds_operand, shared.queries(state.stage));
    wgmma_commit();
    if (last) break;
    auto next = state;
    next.advance();
    queries.wait_full(next);
    start_dp(next.stage);
    wgmma_wait<1>();
    release_stage(queries, state);
    state = next;
  }
  wgmma_wait<0>();
  pin_registers(dk);
}

// Stores one gradient of the tile's 64 keys, staged through a tile that only this warpgroup has read.
template <class Shape, int Accumulators>
FASTATTN_DEVICE void store_split_gradient(const KeyTile& tile, int consumer, unsigned char* staging,
                                          float (&sums)[Accumulators], float scale, void* gradient,
                                          const Strides& strides, int head_dim) {
  using T = typename Shape::Element;
  const Sequence& sequence = tile.sequence;
  warpgroup_sync(consumer);
  const int warp_row = warp_index() % 4 * 16;
  const GradientRows rows = {tile.first_key + warp_row, sequence.seen.num_keys, sequence.key_rows, head_dim};
  T* head = head_of(static_cast<T*>(gradient), strides, sequence.batch, tile.kv_head, sequence.key_start);
  store_gradient<T, Shape::kBlockN>(staging, warp_row, sums, scale, head, strides.row, rows);
}

// One block owns 64 keys of one head of one sequence: their gradients over all the queries that see them.
template <class Shape>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(Shape::kThreads, Shape::kMinBlocks)
    attention_bwd_dkdv_split_kernel(const FASTATTN_GRID_CONSTANT AttentionBackwardParams params,
                                    const FASTATTN_GRID_CONSTANT BackwardMaps maps,
                                    const FASTATTN_GRID_CONSTANT TileSchedule schedule) {
  const KeyGradientsShared<Shape> shared;
  if (thread_index() == 0) {
    shared.barriers->queries.init(Shape::kConsumers * kWarpgroupThreads / kWarpThreads);
    mbarrier_init(&shared.barriers->keys, 1);
    mbarrier_init(&shared.barriers->landed, 1);
    fence_barrier_init();
    prefetch_maps(maps);
  }
  block_sync();

  const int consumer = warpgroup_index() - 1;
  if (consumer < 0) {
    decrease_registers<Shape::kProducerRegisters>();
    if (warp_index() != 0) return;
    const auto [tile, blocks] = key_work<Shape>(params.call, schedule, block_index().x);
    if (tile.first_key < tile.sequence.key_rows)
      produce_queries<Shape>(params, maps, tile, blocks, walk_of(blocks, false), shared);
  } else {
    increase_registers<Shape::kConsumerRegisters>();
    const auto [tile, blocks] = key_work<Shape>(params.call, schedule, block_index().x);
    if (tile.first_key >= tile.sequence.key_rows) return;
    float sums[Shape::kHeadDim / 2] = {};
    if (consumer == 0) {
      accumulate_value_gradients<Shape>(params, tile, blocks, shared, sums);
      store_split_gradient<Shape>(tile, consumer, shared.keys, sums, 1.0f, params.dv, params.dv_strides,
                                  params.call.head_dim);
    } else {
      accumulate_key_gradients_of_probabilities<Shape>(params, blocks, shared, sums);
      store_split_gradient<Shape>(tile, consumer, shared.values, sums, params.call.scale, params.dk, params.dk_strides,
                                  params.call.head_dim);
    }
  }
}

}  // namespace fastattn
