// Attention backward for Hopper in one pass: a tile of keys per block, which adds to the gradient of every query it
// sees.
//
// What attention_bwd_dkdv_sm90.cuh does, and dq += ds k beside: five products where two passes take seven. dq is summed
// in float in global memory, by one block after another: for each block of queries the tiles of keys add in the
// order of their head, the last one first or the first one, so that the sum has the same bits every time. Blocks draw
// the tiles of a head in that order, by a ticket: those that one waits for belong to blocks that have started,
// whichever those are.
#pragma once

#include "attention_bwd_fused_common.cuh"
#include "attention_bwd_fused_deferred.cuh"

namespace fastattn {

// The sums over all queries for the 64 keys of a warpgroup, and its half of the columns of what these keys add to dq,
// passed on block by block. Nothing overlaps within a warpgroup: the next scores beside dq would not fit the
// registers.
template <class Shape, int Accumulators>
FASTATTN_DEVICE void accumulate_by_columns(const AttentionBackwardParams& params, const KeyTile& tile,
                                           const BlockRange& blocks, const BlockWalk& walk,
                                           const KeyGradientsShared<Shape>& shared, int consumer,
                                           float (&dk)[Accumulators], float (&dv)[Accumulators]) {
  using T = typename Shape::Element;
  constexpr int kBlockM = Shape::kBlockM;
  constexpr int kBlockN = Shape::kBlockN;
  constexpr int kConsumerThreads = Shape::kConsumers * kWarpgroupThreads;
  const int first_row = consumer * 64;
  const int thread = thread_index() % kWarpgroupThreads;
  const ScoreScale score_scale(params.call);
  auto& queries = shared.barriers->queries;
  const int steps = (blocks.end - blocks.begin) * (params.call.num_heads / params.call.num_kv_heads);

  // Only products write these: anything else that did would have to wait for those still in flight.
  float scores[kBlockM / 2];
  float dp[kBlockM / 2];
  typename Pipeline<Shape::kStages>::State state;
  KeyOperands<Shape> operands = {shared.keys, shared.values, first_row};
  const auto start_scores = [&](int stage) {
    wgmma_fence();
    operands.multiply_keys(scores, shared.queries(stage));
    wgmma_commit();
  };
  const auto start_dp = [&](int stage) {
    wgmma_fence();
    operands.multiply_values(dp, shared.dout(stage));
    wgmma_commit();
  };

  mbarrier_wait(&shared.barriers->keys, 0);
  if (steps == 0) return;
  operands.load();
  queries.wait_full(state);
  start_scores(state.stage);
  start_dp(state.stage);
  int block = walk.first;
  for (int step = 0;;) {
    wgmma_wait<1>();
    pin_registers(scores);
    float p[kBlockM / 2];
    float slope[1];
    probabilities<Shape>(score_scale, tile, blocks, first_row, block, shared.lse_log2(state.stage), scores, p, slope);
    uint32_t p_operand[kBlockM / 16][4];
    to_operand<T>(p, p_operand);
    pin_registers(p_operand);
    wgmma_fence();
    multiply_add<T, kBlockM>(dv, p_operand, shared.dout(state.stage));
    wgmma_commit();

    wgmma_wait<1>();
    pin_registers(dp);
    float ds[kBlockM / 2];
    score_gradients<Shape>(score_scale, shared.delta(state.stage), p, dp, slope, ds);
    uint32_t ds_operand[kBlockM / 16][4];
    to_operand<T>(ds, ds_operand);
    pin_registers(ds_operand);
    unsigned char* ds_queries = ds_tile(shared, step);
    store_transposed<kBlockM>(ds_queries, first_row + thread / kWarpThreads * 16, ds_operand);
    fence_proxy_async();
    wgmma_fence();
    multiply_add<T, kBlockM>(dk, ds_operand, shared.queries(state.stage));
    wgmma_commit();

    // Both warpgroups have written their keys' part of this tile, and read the other one, of the step before.
    named_barrier_sync(kDsWritten, kConsumerThreads);
    float dq[Shape::kDqColumns / 2];
    wgmma_fence();
    multiply_columns<T, kBlockM, kBlockN>(dq, ds_queries, shared.keys, consumer * Shape::kDqColumns);
    wgmma_commit();
    wgmma_wait<0>();
    release_stage(queries, state);
    hand_over_dq<Shape>(shared, dq, 0, consumer);
    if (++step == steps) break;
    state.advance();
    queries.wait_full(state);
    start_scores(state.stage);
    start_dp(state.stage);
    block = walk.after(block);
  }
  pin_registers(dv);
  pin_registers(dk);
}

// One block owns kBlockN keys of one head of one sequence.
template <class Shape>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(Shape::kThreads, Shape::kMinBlocks)
    attention_bwd_fused_kernel(const FASTATTN_GRID_CONSTANT AttentionBackwardParams params,
                               const FASTATTN_GRID_CONSTANT BackwardMaps maps,
                               const FASTATTN_GRID_CONSTANT OnePassSchedule schedule) {
  const KeyGradientsShared<Shape> shared;
  if (thread_index() == 0) {
    shared.barriers->queries.init(Shape::kConsumers * kWarpgroupThreads / kWarpThreads);
    mbarrier_init(&shared.barriers->keys, 1);
    mbarrier_init(&shared.barriers->landed, 1);
    fence_barrier_init();
    prefetch_maps(maps);
    st_shared(&shared.barriers->ticket, counter_fetch_add(params.ticket, 1));
  }
  block_sync();

  const int consumer = warpgroup_index() - 1;
  if (consumer < 0) {
    decrease_registers<Shape::kProducerRegisters>();
    if (warp_index() > Shape::kDqTiles) return;
    const auto [tile, blocks, walk] = work_of_ticket<Shape>(params.call, schedule, ld_shared(&shared.barriers->ticket));
    if (tile.first_key >= tile.sequence.key_rows) return;
    if (warp_index() == 0) {
      produce_queries<Shape>(params, maps, tile, blocks, walk, shared);
    } else {
      add_dq<Shape>(params, tile, blocks, walk, shared, warp_index() - 1);
    }
  } else {
    increase_registers<Shape::kConsumerRegisters>();
    const auto [tile, blocks, walk] = work_of_ticket<Shape>(params.call, schedule, ld_shared(&shared.barriers->ticket));
    if (tile.first_key >= tile.sequence.key_rows) return;
    float dk[Shape::kHeadDim / 2] = {};
    float dv[Shape::kHeadDim / 2] = {};
    if constexpr (!Shape::kDqByBlocks) {
      accumulate_by_columns<Shape>(params, tile, blocks, walk, shared, consumer, dk, dv);
    } else if (consumer == 0) {
      accumulate_by_blocks<0, Shape>(params, tile, blocks, walk, shared, dk, dv);
    } else {
      accumulate_by_blocks<1, Shape>(params, tile, blocks, walk, shared, dk, dv);
    }
    store_key_gradients<Shape>(params, tile, shared, consumer, dk, dv);
  }
}

// The last pass: warpgroups that share a block of queries, and the columns of each.
template <class Shape>
constexpr int kFinishWarpgroups = Shape::kHeadDim > kPanelColumns ? 2 : 1;
template <class Shape>
constexpr int kFinishColumns = Shape::kHeadDim / kFinishWarpgroups<Shape>;
template <class Shape>
constexpr uint32_t kFinishSharedBytes = kTileBytes<Shape::kBlockM, Shape::kHeadDim> + 1024;

// dq = scale * dq_sum, rounded. One block per kBlockM queries of one head.
template <class Shape>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(kFinishWarpgroups<Shape>* kWarpgroupThreads, 2)
    attention_bwd_finish_kernel(const FASTATTN_GRID_CONSTANT AttentionBackwardParams params) {
  using T = typename Shape::Element;
  constexpr int kBlockM = Shape::kBlockM;
  constexpr int kBlocks = kRowBlock / kBlockM;
  constexpr int kColumns = kFinishColumns<Shape>;
  const AttentionParams& call = params.call;
  const int row_blocks = query_row_blocks(call);
  const int row_block = block_index().x / kBlocks;
  const QueryTile tile = query_tile<kRowBlock>(call, row_block % row_blocks, row_block / row_blocks);
  const Sequence& sequence = tile.sequence;
  const int first_query = tile.first_query + block_index().x % kBlocks * kBlockM;
  const int num_queries = sequence.seen.num_queries;
  if (first_query >= num_queries) return;

  const int part = thread_index() / kWarpgroupThreads;
  const int thread = thread_index() % kWarpgroupThreads;
  const int64_t block = (padded_row(call, sequence, tile.head) + first_query) / kBlockM;
  const float* sums = params.dq_sum + block * kDqFloats<Shape> + part * (kBlockM * kColumns);
  float dq[kColumns / 2];
#pragma unroll
  for (int i = 0; i < kColumns / 2; i += 4) {
    const uint4 four = ld_global_16(sums + (i / 4 * kWarpgroupThreads + thread) * 4);
    memcpy(&dq[i], &four, sizeof(four));
  }
  const int column = part * kColumns;
  const int warp_row = thread / kWarpThreads * 16;
  const GradientRows rows = {first_query + warp_row, num_queries, num_queries, call.head_dim - column};
  T* gradient = head_of(static_cast<T*>(params.dq), params.dq_strides, sequence.batch, tile.head, sequence.query_start);
  unsigned char* tiles = align_shared<1024>(dynamic_shared_memory());
  store_gradient<T, kBlockM>(tiles + part * kTileBytes<kBlockM, kColumns>, warp_row, dq, call.scale, gradient + column,
                             params.dq_strides.row, rows);
}

}  // namespace fastattn
