// Attention backward for Hopper in one pass: a tile of keys per block, which adds to the gradient of every query it
// sees.
//
// What attention_bwd_dkdv_sm90.cuh does, and dq += ds k beside: five products where two passes take seven. dq is summed
// in float in global memory, by one block after another: for each block of queries the tiles of keys take turns, the
// last one first, so that the sum has the same bits every time. Blocks draw their tiles in that order, by a ticket: the
// tiles that one waits for belong to blocks that have started, whichever those are.
#pragma once

#include "attention_bwd_dkdv_sm90.cuh"

namespace fastattn {

template <class Element_, int kHeadDim_, int kBlockN_, int kBlockM_>
struct FusedGradientsShape : KeyGradientsShape<Element_, kHeadDim_, kBlockN_, kBlockM_, KeyGradients::kBoth, false> {
  using Base = KeyGradientsShape<Element_, kHeadDim_, kBlockN_, kBlockM_, KeyGradients::kBoth, false>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr bool kSumsOverKeys = true;

  static constexpr int kDqColumns = kHeadDim / 2;  // of a warpgroup
  static constexpr uint32_t kDsBytes = kTileBytes<kBlockM, kBlockN>;
  static constexpr uint32_t kDqBytes = kBlockM * kHeadDim * 4;
  static constexpr uint32_t kDsAt = (Base::kBarriersAt + 128 + 1023) / 1024 * 1024;  // two, used in turn
  static constexpr uint32_t kDqAt = kDsAt + 2 * kDsBytes;
  static constexpr uint32_t kSharedBytes = kDqAt + kDqBytes + 1024;  // 1024 to align the tiles

  static_assert(kBlockM == 64 && kBlockM == kSemaphoreRows, "a product for dq has 64 rows");
  static_assert(kDqColumns % kPanelColumns == 0, "each warpgroup takes whole panels of k");
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

// Floats of a block of queries in params.dq_sum: for each warpgroup, four by four, what its threads hold.
template <class Shape>
constexpr int kDqFloats = Shape::kBlockM * Shape::kHeadDim;

// Named barriers beside those of warpgroup_sync.
constexpr int kDsWritten = 3;
constexpr int kDqWritten = 4;
constexpr int kDqTaken = 5;

template <class Shape>
FASTATTN_DEVICE unsigned char* ds_tile(const KeyGradientsShared<Shape>& shared, int turn) {
  return shared.base + Shape::kDsAt + turn % 2 * Shape::kDsBytes;
}

template <class Shape>
FASTATTN_DEVICE float* dq_tile(const KeyGradientsShared<Shape>& shared) {
  return reinterpret_cast<float*>(shared.base + Shape::kDqAt);
}

// Writes a warp's ds, 16 keys by kRows queries in registers, to a tile of kRows queries whose column `column` its first
// key is.
template <int kRows, int Steps>
FASTATTN_DEVICE void store_transposed(unsigned char* tile, int column, const uint32_t (&ds)[Steps][4]) {
  const int lane = lane_index();
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
    const int row = step * 16 + lane / 16 * 8 + lane % 8;
    stmatrix_x4_transposed(tile + tile_offset<kRows>(row, column + lane / 8 % 2 * 8), ds[step]);
  }
}

// The sums over all queries for the 64 keys of a warpgroup, and its half of the columns of what these keys add to dq,
// handed over block by block. Nothing overlaps within a warpgroup: the next scores beside dq would not fit the
// registers.
template <class Shape, int Accumulators>
FASTATTN_DEVICE void accumulate_all_gradients(const AttentionBackwardParams& params, const KeyTile& tile,
                                              const BlockRange& blocks, const KeyGradientsShared<Shape>& shared,
                                              int consumer, float (&dk)[Accumulators], float (&dv)[Accumulators]) {
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
  const auto start_scores = [&](int stage) {
    wgmma_fence();
    multiply_transposed<T, kBlockN, kBlockM, Shape::kHeadDim>(scores, shared.keys, first_row, shared.queries(stage));
    wgmma_commit();
  };
  const auto start_dp = [&](int stage) {
    wgmma_fence();
    multiply_transposed<T, kBlockN, kBlockM, Shape::kHeadDim>(dp, shared.values, first_row, shared.dout(stage));
    wgmma_commit();
  };
  const auto hand_over = [&](float (&dq)[Shape::kDqColumns / 2]) {
    pin_registers(dq);
    named_barrier_sync(kDqTaken, kConsumerThreads + kWarpThreads);
    float4* tile_of_warpgroup =
        reinterpret_cast<float4*>(dq_tile(shared)) + consumer * (Shape::kDqColumns / 8) * kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < Shape::kDqColumns / 2; i += 4) {
      st_shared(&tile_of_warpgroup[i / 4 * kWarpgroupThreads + thread],
                make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]));
    }
    fence_proxy_async();
    named_barrier_arrive(kDqWritten, kConsumerThreads + kWarpThreads);
  };

  mbarrier_wait(&shared.barriers->keys, 0);
  if (steps == 0) return;
  queries.wait_full(state);
  start_scores(state.stage);
  start_dp(state.stage);
  int block = blocks.begin;
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
    hand_over(dq);
    if (++step == steps) break;
    state.advance();
    queries.wait_full(state);
    start_scores(state.stage);
    start_dp(state.stage);
    block = block + 1 < blocks.end ? block + 1 : blocks.begin;
  }
  pin_registers(dv);
  pin_registers(dk);
}

// One warp adds what the consumers hand over to the sums in global memory, when this tile's turn comes.
template <class Shape>
FASTATTN_DEVICE void add_dq(const AttentionBackwardParams& params, const KeyTile& tile, const BlockRange& blocks,
                            const KeyGradientsShared<Shape>& shared) {
  constexpr int kThreads = Shape::kConsumers * kWarpgroupThreads + kWarpThreads;
  const bool issues = elect_one();
  const int group_size = params.call.num_heads / params.call.num_kv_heads;
  const int key_block = tile.first_key / Shape::kBlockN;
  if (!blocks.empty()) named_barrier_arrive(kDqTaken, kThreads);
  for (int member = 0; member < group_size; ++member) {
    const int64_t first = padded_row(params.call, tile.sequence, tile.kv_head * group_size + member) / Shape::kBlockM;
    for (int block = blocks.begin; block < blocks.end; ++block) {
      const int last = key_blocks<Shape::kBlockM, Shape::kBlockN>(tile.sequence.seen, block * Shape::kBlockM).end - 1;
      named_barrier_sync(kDqWritten, kThreads);
      if (issues) {
        semaphore_wait(params.dq_semaphore + first + block, last - key_block);
        fence_proxy_async_global();
        bulk_reduce_add(params.dq_sum + (first + block) * kDqFloats<Shape>, dq_tile(shared), Shape::kDqBytes);
        bulk_commit();
        bulk_wait_read<0>();
      }
      warp_sync();
      const bool is_last = member + 1 == group_size && block + 1 == blocks.end;
      if (!is_last) named_barrier_arrive(kDqTaken, kThreads);
      if (issues) {
        bulk_wait<0>();
        fence_proxy_async_global();
        semaphore_add_release(params.dq_semaphore + first + block, 1);
      }
      warp_sync();  // a named barrier takes whole warps
    }
  }
}

// The tile of keys of the block that drew `ticket`: like key_work, but the last tiles of all heads come first, as their
// turns do.
template <class Shape>
FASTATTN_DEVICE KeyWork turn_work(const AttentionParams& call, const TileSchedule& schedule, uint32_t ticket) {
  const Tile place = tile_at(schedule, static_cast<int>(ticket));
  const KeyTile tile = key_tile<Shape::kBlockN>(call, place.query_block, place.plane);
  return {tile, query_blocks<Shape::kBlockM, Shape::kBlockN>(tile.sequence.seen, tile.first_key)};
}

// One block owns kBlockN keys of one head of one sequence.
template <class Shape>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(Shape::kThreads, Shape::kMinBlocks)
    attention_bwd_fused_kernel(const FASTATTN_GRID_CONSTANT AttentionBackwardParams params,
                               const FASTATTN_GRID_CONSTANT BackwardMaps maps,
                               const FASTATTN_GRID_CONSTANT TileSchedule schedule) {
  const KeyGradientsShared<Shape> shared;
  if (thread_index() == 0) {
    shared.barriers->queries.init(Shape::kConsumers * kWarpgroupThreads / kWarpThreads);
    mbarrier_init(&shared.barriers->keys, 1);
    mbarrier_init(&shared.barriers->landed, 1);
    fence_barrier_init();
    st_shared(&shared.barriers->ticket, counter_fetch_add(params.ticket, 1));
  }
  block_sync();

  const int consumer = warpgroup_index() - 1;
  if (consumer < 0) {
    decrease_registers<Shape::kProducerRegisters>();
    if (warp_index() > 1) return;
    const auto [tile, blocks] = turn_work<Shape>(params.call, schedule, ld_shared(&shared.barriers->ticket));
    if (tile.first_key >= tile.sequence.key_rows) return;
    if (warp_index() == 0) {
      produce_queries<Shape>(params, maps, tile, blocks, shared);
    } else {
      add_dq<Shape>(params, tile, blocks, shared);
    }
  } else {
    increase_registers<Shape::kConsumerRegisters>();
    const auto [tile, blocks] = turn_work<Shape>(params.call, schedule, ld_shared(&shared.barriers->ticket));
    if (tile.first_key >= tile.sequence.key_rows) return;
    float dk[Shape::kHeadDim / 2] = {};
    float dv[Shape::kHeadDim / 2] = {};
    accumulate_all_gradients<Shape>(params, tile, blocks, shared, consumer, dk, dv);
    store_key_gradients<Shape>(params, tile, shared, consumer, dk, dv);
  }
}

// dq = scale * dq_sum, rounded. One block of two warpgroups per kBlockM queries of one head.
template <class Shape>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(2 * kWarpgroupThreads, 2)
    attention_bwd_finish_kernel(const FASTATTN_GRID_CONSTANT AttentionBackwardParams params) {
  using T = typename Shape::Element;
  constexpr int kBlockM = Shape::kBlockM;
  constexpr int kBlocks = kRowBlock / kBlockM;
  const AttentionParams& call = params.call;
  const int row_blocks = query_row_blocks(call);
  const int row_block = block_index().x / kBlocks;
  const QueryTile tile = query_tile<kRowBlock>(call, row_block % row_blocks, row_block / row_blocks);
  const Sequence& sequence = tile.sequence;
  const int first_query = tile.first_query + block_index().x % kBlocks * kBlockM;
  const int num_queries = sequence.seen.num_queries;
  if (first_query >= num_queries) return;

  const int half = thread_index() / kWarpgroupThreads;
  const int thread = thread_index() % kWarpgroupThreads;
  const int64_t block = (padded_row(call, sequence, tile.head) + first_query) / kBlockM;
  const float* sums = params.dq_sum + block * kDqFloats<Shape> + half * (kDqFloats<Shape> / 2);
  float dq[Shape::kDqColumns / 2];
#pragma unroll
  for (int i = 0; i < Shape::kDqColumns / 2; i += 4) {
    const uint4 four = ld_global_16(sums + (i / 4 * kWarpgroupThreads + thread) * 4);
    memcpy(&dq[i], &four, sizeof(four));
  }
  const int column = half * Shape::kDqColumns;
  const int warp_row = thread / kWarpThreads * 16;
  const GradientRows rows = {first_query + warp_row, num_queries, num_queries, call.head_dim - column};
  T* gradient = head_of(static_cast<T*>(params.dq), params.dq_strides, sequence.batch, tile.head, sequence.query_start);
  unsigned char* tiles = align_shared<1024>(dynamic_shared_memory());
  store_gradient<T, kBlockM>(tiles + half * kTileBytes<kBlockM, Shape::kDqColumns>, warp_row, dq, call.scale,
                             gradient + column, params.dq_strides.row, rows);
}

template <class Shape>
constexpr uint32_t kFinishSharedBytes = 2 * kTileBytes<Shape::kBlockM, Shape::kDqColumns> + 1024;

}  // namespace fastattn
