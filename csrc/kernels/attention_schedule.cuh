// The order in which persistent blocks take the tiles of a call.
#pragma once

#include "../device/config.cuh"

namespace fastattn {

// Tiles are blocks of queries times batch heads. A batch head is one head of one sequence (b * H + h), in packed calls
// one head of all sequences. Tiles are numbered section by section, so that the keys and values of the batch heads in
// flight stay in the L2 cache; within a section come one block of queries of every batch head, then the next block
// (TileOrder).
struct TileSchedule {
  int num_tiles;
  int query_blocks;             // per batch head
  int batch_heads;              // B * H, packed H
  int batch_heads_per_section;  // a multiple of the query heads per key head, so that these run together
};

struct Tile {
  int query_block;
  int batch_head;
};

// Bytes of keys and values that a section may have: most of the 50 MB of L2, whose halves keep copies of each other.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

// The schedule of batch heads with `kv_bytes` of keys and values per key head; num_tiles is -1 for more than fit.
inline TileSchedule schedule_tiles(int64_t batch_heads, int64_t query_blocks, int group_size, int64_t kv_bytes) {
  constexpr int64_t kMostTiles = int64_t{1} << 30;
  if (batch_heads > kMostTiles || query_blocks > kMostTiles || batch_heads * query_blocks > kMostTiles) {
    return {-1, 0, 0, 0};
  }
  const int64_t kv_heads = kv_bytes < kSectionBytes ? kSectionBytes / (kv_bytes > 0 ? kv_bytes : 1) : 1;
  const int64_t section = kv_heads < batch_heads / group_size ? kv_heads * group_size : batch_heads;
  return {static_cast<int>(batch_heads * query_blocks), static_cast<int>(query_blocks), static_cast<int>(batch_heads),
          static_cast<int>(section)};
}

// The schedule with sections of about as many batch heads each, a remainder of up to a quarter of a section spread over
// the others: a small last section would leave the end of the call to a few tiles.
inline TileSchedule with_even_sections(TileSchedule schedule, int group_size) {
  const int most = schedule.batch_heads_per_section;
  if (most == 0) return schedule;
  const int sections = schedule.batch_heads <= most ? 1 : (schedule.batch_heads - most / 4 + most - 1) / most;
  const int batch_heads = (schedule.batch_heads + sections - 1) / sections;
  schedule.batch_heads_per_section = (batch_heads + group_size - 1) / group_size * group_size;
  return schedule;
}

// The tiles of keys of a backward in one pass, whose key heads come in two parts; a tile may wait for earlier ones of
// its head. The first `early_heads` of every sequence, in packed calls of all, take their tiles from the last to the
// first, then the others theirs from the first to the last. Under causality the first tile is the longest, so that a
// call ends with short ones. Which part a head belongs to depends on its number alone: a sequence has the same bits in
// any batch.
struct OnePassSchedule {
  int num_tiles;
  int early_heads;
  TileSchedule early;
  TileSchedule late;  // numbered from its end: a section of fewer heads than the others is its first
};

// Rounds of equal tiles on so many multiprocessors, or clusters of them.
inline int64_t rounds(int64_t tiles, int64_t takers) { return (tiles + takers - 1) / takers; }

// Whether tiles taken in clusters of `cluster_blocks` need no more rounds than one by one. Each batch head has
// `tiles_of_each` tiles, rounded up to whole clusters; `clusters` are resident at a time, which may leave
// multiprocessors idle.
inline bool clusters_cost_no_round(int64_t batch_heads, int64_t tiles_of_each, int cluster_blocks, int multiprocessors,
                                   int clusters) {
  if (clusters < 1 || tiles_of_each < cluster_blocks) return false;
  const int64_t cluster_tiles = batch_heads * rounds(tiles_of_each, cluster_blocks);
  return rounds(cluster_tiles, clusters) <= rounds(batch_heads * tiles_of_each, multiprocessors);
}

#if defined(FASTATTN_EMULATION) || defined(__CUDACC__)

// The order of a section's blocks of queries. kLastFirst: from the last to the first in every section. kEven: from the
// first to the last, but in the last section from the last to the first. Under causality the last block is the longest:
// the call then ends with its shortest tiles, and the long tiles of a section are followed by others that balance them.
enum class TileOrder { kLastFirst, kEven };

FASTATTN_DEVICE Tile tile_at(const TileSchedule& schedule, int number, TileOrder order = TileOrder::kLastFirst) {
  const int section_tiles = schedule.batch_heads_per_section * schedule.query_blocks;
  const int first_batch_head = number / section_tiles * schedule.batch_heads_per_section;
  const int batch_heads_left = schedule.batch_heads - first_batch_head;
  const int batch_heads =
      batch_heads_left < schedule.batch_heads_per_section ? batch_heads_left : schedule.batch_heads_per_section;
  const int within = number % section_tiles;
  const int block = within / batch_heads;
  const bool first_block_first = order == TileOrder::kEven && batch_heads_left > schedule.batch_heads_per_section;
  return {first_block_first ? block : schedule.query_blocks - 1 - block, first_batch_head + within % batch_heads};
}

#endif  // device code

}  // namespace fastattn
