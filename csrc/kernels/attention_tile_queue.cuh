// The tiles of a persistent block, which its producer warp finds and hands to its consumer warpgroups.
#pragma once

#include "../device/copy.cuh"
#include "../device/pipeline.cuh"
#include "../device/warp.cuh"
#include "attention_schedule.cuh"
#include "attention_sequence.cuh"

namespace fastattn {

// Shared memory between the producer warp and the consumers: the current tile and the next. The producer looks tiles up
// ahead of time, so that no consumer waits for the lengths of a packed call or for the counter of a dynamic schedule.
struct TileQueue {
  static constexpr int kSlots = 2;
  static constexpr int kWords = sizeof(QueryTile) / sizeof(uint4);
  static_assert(sizeof(QueryTile) == kWords * sizeof(uint4));
  using State = PipelineState<kSlots>;

  uint4 tiles[kSlots][kWords];
  Pipeline<kSlots> slots;

  // Called by the whole producer warp, with `issues` set in one lane.
  FASTATTN_DEVICE void put(State& state, const QueryTile& tile, bool issues) {
    slots.fill(state, issues, [&] {
      uint4 words[kWords];
      memcpy(words, &tile, sizeof(tile));
#pragma unroll
      for (int i = 0; i < kWords; ++i) st_shared(&tiles[state.stage][i], words[i]);
    });
    state.advance();
  }

  FASTATTN_DEVICE void wait(State state) { slots.wait_full(state); }

  // The current tile. May be read any number of times between wait and release, so it need not stay in registers.
  FASTATTN_DEVICE QueryTile get(State state) const {
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = ld_shared(&tiles[state.stage][i]);
    QueryTile tile;
    memcpy(&tile, words, sizeof(tile));
    return tile;
  }

  // Called by every consumer warp after all its lanes have read the tile.
  FASTATTN_DEVICE void release(State& state) {
    warp_sync();
    if (lane_index() == 0) slots.release(state);
    state.advance();
  }
};

// Marks the end of the tiles.
FASTATTN_DEVICE QueryTile no_tile() {
  QueryTile tile = {};
  tile.head = -1;
  return tile;
}

// The number of this block's first tile. The kBlocks blocks of a cluster share a number.
template <int kBlocks>
FASTATTN_DEVICE int first_tile_number() {
  return block_index().x / kBlocks;
}

// The number of this block's tile after `number`: from the counter, which is 0 when the kernel starts, or in rounds of
// the grid where there is none, as in clusters. The whole producer warp calls it.
template <int kBlocks>
FASTATTN_DEVICE int next_tile_number(uint32_t* counter, int number) {
  const int blocks = grid_blocks().x;
  if (kBlocks > 1 || counter == nullptr) return number + blocks / kBlocks;
  uint32_t taken = 0;
  if (lane_index() == 0) taken = counter_fetch_add(counter, 1);
  return blocks + static_cast<int>(shuffle(taken, 0));
}

}  // namespace fastattn
