// Attention backward for Hopper: the gradients of keys and values, one tile of keys per block.
//
//     dv = sum over queries of p dout,         dk = scale * sum over queries of ds q
//
// p and ds are those of attention_bwd_dkdv_common.cuh. The query heads of a group and their blocks are summed in a
// fixed order: results are deterministic.
#pragma once

#include "attention_bwd_dkdv_common.cuh"

namespace fastattn {

// The main loop of a consumer warpgroup: accumulates the gradients of its 64 keys over all queries. The next block's
// score product is in flight while this block's gradients are accumulated, and the dp product while the scores become
// p.
template <class Shape, int Accumulators>
FASTATTN_DEVICE void accumulate_key_gradients(const AttentionBackwardParams& params, const KeyTile& tile,
                                              const BlockRange& blocks, const KeyGradientsShared<Shape>& shared,
                                              int first_row, float (&dk)[Accumulators], float (&dv)[Accumulators]) {
  using T = typename Shape::Element;
  constexpr int kBlockM = Shape::kBlockM;
  constexpr int kGradientGroups = Shape::kKeys && Shape::kValues ? 2 : 1;
  constexpr int kScoreGroups = Shape::kKeys ? 2 : 1;
  KeyOperands<Shape> operands = {shared.keys, shared.values, first_row};
  const auto start_scores = [&](float (&scores)[kBlockM / 2], int stage) {
    wgmma_fence();
    operands.multiply_keys(scores, shared.queries(stage));
    wgmma_commit();
  };
  const auto start_dp = [&](float (&dp)[kBlockM / 2], int stage) {
    if constexpr (!Shape::kKeys) return;
    wgmma_fence();
    operands.multiply_values(dp, shared.dout(stage));
    wgmma_commit();
  };
  const ScoreScale score_scale(params.call);
  auto& queries = shared.barriers->queries;
  const int steps = (blocks.end - blocks.begin) * (params.call.num_heads / params.call.num_kv_heads);

  // Written by wgmma only: any other write would have to wait for the products in flight.
  float scores[kBlockM / 2];
  float dp[kBlockM / 2];
  typename Pipeline<Shape::kStages>::State state;
  mbarrier_wait(&shared.barriers->keys, 0);
  if (steps == 0) return;
  operands.load();
  queries.wait_full(state);
  start_scores(scores, state.stage);
  start_dp(dp, state.stage);
  int block = blocks.begin;
  for (int steps_left = steps;;) {
    wgmma_wait<kScoreGroups - 1>();
    pin_registers(scores);
    float p[kBlockM / 2];
    float slope[Shape::kSoftcap ? kBlockM / 2 : 1];  // dscore/dx
    probabilities<Shape>(score_scale, tile, blocks, first_row, block, shared.lse_log2(state.stage), scores, p, slope);
    uint32_t p_operand[kBlockM / 16][4];
    uint32_t ds_operand[kBlockM / 16][4];
    if constexpr (Shape::kValues) {
      to_operand<T>(p, p_operand);
      pin_registers(p_operand);
      wgmma_fence();
      multiply_add<T, kBlockM>(dv, p_operand, shared.dout(state.stage));
      wgmma_commit();
    }
    auto next = state;
    next.advance();
    const bool last = --steps_left == 0;
    if constexpr (!Shape::kValues) {
      // Stands here for its branch: with neither a branch nor a wgmma here, ptxas moves the arithmetic above past the
      // wait for dp.
      if (!last) queries.wait_full(next);
    }
    if constexpr (Shape::kKeys) {
      wgmma_wait<kGradientGroups - 1>();
      pin_registers(dp);
      float ds[kBlockM / 2];
      score_gradients<Shape>(score_scale, shared.delta(state.stage), p, dp, slope, ds);
      to_operand<T>(ds, ds_operand);
      pin_registers(ds_operand);
      wgmma_fence();
      multiply_add<T, kBlockM>(dk, ds_operand, shared.queries(state.stage));
      wgmma_commit();
    }

    if (last) break;
    if constexpr (Shape::kValues) queries.wait_full(next);
    start_scores(scores, next.stage);
    wgmma_wait<1>();
    release_stage(queries, state);
    start_dp(dp, next.stage);
    state = next;
    block = block + 1 < blocks.end ? block + 1 : blocks.begin;
  }
  wgmma_wait<0>();
  if constexpr (Shape::kValues) pin_registers(dv);
  if constexpr (Shape::kKeys) pin_registers(dk);
}

// One block owns kBlockN keys of one head of one sequence: their gradients over all the queries that see them.
template <class Shape>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(Shape::kThreads, Shape::kMinBlocks)
    attention_bwd_dkdv_kernel(const FASTATTN_GRID_CONSTANT AttentionBackwardParams params,
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
    float dk[Shape::kHeadDim / 2] = {};
    float dv[Shape::kHeadDim / 2] = {};
    accumulate_key_gradients<Shape>(params, tile, blocks, shared, consumer * 64, dk, dv);
    store_key_gradients<Shape>(params, tile, shared, consumer, dk, dv);
  }
}

}  // namespace fastattn
