// The order in which persistent blocks take the tiles of a call.
#pragma once

#include "../device/config.cuh"

namespace fastattn {

// Blocks of queries times planes, a plane being one head of one sequence (b * H + h), in packed calls one head of all
// sequences. Tiles are numbered section by section, so that the keys and values of the planes in flight stay in the L2
// cache; within a section the last block of queries of every plane comes first, which is the longest under causality.
struct TileSchedule {
  int num_tiles;
  int query_blocks;        // per plane
  int planes;              // B * H, packed H
  int planes_per_section;  // a multiple of the query heads per key head, so that these run together
};

struct Tile {
  int query_block;
  int plane;
};

// Bytes of keys and values that a section may have: most of the 50 MB of L2, whose halves keep copies of each other.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

// The schedule of planes with `kv_bytes` of keys and values per key head; num_tiles is -1 for more than fit.
inline TileSchedule schedule_tiles(int64_t planes, int64_t query_blocks, int group_size, int64_t kv_bytes) {
  constexpr int64_t kMostTiles = int64_t{1} << 30;
  if (planes > kMostTiles || query_blocks > kMostTiles || planes * query_blocks > kMostTiles) return {-1, 0, 0, 0};
  const int64_t kv_heads = kv_bytes < kSectionBytes ? kSectionBytes / (kv_bytes > 0 ? kv_bytes : 1) : 1;
  const int64_t section = kv_heads < planes / group_size ? kv_heads * group_size : planes;
  return {static_cast<int>(planes * query_blocks), static_cast<int>(query_blocks), static_cast<int>(planes),
          static_cast<int>(section)};
}

#if defined(FASTATTN_EMULATION) || defined(__CUDACC__)

// The number of the tile this block takes in a round, from num_tiles on none any more. Every other round runs
// backwards: a block that got a long tile of one round gets a short one of the next.
FASTATTN_DEVICE int tile_of_round(int round) {
  const int blocks = grid_blocks().x;
  const int block = block_index().x;
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

FASTATTN_DEVICE Tile tile_at(const TileSchedule& schedule, int number) {
  const int section_tiles = schedule.planes_per_section * schedule.query_blocks;
  const int first_plane = number / section_tiles * schedule.planes_per_section;
  const int planes_left = schedule.planes - first_plane;
  const int planes = planes_left < schedule.planes_per_section ? planes_left : schedule.planes_per_section;
  const int within = number % section_tiles;
  return {schedule.query_blocks - 1 - within / planes, first_plane + within % planes};
}

#endif  // device code

}  // namespace fastattn
