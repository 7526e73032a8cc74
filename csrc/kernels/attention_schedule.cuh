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
  // Blocks at a batch head's beginning and end that a window leaves shorter than the others: see tile_with_edges_last.
  int first_edge;
  int last_edge;
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
    return {-1, 0, 0, 0, 0, 0};
  }
  const int64_t kv_heads = kv_bytes < kSectionBytes ? kSectionBytes / (kv_bytes > 0 ? kv_bytes : 1) : 1;
  const int64_t section = kv_heads < batch_heads / group_size ? kv_heads * group_size : batch_heads;
  return {static_cast<int>(batch_heads * query_blocks),
          static_cast<int>(query_blocks),
          static_cast<int>(batch_heads),
          static_cast<int>(section),
          0,
          0};
}

// The schedule with sections of about as many batch heads each, a remainder of up to a quarter of a section spread over
// the others: a small last section would leave the end of the call to a few tiles.
inline TileSchedule with_even_sections(TileSchedule schedule, int group_size) {
  const int most = schedule.batch_heads_per_section;
  if (most == 0) return schedule;
  const int sections = schedule.batch_heads <= most ? 1 : ceil_div(schedule.batch_heads - most / 4, most);
  const int batch_heads = ceil_div(schedule.batch_heads, sections);
  schedule.batch_heads_per_section = ceil_div(batch_heads, group_size) * group_size;
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

// Whether tiles taken in clusters of `cluster_blocks` need no more rounds than one by one. Each batch head has
// `tiles_of_each` tiles, rounded up to whole clusters; `clusters` are resident at a time, which may leave
// multiprocessors idle.
inline bool clusters_cost_no_round(int64_t batch_heads, int64_t tiles_of_each, int cluster_blocks, int multiprocessors,
                                   int clusters) {
  if (clusters < 1 || tiles_of_each < cluster_blocks) return false;
  const int64_t cluster_tiles = batch_heads * ceil_div(tiles_of_each, cluster_blocks);
  return ceil_div(cluster_tiles, clusters) <= ceil_div(batch_heads * tiles_of_each, multiprocessors);
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

// As tile_at in the order kEven, but the blocks at the edges of a window come behind those of all batch heads between
// them, the longest first: the others are about equal, so that only these can even out the end of a call.
// `length_of(block)` compares a block of one edge with that of the other.
template <class Length>
FASTATTN_DEVICE Tile tile_with_edges_last(const TileSchedule& schedule, int number, Length length_of) {
  const int first_edge = schedule.first_edge;
  const int last_edge = schedule.last_edge;
  TileSchedule between = schedule;
  between.query_blocks -= first_edge + last_edge;
  const int within = number - between.query_blocks * schedule.batch_heads;
  if (within < 0) {
    const Tile tile = tile_at(between, number, TileOrder::kEven);
    return {first_edge + tile.query_block, tile.batch_head};
  }
  // Among the blocks of both edges, which alternate as long as both have some.
  const int place = within / schedule.batch_heads;
  const int both = 2 * (first_edge < last_edge ? first_edge : last_edge);
  const int inward = place < both ? place / 2 : place - both / 2;
  const int first = first_edge - 1 - inward;
  const int last = schedule.query_blocks - last_edge + inward;
  const bool takes_first =
      place < both ? (length_of(first) > length_of(last)) == (place % 2 == 0) : first_edge > last_edge;
  return {takes_first ? first : last, within % schedule.batch_heads};
}

#endif  // device code

}  // namespace fastattn
