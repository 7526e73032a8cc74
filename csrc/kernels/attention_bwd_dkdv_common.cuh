// Common parts of the backward passes over keys, of dk and dv alone and of all gradients: the shape, shared memory, the
// producer, probabilities and score gradients of a block of queries, and the store.
//
//     p  = exp2(log2(e) * score - lse_log2),   dp = v dout',   ds = p * (dp - delta) * dscore/dx,   x = scale * k q'
//
// Rows of p, dp and ds are keys here and columns queries, so that p and ds leave the accumulators in the register
// layout of an A operand.
#pragma once

#include "../device/panel.cuh"
#include "../device/pipeline.cuh"
#include "attention_bwd_common.cuh"
#include "attention_bwd_rows.cuh"
#include "attention_schedule.cuh"

namespace fastattn {

// What a block computes: one gradient at a time where the accumulators of both do not fit the registers.
enum class KeyGradients { kBoth, kKeys, kValues };

template <class Element_, int kHeadDim_, int kBlockN_, int kBlockM_, KeyGradients kWanted, bool kSoftcap_>
struct KeyGradientsShape {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockN = kBlockN_;  // keys of a block, 64 per consumer warpgroup, or 64 of both
  static constexpr int kBlockM = kBlockM_;  // queries of a stage
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr bool kKeys = kWanted != KeyGradients::kValues;
  static constexpr bool kValues = kWanted != KeyGradients::kKeys;

  // Whether keys are summed over too (dq): keys that do not exist must then be zeros.
  static constexpr bool kSumsOverKeys = false;

  static constexpr bool kKeysInRegisters = kHeadDim == 64;

  static constexpr int kStages = 2;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kMinBlocks = 1;  // per multiprocessor
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  static constexpr uint32_t kKeyBytes = kTileBytes<kBlockN, kHeadDim>;
  static constexpr uint32_t kQueryBytes = kTileBytes<kBlockM, kHeadDim>;
  static constexpr uint32_t kRowBytes = kBlockM * 4;  // of lse_log2, and of delta
  static constexpr uint32_t kStageBytes = 2 * kQueryBytes + 2 * kRowBytes;
  static constexpr uint32_t kValuesAt = kKeyBytes;
  static constexpr uint32_t kQueriesAt = 2 * kKeyBytes;
  static constexpr uint32_t kDoutAt = kQueriesAt + kStages * kQueryBytes;
  static constexpr uint32_t kLseAt = kDoutAt + kStages * kQueryBytes;
  static constexpr uint32_t kDeltaAt = kLseAt + kStages * kRowBytes;
  static constexpr uint32_t kBarriersAt = kDeltaAt + kStages * kRowBytes;
  static constexpr uint32_t kSharedBytes = kBarriersAt + 1024 + 128;  // 1024 to align the tiles

  static_assert(kHeadDim % kPanelColumns == 0 && kBlockN % 64 == 0 && kBlockM % 16 == 0);
  static_assert(kRowBlock % kBlockM == 0, "stages end where the padded rows do");
  static_assert((kBlockN == 64 * kConsumers || kBlockN == 64) && kSharedBytes <= kMaxSharedBytes);
  static_assert(registers_fit(kThreads, kMinBlocks, kProducerRegisters, kConsumerRegisters));
};

// The 64 keys of a warpgroup and their values as operands of the products for scores and dp. Where registers suffice
// they are loaded from shared memory once, because the loop is bound by its shared-memory reads.
template <class Shape>
struct KeyOperands {
  using T = typename Shape::Element;
  static constexpr int kSteps = Shape::kKeysInRegisters ? Shape::kHeadDim / 16 : 1;

  const unsigned char* key_tile;
  const unsigned char* value_tile;
  int first_row;
  uint32_t keys[kSteps][4];
  uint32_t values[kSteps][4];

  // Called after the tiles have arrived.
  FASTATTN_DEVICE void load() {
    if constexpr (Shape::kKeysInRegisters) {
      load_operand<Shape::kBlockN>(keys, key_tile, first_row);
      load_operand<Shape::kBlockN>(values, value_tile, first_row);
      pin_registers(keys);
      pin_registers(values);
    }
  }

  // Starts scores = keys queries^T.
  template <int Accumulators>
  FASTATTN_DEVICE void multiply_keys(float (&scores)[Accumulators], const unsigned char* queries) const {
    if constexpr (Shape::kKeysInRegisters) {
      multiply_transposed<T, Shape::kBlockM>(scores, keys, queries);
    } else {
      multiply_transposed<T, Shape::kBlockN, Shape::kBlockM, Shape::kHeadDim>(scores, key_tile, first_row, queries);
    }
  }

  // Starts dp = values dout^T.
  template <int Accumulators>
  FASTATTN_DEVICE void multiply_values(float (&dp)[Accumulators], const unsigned char* dout) const {
    if constexpr (Shape::kKeysInRegisters) {
      multiply_transposed<T, Shape::kBlockM>(dp, values, dout);
    } else {
      multiply_transposed<T, Shape::kBlockN, Shape::kBlockM, Shape::kHeadDim>(dp, value_tile, first_row, dout);
    }
  }
};

template <class Shape>
struct KeyGradientsShared {
  struct Barriers {
    Pipeline<Shape::kStages> queries;
    Mbarrier keys;
    Mbarrier landed;  // for stages whose last rows the producer zeroes before the consumers read them
    uint32_t ticket;  // this block's tile of keys, where blocks take tiles from a counter
  };
  static_assert(sizeof(Barriers) <= 128);

  unsigned char* base = align_shared<1024>(dynamic_shared_memory());
  unsigned char* keys = base;
  unsigned char* values = base + Shape::kValuesAt;
  Barriers* barriers = reinterpret_cast<Barriers*>(base + Shape::kBarriersAt);

  FASTATTN_DEVICE unsigned char* queries(int stage) const {
    return base + Shape::kQueriesAt + stage * Shape::kQueryBytes;
  }
  FASTATTN_DEVICE unsigned char* dout(int stage) const { return base + Shape::kDoutAt + stage * Shape::kQueryBytes; }
  FASTATTN_DEVICE float* lse_log2(int stage) const {
    return reinterpret_cast<float*>(base + Shape::kLseAt + stage * Shape::kRowBytes);
  }
  FASTATTN_DEVICE float* delta(int stage) const {
    return reinterpret_cast<float*>(base + Shape::kDeltaAt + stage * Shape::kRowBytes);
  }
};

// The order in which a tile takes its blocks of queries, of every head anew.
struct BlockWalk {
  int first;
  int last;
  int step;  // 1 or -1

  FASTATTN_DEVICE int after(int block) const { return block != last ? block + step : first; }
};

FASTATTN_DEVICE BlockWalk walk_of(const BlockRange& blocks, bool last_first) {
  if (last_first) return {blocks.end - 1, blocks.begin, -1};
  return {blocks.begin, blocks.end - 1, 1};
}

// The producer warp: loads the tile of keys and values, then every block of queries and dout of every head of the
// group.
template <class Shape>
FASTATTN_DEVICE void produce_queries(const AttentionBackwardParams& params, const BackwardMaps& maps,
                                     const KeyTile& tile, const BlockRange& blocks, const BlockWalk& walk,
                                     const KeyGradientsShared<Shape>& shared) {
  constexpr int kBlockM = Shape::kBlockM;
  constexpr int kHeadDim = Shape::kHeadDim;
  const Sequence& sequence = tile.sequence;
  const bool issues = elect_one();
  auto& barriers = *shared.barriers;
  uint32_t landed_parity = 0;
  const int keys = sequence.seen.num_keys > tile.first_key ? sequence.seen.num_keys - tile.first_key : 0;
  const bool zeroes_keys = Shape::kSumsOverKeys && keys < Shape::kBlockN;
  if (issues) {
    Mbarrier* arrived = zeroes_keys ? &barriers.landed : &barriers.keys;
    mbarrier_arrive_expect_tx(arrived, Shape::kKeyBytes * (Shape::kKeys ? 2 : 1));
    const int row = sequence.key_start + tile.first_key;
    load_tile<Shape::kBlockN, kHeadDim>(shared.keys, &maps.k, arrived, row, tile.kv_head, sequence.batch, kReadOnce);
    if (Shape::kKeys) {
      load_tile<Shape::kBlockN, kHeadDim>(shared.values, &maps.v, arrived, row, tile.kv_head, sequence.batch,
                                          kReadOnce);
    }
  }
  if (zeroes_keys) {
    zero_landed_rows<Shape::kBlockN, kHeadDim>(barriers.landed, landed_parity, barriers.keys, keys, issues, shared.keys,
                                               shared.values);
  }

  typename Pipeline<Shape::kStages>::State state;
  const int group_size = params.call.num_heads / params.call.num_kv_heads;
  for (int member = 0; member < group_size; ++member) {
    const int head = tile.kv_head * group_size + member;
    const int64_t padded = padded_row(params.call, sequence, head);
    int block = walk.first;
    for (int left = blocks.end - blocks.begin; left > 0; --left, block += walk.step, state.advance()) {
      const int first_query = block * kBlockM;
      // In a packed tensor the rows after the sequence's end belong to the next sequence, and may be NaN.
      const int rows = sequence.seen.num_queries - first_query;
      const bool zeroes = rows < kBlockM && params.call.cu_seqlens_q != nullptr;
      Mbarrier& full = barriers.queries.full[state.stage];
      Mbarrier& arrived = zeroes ? barriers.landed : full;
      barriers.queries.load(state, arrived, Shape::kStageBytes, issues, [&] {
        const int row = sequence.query_start + first_query;
        load_tile<kBlockM, kHeadDim>(shared.queries(state.stage), &maps.q, &arrived, row, head, sequence.batch,
                                     kReadAgain);
        load_tile<kBlockM, kHeadDim>(shared.dout(state.stage), &maps.dout, &arrived, row, head, sequence.batch,
                                     kReadAgain);
        bulk_load(shared.lse_log2(state.stage), params.lse_log2 + padded + first_query, Shape::kRowBytes, &arrived);
        bulk_load(shared.delta(state.stage), params.delta + padded + first_query, Shape::kRowBytes, &arrived);
      });
      if (zeroes) {
        zero_landed_rows<kBlockM, kHeadDim>(arrived, landed_parity, full, rows, issues, shared.queries(state.stage),
                                            shared.dout(state.stage));
      }
    }
  }
}

// p = exp2(log2(e) * score - lse_log2) of a warpgroup's 64 keys, rows of the block's tile from `row` on, and a block of
// queries; `scores` holds their products. slope = dscore/dx under a softcap.
template <class Shape, int N, int Slopes>
FASTATTN_DEVICE void probabilities(const ScoreScale& score_scale, const KeyTile& tile, const BlockRange& blocks,
                                   int row, int block, const float* lse_log2, const float (&scores)[N], float (&p)[N],
                                   float (&slope)[Slopes]) {
  const int thread = thread_index() % kWarpgroupThreads;
  copy_registers(p, scores);
  score_scale.template cap<Shape::kSoftcap>(p, slope);
  if (block < blocks.whole_begin || block >= blocks.whole_end) {
    mask_transposed_scores(p, tile.sequence.seen, thread, tile.first_key + row, block * Shape::kBlockM);
  }
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float* column = lse_log2 + fragment_column(thread) + fragment_offset(i);
    const float2 row_lse = ld_shared(reinterpret_cast<const float2*>(column));
    p[i] = exp2_approx(p[i] * score_scale.log2 - row_lse.x);
    p[i + 1] = exp2_approx(p[i + 1] * score_scale.log2 - row_lse.y);
    p[i + 2] = exp2_approx(p[i + 2] * score_scale.log2 - row_lse.x);
    p[i + 3] = exp2_approx(p[i + 3] * score_scale.log2 - row_lse.y);
  }
}

// ds = p * (dp - delta) * slope.
template <class Shape, int N, int Slopes>
FASTATTN_DEVICE void score_gradients(const ScoreScale& score_scale, const float* delta, const float (&p)[N],
                                     const float (&dp)[N], const float (&slope)[Slopes], float (&ds)[N]) {
  const int thread = thread_index() % kWarpgroupThreads;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float* column = delta + fragment_column(thread) + fragment_offset(i);
    const float2 row_delta = ld_shared(reinterpret_cast<const float2*>(column));
    ds[i] = p[i] * (dp[i] - row_delta.x);
    ds[i + 1] = p[i + 1] * (dp[i + 1] - row_delta.y);
    ds[i + 2] = p[i + 2] * (dp[i + 2] - row_delta.x);
    ds[i + 3] = p[i + 3] * (dp[i + 3] - row_delta.y);
  }
  score_scale.template uncap<Shape::kSoftcap>(ds, slope);
}

// Stores the gradients of a warpgroup's 64 keys, staged through their rows of the tiles of keys and values.
template <class Shape, int Accumulators>
FASTATTN_DEVICE void store_key_gradients(const AttentionBackwardParams& params, const KeyTile& tile,
                                         const KeyGradientsShared<Shape>& shared, int consumer,
                                         float (&dk)[Accumulators], float (&dv)[Accumulators]) {
  using T = typename Shape::Element;
  const Sequence& sequence = tile.sequence;
  warpgroup_sync(consumer);  // the last read of these rows is complete
  const int warp_row = consumer * 64 + warp_index() % 4 * 16;
  const GradientRows rows = {tile.first_key + warp_row, sequence.seen.num_keys, sequence.key_rows,
                             params.call.head_dim};
  if constexpr (Shape::kKeys) {
    const Strides& strides = params.dk_strides;
    T* gradient = head_of(static_cast<T*>(params.dk), strides, sequence.batch, tile.kv_head, sequence.key_start);
    store_gradient<T, Shape::kBlockN>(shared.keys, warp_row, dk, params.call.scale, gradient, strides.row, rows);
  }
  if constexpr (Shape::kValues) {
    const Strides& strides = params.dv_strides;
    T* gradient = head_of(static_cast<T*>(params.dv), strides, sequence.batch, tile.kv_head, sequence.key_start);
    store_gradient<T, Shape::kBlockN>(shared.values, warp_row, dv, 1.0f, gradient, strides.row, rows);
  }
}

// The tile of keys of this block, and the blocks of queries that see any of it. Each role computes them separately:
// values that are live across the branch between the roles would have to fit the producer's few registers.
struct KeyWork {
  KeyTile tile;
  BlockRange blocks;
};

template <class Shape>
FASTATTN_DEVICE KeyWork key_work(const AttentionParams& call, const TileSchedule& schedule, int number) {
  const Tile place = tile_at(schedule, number, TileOrder::kEven);
  // The schedule takes the last block first, but under causality the first block of keys is the longest.
  const int block = schedule.query_blocks - 1 - place.query_block;
  const KeyTile tile = key_tile<Shape::kBlockN>(call, block, place.batch_head);
  return {tile, query_blocks<Shape::kBlockM, Shape::kBlockN>(tile.sequence.seen, tile.first_key)};
}

}  // namespace fastattn
