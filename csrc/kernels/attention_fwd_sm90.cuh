// Attention forward for Hopper: persistent blocks of a producer warpgroup and two or three consumer warpgroups.
#pragma once

#include "../device/online_softmax.cuh"
#include "attention_fwd_common.cuh"

namespace fastattn {

// The producer warp: per tile it loads the queries, then the blocks of keys and values from the last to the first.
template <class Shape>
struct ForwardProducer {
  using Shared = ForwardShared<Shape>;
  using State = PipelineState<Shape::kStages>;

  const ForwardMaps& maps;
  const AttentionParams& params;
  Shared shared;
  bool issues = elect_one();  // the elected lane
  TileQueue::State tile_state = {};
  Pipeline<1>::State query_state = {};
  State ring_state = {};  // one state for the pipelines of keys and of values, which advance together
  uint32_t landed_parity = 0;

  FASTATTN_DEVICE void run(const TileSchedule& schedule) {
    const int rank = Shape::kCluster > 1 ? cluster_rank() : 0;
    for (int number = first_tile_number<Shape::kCluster>(); number < schedule.num_tiles;
         number = next_tile_number<Shape::kCluster>(params.tile_counter, number)) {
      const QueryTile tile = forward_tile_at<Shape>(params, schedule, number, rank);
      if (Shape::kCluster == 1 && tile.first_query >= tile.sequence.seen.num_queries) continue;
      shared.barriers().tiles.put(tile_state, tile, issues);
      load_tile_of(tile);
    }
    shared.barriers().tiles.put(tile_state, no_tile(), issues);
  }

  // The first keys are loaded before the queries, whose shared memory is released later.
  FASTATTN_DEVICE void load_tile_of(const QueryTile& tile) {
    auto& barriers = shared.barriers();
    const Sequence& sequence = tile.sequence;
    const int kv_head = tile.head / (params.num_heads / params.num_kv_heads);
    const BlockRange blocks = forward_key_blocks<Shape>(sequence.seen, tile.first_query);
    int block = blocks.end - 1;
    if (block >= blocks.begin) load_keys(sequence, block, kv_head);
    load<Shape::kBlockM>(barriers.queries, query_state, barriers.queries.full[0], shared.queries(), maps.q,
                         sequence.query_start + tile.first_query, tile.head, sequence.batch);
    query_state.advance();
    while (block >= blocks.begin) {
      load_values(sequence, block, kv_head);
      ring_state.advance();
      if (--block >= blocks.begin) load_keys(sequence, block, kv_head);
    }
  }

  FASTATTN_DEVICE void load_keys(const Sequence& sequence, int block, int kv_head) {
    auto& barriers = shared.barriers();
    load<Shape::kBlockN>(barriers.keys, ring_state, barriers.keys.full[ring_state.stage], shared.keys(ring_state.stage),
                         maps.k, sequence.key_start + block * Shape::kBlockN, kv_head, sequence.batch);
  }

  FASTATTN_DEVICE void load_values(const Sequence& sequence, int block, int kv_head) {
    auto& barriers = shared.barriers();
    const int first_row = sequence.key_start + block * Shape::kBlockN;
    const int keys_here = sequence.seen.num_keys - block * Shape::kBlockN;
    const bool others_follow = sequence.key_start + sequence.seen.num_keys < params.total_k;
    if (Shape::kCluster == 1 && keys_here < Shape::kBlockN && others_follow) {
      load_values_zeroed_from(keys_here, first_row, kv_head, sequence.batch);
    } else {
      load<Shape::kBlockN>(barriers.values, ring_state, barriers.values.full[ring_state.stage],
                           shared.values(ring_state.stage), maps.v, first_row, kv_head, sequence.batch);
    }
  }

  // Starts loading a tile of kRows rows to a stage once that is empty; where kBlocks load it together, this block's
  // share.
  template <int kRows, int kStages, int kBlocks>
  FASTATTN_DEVICE void load(Pipeline<kStages, kBlocks>& pipeline, PipelineState<kStages> state, Mbarrier& arrived,
                            unsigned char* tile, const CUtensorMap& map, int row, int head, int batch) {
    pipeline.load(state, arrived, kTileBytes<kRows, Shape::kHeadDim>, issues, [&] {
      if constexpr (kBlocks == 1) {
        load_tile<kRows, Shape::kHeadDim>(tile, &map, &arrived, row, head, batch);
      } else {
        load_tile_multicast<kRows, Shape::kHeadDim, kBlocks>(tile, &map, &arrived, row, head, batch);
      }
    });
  }

  // Loads a tile of values whose rows from keys_here on exist in memory but are not of this sequence. Their
  // probabilities are 0, but 0 * NaN is NaN: the warp zeroes these rows before the consumers see the tile.
  FASTATTN_DEVICE void load_values_zeroed_from(int keys_here, int row, int head, int batch) {
    auto& barriers = shared.barriers();
    unsigned char* tile = shared.values(ring_state.stage);
    load<Shape::kBlockN>(barriers.values, ring_state, barriers.landed, tile, maps.v, row, head, batch);
    zero_landed_rows<Shape::kBlockN, Shape::kHeadDim>(barriers.landed, landed_parity,
                                                      barriers.values.full[ring_state.stage], keys_here, issues, tile);
  }
};

// A consumer warpgroup, which owns 64 queries of each tile, their online softmax and their rows of the result.
//
// The score product of a block is issued before the product of the previous block's probabilities with its values, so
// that the tensor cores run the latter during the softmax of the former. A ping-pong barrier orders the warpgroups: the
// softmax of one overlaps the products of the other.
template <class Shape>
struct ForwardConsumer {
  using Element = typename Shape::Element;
  using State = PipelineState<Shape::kStages>;

  const ForwardMaps& maps;
  const AttentionParams& params;
  ForwardShared<Shape> shared;
  int group;   // which 64 rows of the tile
  int thread;  // within the warpgroup
  TileQueue::State tile_state = {};
  Pipeline<1>::State query_state = {};
  State key_state = {};
  State value_state = {};

  OnlineSoftmax softmax = {};
  float scores[Shape::kBlockN / 2];             // 64 x kBlockN: scores of the current block, then its probabilities
  uint32_t probs[Shape::kBlockN / 16][4] = {};  // the same, rounded, as operands of the next product
  float out[Shape::kHeadDim / 2];               // 64 x kHeadDim

  FASTATTN_DEVICE void run() {
    if (Shape::kPingPong && group == Shape::kConsumers - 1) ping_pong_arrive();
    TileQueue& tiles = shared.barriers().tiles;
    while (true) {
      tiles.wait(tile_state);
      const auto [sequence, head, first_query] = tiles.get(tile_state);
      if (head < 0) break;
      const BlockRange blocks = forward_key_blocks<Shape>(sequence.seen, first_query);
      const bool has_keys = !blocks.empty();
      attend(sequence.seen, blocks, first_query + group * kWarpgroupRows);
      store(tiles.get(tile_state), has_keys);
      query_state.advance();
      tiles.release(tile_state);
    }
    if (Shape::kPingPong && group == 0) ping_pong_wait();  // no warpgroup waits for the last arrival
    if (thread == 0) bulk_wait<0>();
  }

  // Computes the unnormalised result of the queries from `query` on. Where the result has no buffer of its own, the
  // last stage of values is not released, nor are the queries of a tile without keys.
  FASTATTN_DEVICE void attend(const Visibility& seen, const BlockRange& blocks, int query) {
    auto& barriers = shared.barriers();
    softmax = {};
#pragma unroll
    for (int i = 0; i < Shape::kHeadDim / 2; ++i) out[i] = 0.0f;
    barriers.queries.wait_full(query_state);
    if (!blocks.empty()) {
      barriers.keys.wait_full(key_state);
      multiply_keys();
      wgmma_wait<0>();
      pin_registers(scores);
      release(barriers.keys, key_state);
      float rescale[2];
      if (blocks.end > blocks.whole_begin) {
        softmax_step<Mask::kEnd>(seen, query, blocks.end - 1, rescale);
      } else {
        softmax_step<Mask::kBoth>(seen, query, blocks.end - 1, rescale);
      }
      to_operand<Element>(scores, probs);
      int block = blocks.end - 2;
      if (block >= blocks.begin) barriers.keys.wait_full(key_state);
      for (; block >= blocks.whole_end; --block) step<Mask::kEnd>(seen, query, block, blocks.begin);
      for (; block >= blocks.whole_begin; --block) step<Mask::kNone>(seen, query, block, blocks.begin);
      for (; block >= blocks.begin; --block) step<Mask::kBoth>(seen, query, block, blocks.begin);
    }
    if (Shape::kOwnOut || !blocks.empty()) release_queries();
    if (!blocks.empty()) {
      barriers.values.wait_full(value_state);
      multiply_values();
      wgmma_wait<0>();
      pin_registers(out);
      if (Shape::kOwnOut) release(barriers.values, value_state);
    }
  }

  // Computes the scores of this block, whose keys have arrived, and accumulates the result of the previous block.
  //
  // The wait for the keys of the next block stands between the softmax and the wait for the second product: ptxas would
  // move the latter wait ahead of the softmax, which would then overlap nothing, but does not move it across a branch.
  template <Mask kMask>
  FASTATTN_DEVICE void step(const Visibility& seen, int query, int block, int last_block) {
    auto& barriers = shared.barriers();
    if (Shape::kPingPong) ping_pong_wait();
    multiply_keys();
    barriers.values.wait_full(value_state);
    multiply_values();
    if (Shape::kPingPong) ping_pong_arrive();
    wgmma_wait<1>();
    pin_registers(scores);
    release(barriers.keys, key_state);
    float rescale[2];
    softmax_step<kMask>(seen, query, block, rescale);
    pin_registers(scores);
    if (block > last_block) barriers.keys.wait_full(key_state);
    wgmma_wait<0>();
    pin_registers(out);
    release(barriers.values, value_state);
    scale_rows(out, rescale);
    to_operand<Element>(scores, probs);
  }

  // Starts scores = q k^T.
  FASTATTN_DEVICE void multiply_keys() {
    pin_registers(scores);
    wgmma_fence();
    multiply_transposed<Element, Shape::kBlockM, Shape::kBlockN, Shape::kHeadDim>(
        scores, shared.queries(), group * kWarpgroupRows, shared.keys(key_state.stage));
    wgmma_commit();
  }

  // Starts out += probs v.
  FASTATTN_DEVICE void multiply_values() {
    pin_registers(out);
    pin_registers(probs);
    wgmma_fence();
    multiply_add<Element, Shape::kBlockN>(out, probs, shared.values(value_state.stage));
    wgmma_commit();
  }

  // Converts products to scores, and scores to probabilities.
  template <Mask kMask>
  FASTATTN_DEVICE void softmax_step(const Visibility& seen, int query, int block, float (&rescale)[2]) {
    float factor = params.scale * kLog2E;
    if (Shape::kSoftcap) {
      const float into_cap = params.scale / params.softcap;
#pragma unroll
      for (int i = 0; i < Shape::kBlockN / 2; ++i) scores[i] = tanh_exact(scores[i] * into_cap);
      factor = params.softcap * kLog2E;
    }
    mask_scores<kMask>(scores, seen, thread, query, block * Shape::kBlockN);
    softmax.update(scores, factor, rescale);
  }

  // Writes the warpgroup's rows of a tile: staged in shared memory, then by TMA, which clips at the tensor's end; where
  // another sequence follows, row by row. Releases the stage that attend() kept.
  FASTATTN_DEVICE void store(const QueryTile& tile, bool has_keys) {
    const auto& [sequence, head, first_query] = tile;
    const int query = first_query + group * kWarpgroupRows;
    float inverse_sum[2], lse[2];
    softmax.finish(inverse_sum, lse);
    scale_rows(out, inverse_sum);
    const int rows_here = sequence.seen.num_queries - query;
    const int64_t row = sequence.query_start + query;
    store_lse(lse, sequence.batch, head, row, rows_here);

    unsigned char* stage = Shape::kOwnOut ? shared.out()
                           : has_keys     ? shared.values(value_state.stage)
                                          : shared.queries();
    if (Shape::kOwnOut) {
      if (thread == 0) bulk_wait_read<0>();
      warpgroup_sync();
    } else {
      consumers_sync();  // all warpgroups have finished reading the values in this stage
    }
#pragma unroll
    for (int first = 0; first < Shape::kHeadDim; first += Shape::kOutColumns) {
      if (first > 0) {
        if (thread == 0) bulk_wait_read<0>();
        warpgroup_sync();
      }
      const auto& columns = reinterpret_cast<const float (&)[Shape::kOutColumns / 2]>(out[first / 2]);
      store_fragment<Element, Shape::kBlockM>(stage, group * kWarpgroupRows + thread / kWarpThreads * 16, columns);
      fence_proxy_async();
      warpgroup_sync();
      if (rows_here >= kWarpgroupRows || row + rows_here == params.total_q) {
        if (thread == 0) {
          for (int column = 0; column < Shape::kOutColumns; column += kPanelColumns) {
            tma_store_4d(&maps.out, stage + tile_offset<Shape::kBlockM>(group * kWarpgroupRows, column), first + column,
                         static_cast<int>(row), head, sequence.batch);
          }
          bulk_commit();
        }
      } else {
        store_rows(stage, first, sequence.batch, head, row, rows_here);
      }
    }
    if (Shape::kOwnOut) return;
    if (thread == 0) bulk_wait_read<0>();
    if (has_keys) {
      warp_sync();
      release(shared.barriers().values, value_state);
    } else {
      release_queries();
    }
  }

  FASTATTN_DEVICE void store_lse(const float (&lse)[2], int batch, int head, int64_t row, int rows_here) {
    if (thread % 4 != 0) return;
    float* first = params.lse + batch * params.lse_strides.batch + head * params.lse_strides.head + row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = fragment_row(thread) + 8 * half;
      if (r < rows_here) first[r] = lse[half];
    }
  }

  // Stages the columns from `first_column` on in `stage`.
  FASTATTN_DEVICE void store_rows(const unsigned char* stage, int first_column, int batch, int head, int64_t row,
                                  int rows_here) {
    constexpr int kColumnsPerStore = 16 / sizeof(Element);
    constexpr int kStoresPerRow = Shape::kOutColumns / kColumnsPerStore;
    Element* first = static_cast<Element*>(params.out) + batch * params.out_strides.batch +
                     head * params.out_strides.head + row * params.out_strides.row + first_column;
    for (int i = recomputed(thread); i < kWarpgroupRows * kStoresPerRow; i += kWarpgroupThreads) {
      const int r = i / kStoresPerRow;
      const int column = i % kStoresPerRow * kColumnsPerStore;
      if (r >= rows_here || first_column + column >= params.head_dim) continue;
      const unsigned char* source = stage + tile_offset<Shape::kBlockM>(group * kWarpgroupRows + r, column);
      st_global_16(first + r * params.out_strides.row + column, ld_shared(reinterpret_cast<const uint4*>(source)));
    }
  }

  // Releases a stage at every block of the cluster: one arrival per warp, after a wgmma wait has covered its reads.
  template <int kStages, int kBlocks>
  FASTATTN_DEVICE void release(Pipeline<kStages, kBlocks>& pipeline, PipelineState<kStages>& state) {
    if (thread % kWarpThreads == 0) pipeline.release(state);
    state.advance();
  }

  // A tile without keys has no wgmma wait: the lanes reconverge before the release, so that none still waits for the
  // queries.
  FASTATTN_DEVICE void release_queries() {
    warp_sync();
    if (thread % kWarpThreads == 0) shared.barriers().queries.release(query_state);
  }

  // Named barriers 1 .. 3: the ping-pong barrier of each warpgroup, where the one before it arrives; 4 .. 6: its own
  // threads; 7: all consumers.
  FASTATTN_DEVICE void ping_pong_wait() { named_barrier_sync(1 + group, 2 * kWarpgroupThreads); }
  FASTATTN_DEVICE void ping_pong_arrive() {
    named_barrier_arrive(1 + (group + 1) % Shape::kConsumers, 2 * kWarpgroupThreads);
  }
  FASTATTN_DEVICE void warpgroup_sync() { named_barrier_sync(4 + group, kWarpgroupThreads); }
  FASTATTN_DEVICE void consumers_sync() { named_barrier_sync(7, Shape::kConsumers * kWarpgroupThreads); }
};

// out = softmax(scores) v and lse = logsumexp(scores), where scores = scale q k^T, capped and masked as params say.
//
// A block owns one tile of queries at a time, and takes tiles in the schedule's order. Warpgroup 0 is the producer: it
// releases registers, and its first warp issues the TMA loads. Each other warpgroup owns 64 queries of the tile.
// Queries, keys and values reach the consumers through pipelines in shared memory. Bits depend on a tile's own data
// only, neither on the block nor on clusters.
template <class Shape>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(Shape::kThreads, Shape::kMinBlocks)
    attention_fwd_sm90(FASTATTN_GRID_CONSTANT const ForwardMaps maps,
                       FASTATTN_GRID_CONSTANT const AttentionParams params,
                       FASTATTN_GRID_CONSTANT const TileSchedule schedule) {
  const ForwardShared<Shape> shared = {align_shared<1024>(dynamic_shared_memory())};
  if (thread_index() == 0) {
    auto& barriers = shared.barriers();
    barriers.tiles.slots.init(Shape::kConsumerArrivals);
    barriers.queries.init(Shape::kConsumerArrivals);
    barriers.keys.init(Shape::kConsumerArrivals);
    barriers.values.init(Shape::kConsumerArrivals);
    mbarrier_init(&barriers.landed, 1);
    fence_barrier_init();
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.out}) tma_prefetch_map(map);
  }
  // The barriers of all blocks of the cluster must be initialised before a block arrives or copies at another's.
  Shape::kCluster > 1 ? cluster_sync() : block_sync();

  const int warpgroup = warpgroup_index();
  if (warpgroup == 0) {
    decrease_registers<Shape::kProducerRegisters>();
    if (warp_index() == 0) ForwardProducer<Shape>{maps, params, shared}.run(schedule);
  } else {
    increase_registers<Shape::kConsumerRegisters>();
    ForwardConsumer<Shape>{maps, params, shared, warpgroup - 1, thread_index() % kWarpgroupThreads}.run();
  }
  if constexpr (Shape::kCluster > 1) {
    // A block that has exited must not receive releases from its peer. The barrier counts whole warps.
    warp_sync();
    cluster_sync();
  }
}

}  // namespace fastattn
