// One sequence of a batch: where its rows lie and which of its keys its queries see.
#pragma once

#include "../attention_params.h"
#include "../device/mask.cuh"

namespace fastattn {

struct Sequence {
  int index;        // index of the sequence in the call
  int batch;        // index of the tensors' batch: 0 in packed calls
  int query_start;  // its first row in q, out and lse: 0 unless packed
  int key_start;    // its first row in k and v
  int key_rows;     // Sk: its rows in k and v, those past num_keys included
  Visibility seen;
};

// Sequence b. In packed calls the tokens behind the last sequence are one more, number `batch`, of queries without
// keys.
FASTATTN_DEVICE Sequence sequence_of(const AttentionParams& params, int b) {
  const bool packed = params.cu_seqlens_q != nullptr;
  const bool leftover = packed && b == params.batch;
  const int query_start = packed ? params.cu_seqlens_q[b] : 0;
  const int query_end = leftover ? static_cast<int>(params.total_q)
                        : packed ? params.cu_seqlens_q[b + 1]
                                 : params.seqlen_q;
  const int key_start = packed ? params.cu_seqlens_k[b] : 0;
  const int seq_key_end = leftover ? key_start : packed ? params.cu_seqlens_k[b + 1] : params.seqlen_k;
  const int num_queries = query_end - query_start;
  const int key_rows = seq_key_end - key_start;
  int num_keys = key_rows;
  if (params.key_lengths != nullptr && params.key_lengths[b] < key_rows) num_keys = params.key_lengths[b];
  const int shift = params.top_left ? 0 : key_rows - num_queries;
  return {b,         packed ? 0 : b, query_start,
          key_start, key_rows,       {num_queries, num_keys, shift, params.window_left, params.window_right}};
}

struct PackedBlock {
  int sequence;
  int block;  // within the sequence, which may end before it
};

// The sequence that has block number `number`.
template <int kBlock>
FASTATTN_DEVICE PackedBlock find_packed_block(const int32_t* cu_seqlens, int sequences, int number) {
  int first = 0;
  for (int last = sequences; first < last;) {
    const int middle = (first + last + 1) / 2;
    if (cu_seqlens[middle] / kBlock + middle <= number) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  return {first, number - cu_seqlens[first] / kBlock - first};
}

// Sequence b as the owner of keys. In packed calls the keys after the last sequence are one more, number `batch`, which
// no query sees.
FASTATTN_DEVICE Sequence key_sequence_of(const AttentionParams& params, int b) {
  if (params.cu_seqlens_k == nullptr || b < params.batch) return sequence_of(params, b);
  const int start = params.cu_seqlens_k[b];
  return {b, 0, 0, start, static_cast<int>(params.total_k) - start, {0, 0, 0, kUnbounded, kUnbounded}};
}

// A block of keys of one key head.
struct KeyTile {
  Sequence sequence;
  int kv_head;
  int first_key;  // within the sequence, which may end before it
};

// Tile number `block` of a batch head: of head `batch_head % Hkv` of sequence `batch_head / Hkv`, or in packed calls of
// head `batch_head`.
template <int kBlockN>
FASTATTN_DEVICE KeyTile key_tile(const AttentionParams& params, int block, int batch_head) {
  if (params.cu_seqlens_k == nullptr) {
    return {sequence_of(params, batch_head / params.num_kv_heads), batch_head % params.num_kv_heads, block * kBlockN};
  }
  const PackedBlock place = find_packed_block<kBlockN>(params.cu_seqlens_k, params.batch, block);
  return {key_sequence_of(params, place.sequence), batch_head, place.block * kBlockN};
}

// A block of queries of one head.
struct QueryTile {
  Sequence sequence;
  int head;
  int first_query;  // within the sequence, which may end before it
};

// Tile number `block` of a batch head: of head `batch_head % H` of sequence `batch_head / H`, or in packed calls of
// head `batch_head`.
template <int kBlockM>
FASTATTN_DEVICE QueryTile query_tile(const AttentionParams& params, int block, int batch_head) {
  if (params.cu_seqlens_q == nullptr) {
    return {sequence_of(params, batch_head / params.num_heads), batch_head % params.num_heads, block * kBlockM};
  }
  const PackedBlock place = find_packed_block<kBlockM>(params.cu_seqlens_q, params.batch, block);
  return {sequence_of(params, place.sequence), batch_head, place.block * kBlockM};
}

}  // namespace fastattn
