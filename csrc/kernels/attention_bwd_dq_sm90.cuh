// Attention backward for Hopper: the gradient of queries, one tile of queries per block.
//
//     p  = exp2(log2(e) * score - lse_log2),   dp = dout v',   ds = p * (dp - delta) * dscore/dx,   x = scale * q k'
//     dq = scale * sum over keys of ds k
#pragma once

#include "../device/panel.cuh"
#include "../device/pipeline.cuh"
#include "attention_bwd_common.cuh"
#include "attention_bwd_rows.cuh"
#include "attention_schedule.cuh"

namespace fastattn {

template <class Element_, int kHeadDim_, int kBlockM_, int kBlockN_, bool kSoftcap_>
struct QueryGradientShape {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kBlockM_;  // queries of a block, 64 per consumer warpgroup
  static constexpr int kBlockN = kBlockN_;  // keys of a stage
  static constexpr bool kSoftcap = kSoftcap_;

  static constexpr int kStages = 2;
  static constexpr int kConsumers = kBlockM / 64;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kMinBlocks = 1;  // per multiprocessor
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  static constexpr uint32_t kQueryBytes = kTileBytes<kBlockM, kHeadDim>;
  static constexpr uint32_t kKeyBytes = kTileBytes<kBlockN, kHeadDim>;
  static constexpr uint32_t kDoutAt = kQueryBytes;
  static constexpr uint32_t kKeysAt = 2 * kQueryBytes;
  static constexpr uint32_t kValuesAt = kKeysAt + kStages * kKeyBytes;
  static constexpr uint32_t kBarriersAt = kValuesAt + kStages * kKeyBytes;
  static constexpr uint32_t kSharedBytes = kBarriersAt + 1024 + 128;  // 1024 to align the tiles

  static_assert(kHeadDim % kPanelColumns == 0 && kBlockM % 64 == 0 && kBlockN % 16 == 0);
  static_assert(kRowBlock % kBlockM == 0);
  static_assert(kConsumers == 2 && kSharedBytes <= kMaxSharedBytes);
  static_assert(registers_fit(kThreads, kMinBlocks, kProducerRegisters, kConsumerRegisters));
};

template <class Shape>
struct QueryGradientShared {
  struct Barriers {
    Pipeline<Shape::kStages> keys;
    Mbarrier queries;
    Mbarrier landed;  // for stages whose last rows the producer zeroes before the consumers read them
  };

  unsigned char* base = align_shared<1024>(dynamic_shared_memory());
  unsigned char* queries = base;
  unsigned char* dout = base + Shape::kDoutAt;
  Barriers* barriers = reinterpret_cast<Barriers*>(base + Shape::kBarriersAt);

  FASTATTN_DEVICE unsigned char* keys(int stage) const { return base + Shape::kKeysAt + stage * Shape::kKeyBytes; }
  FASTATTN_DEVICE unsigned char* values(int stage) const { return base + Shape::kValuesAt + stage * Shape::kKeyBytes; }
};

// The producer warp: loads the tile of queries and dout, then every block of keys and values.
template <class Shape>
FASTATTN_DEVICE void produce_keys(const AttentionBackwardParams& params, const BackwardMaps& maps,
                                  const QueryTile& tile, const BlockRange& blocks,
                                  const QueryGradientShared<Shape>& shared) {
  constexpr int kBlockN = Shape::kBlockN;
  constexpr int kHeadDim = Shape::kHeadDim;
  const Sequence& sequence = tile.sequence;
  const int kv_head = tile.head / (params.call.num_heads / params.call.num_kv_heads);
  const bool issues = elect_one();
  auto& barriers = *shared.barriers;
  if (issues) {
    mbarrier_arrive_expect_tx(&barriers.queries, 2 * Shape::kQueryBytes);
    const int row = sequence.query_start + tile.first_query;
    load_tile<Shape::kBlockM, kHeadDim>(shared.queries, &maps.q, &barriers.queries, row, tile.head, sequence.batch,
                                        kReadOnce);
    load_tile<Shape::kBlockM, kHeadDim>(shared.dout, &maps.dout, &barriers.queries, row, tile.head, sequence.batch,
                                        kReadOnce);
  }

  typename Pipeline<Shape::kStages>::State state;
  uint32_t landed_parity = 0;
  for (int block = blocks.begin; block < blocks.end; ++block, state.advance()) {
    const int first_key = block * kBlockN;
    // Rows past the last key may hold anything, unless they lie outside the tensor, where TMA reads zeros.
    const int rows = sequence.seen.num_keys - first_key;
    const bool zeroes = rows < kBlockN && (params.call.cu_seqlens_k != nullptr || params.call.key_lengths != nullptr);
    Mbarrier& full = barriers.keys.full[state.stage];
    Mbarrier& arrived = zeroes ? barriers.landed : full;
    barriers.keys.load(state, arrived, 2 * Shape::kKeyBytes, issues, [&] {
      const int row = sequence.key_start + first_key;
      load_tile<kBlockN, kHeadDim>(shared.keys(state.stage), &maps.k, &arrived, row, kv_head, sequence.batch,
                                   kReadAgain);
      load_tile<kBlockN, kHeadDim>(shared.values(state.stage), &maps.v, &arrived, row, kv_head, sequence.batch,
                                   kReadAgain);
    });
    if (zeroes) {
      zero_landed_rows<kBlockN, kHeadDim>(arrived, landed_parity, full, rows, issues, shared.keys(state.stage),
                                          shared.values(state.stage));
    }
  }
}

// The main loop of a consumer warpgroup: accumulates ds k of its 64 queries over all the keys they see. The next
// block's score product is in flight while this block's gradient is accumulated, and the dp product while the scores
// become p.
template <class Shape, int Accumulators>
FASTATTN_DEVICE void accumulate_query_gradient(const AttentionBackwardParams& params, const QueryTile& tile,
                                               const BlockRange& blocks, const QueryGradientShared<Shape>& shared,
                                               int first_row, float (&dq)[Accumulators]) {
  using T = typename Shape::Element;
  constexpr int kBlockN = Shape::kBlockN;
  const int thread = thread_index() % kWarpgroupThreads;
  const ScoreScale score_scale(params.call);
  auto& keys = shared.barriers->keys;
  const auto start_scores = [&](float (&scores)[kBlockN / 2], int stage) {
    wgmma_fence();
    multiply_transposed<T, Shape::kBlockM, kBlockN, Shape::kHeadDim>(scores, shared.queries, first_row,
                                                                     shared.keys(stage));
    wgmma_commit();
  };
  const auto start_dp = [&](float (&dp)[kBlockN / 2], int stage) {
    wgmma_fence();
    multiply_transposed<T, Shape::kBlockM, kBlockN, Shape::kHeadDim>(dp, shared.dout, first_row, shared.values(stage));
    wgmma_commit();
  };

  const int64_t row =
      padded_row(params.call, tile.sequence, tile.head) + tile.first_query + first_row + fragment_row(thread);
  const float lse_log2[2] = {params.lse_log2[row], params.lse_log2[row + 8]};
  const float delta[2] = {params.delta[row], params.delta[row + 8]};

  // Written by wgmma only: any other write would have to wait for the products in flight.
  float scores[kBlockN / 2];
  float dp[kBlockN / 2];
  typename Pipeline<Shape::kStages>::State state;
  mbarrier_wait(&shared.barriers->queries, 0);
  if (blocks.empty()) return;
  keys.wait_full(state);
  start_scores(scores, state.stage);
  start_dp(dp, state.stage);
  for (int block = blocks.begin;; ++block) {
    wgmma_wait<1>();
    pin_registers(scores);
    float p[kBlockN / 2];
    float slope[Shape::kSoftcap ? kBlockN / 2 : 1];  // dscore/dx
    copy_registers(p, scores);
    score_scale.template cap<Shape::kSoftcap>(p, slope);
    if (block < blocks.whole_begin || block >= blocks.whole_end) {
      mask_scores(p, tile.sequence.seen, thread, tile.first_query + first_row, block * kBlockN);
    }
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) p[i] = exp2_approx(p[i] * score_scale.log2 - lse_log2[fragment_half(i)]);
    auto next = state;
    next.advance();
    const bool last = block + 1 == blocks.end;
    // Stands here for its branch: without one, ptxas moves the arithmetic above past the wait below, and nothing
    // overlaps the dp product.
    if (!last) keys.wait_full(next);
    wgmma_wait<0>();
    pin_registers(dp);
    float ds[kBlockN / 2];
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) ds[i] = p[i] * (dp[i] - delta[fragment_half(i)]);
    score_scale.template uncap<Shape::kSoftcap>(ds, slope);
    uint32_t ds_operand[kBlockN / 16][4];
    to_operand<T>(ds, ds_operand);
    pin_registers(ds_operand);
    wgmma_fence();
    multiply_add<T, kBlockN>(dq, ds_operand, shared.keys(state.stage));
    wgmma_commit();

    if (last) break;
    start_scores(scores, next.stage);
    wgmma_wait<1>();
    release_stage(keys, state);
    start_dp(dp, next.stage);
    state = next;
  }
  wgmma_wait<0>();
  pin_registers(dq);
}

// The tile of queries of this block, and the blocks of keys that it sees any of. Each role computes them separately:
// values that are live across the branch between the roles would have to fit the producer's few registers.
struct QueryWork {
  QueryTile tile;
  BlockRange blocks;
};

template <class Shape>
FASTATTN_DEVICE QueryWork query_work(const AttentionParams& call, const TileSchedule& schedule, int number) {
  const Tile place = tile_at(schedule, number, TileOrder::kEven);
  const QueryTile tile = query_tile<Shape::kBlockM>(call, place.query_block, place.batch_head);
  return {tile, key_blocks<Shape::kBlockM, Shape::kBlockN>(tile.sequence.seen, tile.first_query)};
}

// One block owns kBlockM queries of one head of one sequence: their gradient over all the keys they see.
template <class Shape>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(Shape::kThreads, Shape::kMinBlocks)
    attention_bwd_dq_kernel(const FASTATTN_GRID_CONSTANT AttentionBackwardParams params,
                            const FASTATTN_GRID_CONSTANT BackwardMaps maps,
                            const FASTATTN_GRID_CONSTANT TileSchedule schedule) {
  using T = typename Shape::Element;
  const QueryGradientShared<Shape> shared;
  if (thread_index() == 0) {
    shared.barriers->keys.init(Shape::kConsumers * kWarpgroupThreads / kWarpThreads);
    mbarrier_init(&shared.barriers->queries, 1);
    mbarrier_init(&shared.barriers->landed, 1);
    fence_barrier_init();
    prefetch_maps(maps);
  }
  block_sync();

  const int consumer = warpgroup_index() - 1;
  if (consumer < 0) {
    decrease_registers<Shape::kProducerRegisters>();
    if (warp_index() != 0) return;
    const auto [tile, blocks] = query_work<Shape>(params.call, schedule, block_index().x);
    if (tile.first_query < tile.sequence.seen.num_queries) produce_keys<Shape>(params, maps, tile, blocks, shared);
  } else {
    increase_registers<Shape::kConsumerRegisters>();
    const auto [tile, blocks] = query_work<Shape>(params.call, schedule, block_index().x);
    const Sequence& sequence = tile.sequence;
    const int num_queries = sequence.seen.num_queries;
    if (tile.first_query >= num_queries) return;
    const int first_row = consumer * 64;
    float dq[Shape::kHeadDim / 2] = {};
    accumulate_query_gradient<Shape>(params, tile, blocks, shared, first_row, dq);

    // The last read of the warpgroup's own rows of the tile of queries is complete.
    warpgroup_sync(consumer);
    const int warp_row = first_row + warp_index() % 4 * 16;
    const GradientRows rows = {tile.first_query + warp_row, num_queries, num_queries, params.call.head_dim};
    const Strides& strides = params.dq_strides;
    T* gradient = head_of(static_cast<T*>(params.dq), strides, sequence.batch, tile.head, sequence.query_start);
    store_gradient<T, Shape::kBlockM>(shared.queries, warp_row, dq, params.call.scale, gradient, strides.row, rows);
  }
}

}  // namespace fastattn
