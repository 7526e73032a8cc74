// Which keys a query sees: the range of tiles that contain visible keys, and the mask of a tile of scores.
//
// Query i has the position of key i + shift and sees the keys j of its sequence with
//     i + shift - left <= j <= i + shift + right,   0 <= j < num_keys.
#pragma once

#include "fragment.cuh"

namespace fastattn {

struct Visibility {
  int num_queries;
  int num_keys;
  int shift;
  int left;  // kUnbounded at most, like right
  int right;

  // Query i sees the keys first_visible_key(i) .. visible_key_end(i) - 1, none where the end comes first.
  FASTATTN_DEVICE int first_visible_key(int query) const { return query + shift - left > 0 ? query + shift - left : 0; }
  FASTATTN_DEVICE int visible_key_end(int query) const {
    return query + shift + right + 1 < num_keys ? query + shift + right + 1 : num_keys;
  }

  // Key j, j < num_keys, is seen by the queries first_visible_query(j) .. visible_query_end(j) - 1, none where the end
  // comes first.
  FASTATTN_DEVICE int first_visible_query(int key) const { return key - shift - right > 0 ? key - shift - right : 0; }
  FASTATTN_DEVICE int visible_query_end(int key) const {
    return key - shift + left + 1 < num_queries ? key - shift + left + 1 : num_queries;
  }
};

// Blocks begin .. end - 1 contain at least one visible pair of a query and a key. Blocks whole_begin .. whole_end - 1,
// a possibly empty subrange, lie inside the tensors and are visible to the whole tile: they need no mask.
struct BlockRange {
  int begin;
  int whole_begin;
  int whole_end;
  int end;

  FASTATTN_DEVICE bool empty() const { return begin >= end; }
};

// The range of blocks of kBlock that intersect [first, last_end), whole where inside [whole_first, whole_last_end).
template <int kBlock>
FASTATTN_DEVICE BlockRange block_range(int first, int last_end, int whole_first, int whole_last_end) {
  if (last_end <= first) return {0, 0, 0, 0};
  const int begin = first / kBlock;
  const int end = ceil_div(last_end, kBlock);
  int whole_begin = ceil_div(whole_first, kBlock);
  whole_begin = whole_begin < begin ? begin : whole_begin > end ? end : whole_begin;
  int whole_end = whole_last_end > 0 ? whole_last_end / kBlock : 0;
  whole_end = whole_end < whole_begin ? whole_begin : whole_end > end ? end : whole_end;
  return {begin, whole_begin, whole_end, end};
}

// The blocks of kBlockN keys visible to the at most kBlockM queries from first_query on. Rows of the tile past the last
// query are ignored: their results are not stored.
template <int kBlockM, int kBlockN>
FASTATTN_DEVICE BlockRange key_blocks(const Visibility& seen, int first_query) {
  const int tile_query_end = first_query + kBlockM < seen.num_queries ? first_query + kBlockM : seen.num_queries;
  if (tile_query_end <= first_query) return {0, 0, 0, 0};
  return block_range<kBlockN>(seen.first_visible_key(first_query), seen.visible_key_end(tile_query_end - 1),
                              seen.first_visible_key(tile_query_end - 1), seen.visible_key_end(first_query));
}

// The blocks of kBlockM queries that see any of the at most kBlockN keys from first_key on. No block is whole for a
// tile that reaches past the last key.
template <int kBlockM, int kBlockN>
FASTATTN_DEVICE BlockRange query_blocks(const Visibility& seen, int first_key) {
  const int tile_key_end = first_key + kBlockN < seen.num_keys ? first_key + kBlockN : seen.num_keys;
  if (tile_key_end <= first_key) return {0, 0, 0, 0};
  const int whole_end = first_key + kBlockN <= seen.num_keys ? seen.visible_query_end(first_key) : 0;
  return block_range<kBlockM>(seen.first_visible_query(first_key), seen.visible_query_end(tile_key_end - 1),
                              seen.first_visible_query(tile_key_end - 1), whole_end);
}

// Sets to -inf the scores outside columns first[h] .. end[h] - 1, h = 0 and 1 for a thread's two rows. Columns count
// from the tile's first.
template <int N>
FASTATTN_DEVICE void mask_columns(float (&scores)[N], int thread, const int (&first)[2], const int (&end)[2]) {
  const int column = fragment_column(thread);
  const int from[2] = {first[0] - column, first[1] - column};
  const int to[2] = {end[0] - column, end[1] - column};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int half = fragment_half(i);
    if (fragment_offset(i) < from[half] || fragment_offset(i) >= to[half]) scores[i] = negative_infinity();
  }
}

// The bounds that a tile of scores needs.
enum class Mask {
  kNone,  // every row sees all of its columns
  kEnd,   // every row sees its first column
  kBoth,
};

// Masks a tile of scores whose rows are queries from `query` on and whose columns are keys from `key` on.
template <Mask kMask = Mask::kBoth, int N>
FASTATTN_DEVICE void mask_scores(float (&scores)[N], const Visibility& seen, int thread, int query, int key) {
  if constexpr (kMask == Mask::kNone) return;
  const int row = query + fragment_row(thread);
  if constexpr (kMask == Mask::kEnd) {
    const int column = key + fragment_column(thread);
    const int end[2] = {seen.visible_key_end(row) - column, seen.visible_key_end(row + 8) - column};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (fragment_offset(i) >= end[fragment_half(i)]) scores[i] = negative_infinity();
    }
    return;
  }
  const int first[2] = {seen.first_visible_key(row) - key, seen.first_visible_key(row + 8) - key};
  const int end[2] = {seen.visible_key_end(row) - key, seen.visible_key_end(row + 8) - key};
  mask_columns(scores, thread, first, end);
}

// Masks a tile of scores whose rows are keys from `key` on and whose columns are queries from `query` on; everything
// past the last query or key is masked.
template <int N>
FASTATTN_DEVICE void mask_transposed_scores(float (&scores)[N], const Visibility& seen, int thread, int key,
                                            int query) {
  const int row = key + fragment_row(thread);
  const int first[2] = {seen.first_visible_query(row) - query, seen.first_visible_query(row + 8) - query};
  const int end[2] = {row < seen.num_keys ? seen.visible_query_end(row) - query : 0,
                      row + 8 < seen.num_keys ? seen.visible_query_end(row + 8) - query : 0};
  mask_columns(scores, thread, first, end);
}

}  // namespace fastattn
