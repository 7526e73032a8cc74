// Common parts of the one-pass backwards, however their warpgroups divide dq: the shape, and the path of dq to global
// memory.
#pragma once

#include "attention_bwd_dkdv_common.cuh"

namespace fastattn {

template <class Element_, int kHeadDim_, int kBlockN_, int kBlockM_>
struct FusedGradientsShape : KeyGradientsShape<Element_, kHeadDim_, kBlockN_, kBlockM_, KeyGradients::kBoth, false> {
  using Base = KeyGradientsShape<Element_, kHeadDim_, kBlockN_, kBlockM_, KeyGradients::kBoth, false>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr bool kSumsOverKeys = true;

  // How the two warpgroups divide dq: each takes every other block of queries, or half of the columns of all blocks. A
  // product reads all rows of ds either way, so the former reads less shared memory, but registers suffice for it at
  // head dim 64 only.
  static constexpr bool kDqByBlocks = kHeadDim == kPanelColumns;
  static constexpr int kDqColumns = kDqByBlocks ? kHeadDim : kHeadDim / 2;  // of a product
  static constexpr int kDqTiles = kDqByBlocks ? 2 : 1;                      // one per warpgroup, or one shared by both
  static constexpr int kDqThreads = (kDqByBlocks ? 1 : 2) * kWarpgroupThreads + kWarpThreads;  // that pass a tile on
  static constexpr int kDsTiles = kDqByBlocks ? 4 : 2;                                         // a ring

  static constexpr uint32_t kDsBytes = kTileBytes<kBlockM, kBlockN>;
  static constexpr uint32_t kDqBytes = kBlockM * kHeadDim * 4;
  static constexpr uint32_t kDsAt = (Base::kBarriersAt + 128 + 1023) / 1024 * 1024;
  static constexpr uint32_t kDqAt = kDsAt + kDsTiles * kDsBytes;
  static constexpr uint32_t kSharedBytes = kDqAt + kDqTiles * kDqBytes + 1024;  // 1024 to align the tiles

  static_assert(kBlockM == 64 && kBlockM == kSemaphoreRows, "a product for dq has 64 rows");
  static_assert(kDqColumns % kPanelColumns == 0, "a product takes whole panels of k");
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

// Floats of a block of queries in params.dq_sum: groups of four, in the order of the threads of a 64 x kHeadDim
// accumulator.
template <class Shape>
constexpr int kDqFloats = Shape::kBlockM * Shape::kHeadDim;

// Named barriers besides those of warpgroup_sync; where each warpgroup has a tile of dq, it has one of each pair.
constexpr int kDsWritten = 3;
constexpr int kDqWritten = 5;
constexpr int kDqTaken = 7;
constexpr int kKeysRead = 9;  // both warpgroups have completed their last read of the keys

// Constant numbers: see warpgroup_sync.
template <int kFirst>
FASTATTN_DEVICE void named_pair_sync(int which, int threads) {
  if (which == 0) {
    named_barrier_sync(kFirst, threads);
  } else {
    named_barrier_sync(kFirst + 1, threads);
  }
}

template <int kFirst>
FASTATTN_DEVICE void named_pair_arrive(int which, int threads) {
  if (which == 0) {
    named_barrier_arrive(kFirst, threads);
  } else {
    named_barrier_arrive(kFirst + 1, threads);
  }
}

template <class Shape>
FASTATTN_DEVICE unsigned char* ds_tile(const KeyGradientsShared<Shape>& shared, int step) {
  return shared.base + Shape::kDsAt + step % Shape::kDsTiles * Shape::kDsBytes;
}

template <class Shape>
FASTATTN_DEVICE float* dq_tile(const KeyGradientsShared<Shape>& shared, int which) {
  return reinterpret_cast<float*>(shared.base + Shape::kDqAt + which * Shape::kDqBytes);
}

// Writes a warp's ds, 16 keys by kRows queries in registers, to a tile of kRows queries; its first key goes to column
// `column`.
template <int kRows, int Steps>
FASTATTN_DEVICE void store_transposed(unsigned char* tile, int column, const uint32_t (&ds)[Steps][4]) {
  const int lane = lane_index();
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
    const int row = step * 16 + lane / 16 * 8 + lane % 8;
    stmatrix_x4_transposed(tile + tile_offset<kRows>(row, column + lane / 8 % 2 * 8), ds[step]);
  }
}

// Passes a warpgroup's dq, columns from `part` * kDqColumns on, to the warp that adds it, in tile `which`.
template <class Shape, int Accumulators>
FASTATTN_DEVICE void hand_over_dq(const KeyGradientsShared<Shape>& shared, float (&dq)[Accumulators], int which,
                                  int part) {
  const int thread = thread_index() % kWarpgroupThreads;
  pin_registers(dq);
  named_pair_sync<kDqTaken>(which, Shape::kDqThreads);
  float4* values = reinterpret_cast<float4*>(dq_tile(shared, which)) + part * (Accumulators / 4) * kWarpgroupThreads;
#pragma unroll
  for (int i = 0; i < Accumulators; i += 4) {
    st_shared(&values[i / 4 * kWarpgroupThreads + thread], make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]));
  }
  fence_proxy_async();
  named_pair_arrive<kDqWritten>(which, Shape::kDqThreads);
}

// How many tiles of keys add to a block of queries before this one: the later tiles, or the earlier ones where tiles
// take their blocks of queries in descending order.
template <class Shape>
FASTATTN_DEVICE int added_before(const KeyTile& tile, const BlockWalk& walk, int block) {
  const BlockRange seen = key_blocks<Shape::kBlockM, Shape::kBlockN>(tile.sequence.seen, block * Shape::kBlockM);
  const int key_block = tile.first_key / Shape::kBlockN;
  return walk.step > 0 ? seen.end - 1 - key_block : key_block - seen.begin;
}

// Adds the consumers' tile `which` of dq to the sums in global memory, when the dq semaphore reaches the block. Each
// tile has its own warp, because the latency of global memory between one block of queries and the next may exceed the
// time of a step.
template <class Shape>
FASTATTN_DEVICE void add_dq(const AttentionBackwardParams& params, const KeyTile& tile, const BlockRange& blocks,
                            const BlockWalk& walk, const KeyGradientsShared<Shape>& shared, int which) {
  constexpr int kThreads = Shape::kDqThreads;
  const bool issues = elect_one();
  const int group_size = params.call.num_heads / params.call.num_kv_heads;
  const int steps = group_size * (blocks.end - blocks.begin);
  if (which < steps) named_pair_arrive<kDqTaken>(which, kThreads);
  int step = 0;
  for (int member = 0; member < group_size; ++member) {
    const int64_t first = padded_row(params.call, tile.sequence, tile.kv_head * group_size + member) / Shape::kBlockM;
    int block = walk.first;
    for (int left = blocks.end - blocks.begin; left > 0; --left, block += walk.step, ++step) {
      if (step % Shape::kDqTiles != which) continue;
      const int before = added_before<Shape>(tile, walk, block);
      named_pair_sync<kDqWritten>(which, kThreads);
      if (issues) {
        semaphore_wait(params.dq_semaphore + first + block, before);
        fence_proxy_async_global();
        bulk_reduce_add(params.dq_sum + (first + block) * kDqFloats<Shape>, dq_tile(shared, which), Shape::kDqBytes);
        bulk_commit();
        bulk_wait_read<0>();
      }
      warp_sync();
      if (step + Shape::kDqTiles < steps) named_pair_arrive<kDqTaken>(which, kThreads);
      if (issues) {
        bulk_wait<0>();
        fence_proxy_async_global();
        semaphore_add_release(params.dq_semaphore + first + block, 1);
      }
      warp_sync();  // a named barrier takes whole warps
    }
  }
}

struct OnePassWork {
  KeyTile tile;
  BlockRange blocks;
  BlockWalk walk;
};

// The work of the block that took `ticket`. The tiles of an early head take their blocks of queries in ascending order:
// under causality a tile begins where no other tile adds before it. Those of a late head take them in descending order,
// all from the last query on: a tile that starts together with its predecessor waits for one block of queries and stays
// one block after it. In either order the tiles that a tile waits for have been taken before it.
template <class Shape>
FASTATTN_DEVICE OnePassWork work_of_ticket(const AttentionParams& call, const OnePassSchedule& schedule,
                                           uint32_t ticket) {
  const int number = static_cast<int>(ticket);
  const bool late = number >= schedule.early.num_tiles;
  const Tile place = tile_at(late ? schedule.late : schedule.early, late ? schedule.num_tiles - 1 - number : number);
  const int heads = late ? call.num_kv_heads - schedule.early_heads : schedule.early_heads;
  const int head = place.batch_head % heads + (late ? schedule.early_heads : 0);
  const int batch_head = place.batch_head / heads * call.num_kv_heads + head;
  const KeyTile tile = key_tile<Shape::kBlockN>(call, place.query_block, batch_head);
  const BlockRange blocks = query_blocks<Shape::kBlockM, Shape::kBlockN>(tile.sequence.seen, tile.first_key);
  return {tile, blocks, walk_of(blocks, late)};
}

}  // namespace fastattn
