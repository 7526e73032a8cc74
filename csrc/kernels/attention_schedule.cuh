// The order in which persistent blocks take the tiles of a call.
#pragma once

#include "../device/config.cuh"

namespace fastattn {

// Blocks of queries times planes, a plane being one head of one sequence (b * H + h), in packed calls one head of all
// sequences. Tiles are numbered section by section, so that the keys and values of the planes in flight stay in the L2
// cache; within a section all planes have their turn with one block of queries, then with the next (TileOrder).
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

// The schedule with sections of about as many planes each, a remainder of up to a quarter of a section spread over the
// others: a small last section would leave the end of the call to a few tiles.
inline TileSchedule with_even_sections(TileSchedule schedule, int group_size) {
  const int most = schedule.planes_per_section;
  if (most == 0) return schedule;
  const int sections = schedule.planes <= most ? 1 : (schedule.planes - most / 4 + most - 1) / most;
  const int planes = (schedule.planes + sections - 1) / sections;
  schedule.planes_per_section = (planes + group_size - 1) / group_size * group_size;
  return schedule;
}

// Rounds of equal tiles on so many multiprocessors, or clusters of them.
inline int64_t rounds(int64_t tiles, int64_t takers) { return (tiles + takers - 1) / takers; }

// Whether tiles taken in clusters of `cluster_blocks` need no more rounds than one by one. Each plane has
// `plane_tiles`, made up to whole clusters; `clusters` are resident at a time, which may leave multiprocessors over.
inline bool clusters_cost_no_round(int64_t planes, int64_t plane_tiles, int cluster_blocks, int multiprocessors,
                                   int clusters) {
  if (clusters < 1 || plane_tiles < cluster_blocks) return false;
  const int64_t cluster_tiles = planes * rounds(plane_tiles, cluster_blocks);
  return rounds(cluster_tiles, clusters) <= rounds(planes * plane_tiles, multiprocessors);
}

#if defined(FASTATTN_EMULATION) || defined(__CUDACC__)

// The order of a section's blocks of queries. kLastFirst: from the last to the first, every section. kEven: the last
// section like that, the others from the first to the last. Under causality the last block is the longest. The call then
// ends with its shortest tiles, and no section leaves its long ones to so late that the next cannot even them out.
enum class TileOrder { kLastFirst, kEven };

FASTATTN_DEVICE Tile tile_at(const TileSchedule& schedule, int number, TileOrder order = TileOrder::kLastFirst) {
  const int section_tiles = schedule.planes_per_section * schedule.query_blocks;
  const int first_plane = number / section_tiles * schedule.planes_per_section;
  const int planes_left = schedule.planes - first_plane;
  const int planes = planes_left < schedule.planes_per_section ? planes_left : schedule.planes_per_section;
  const int within = number % section_tiles;
  const int block = within / planes;
  const bool first_block_first = order == TileOrder::kEven && planes_left > schedule.planes_per_section;
  return {first_block_first ? block : schedule.query_blocks - 1 - block, first_plane + within % planes};
}

#endif  // device code

}  // namespace fastattn
