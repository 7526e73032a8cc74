// One sequence of a batch: where its rows lie and which of its keys its queries see.
#pragma once

#include "../attention_params.h"
#include "../device/mask.cuh"

namespace fastattn {

struct Sequence {
  int batch;          // index of the tensors' batch: 0 in packed calls
  int query_start;    // its first row in q, out and lse: 0 unless packed
  int key_start;      // its first row in k and v
  int key_rows;       // Sk: its rows in k and v, those past num_keys included
  Visibility seen;
};

FASTATTN_DEVICE Sequence sequence_of(const AttentionParams& params, int b) {
  const bool packed = params.cu_seqlens_q != nullptr;
  const int query_start = packed ? params.cu_seqlens_q[b] : 0;
  const int key_start = packed ? params.cu_seqlens_k[b] : 0;
  const int num_queries = packed ? params.cu_seqlens_q[b + 1] - query_start : params.seqlen_q;
  const int key_rows = packed ? params.cu_seqlens_k[b + 1] - key_start : params.seqlen_k;
  const int num_keys = params.key_lengths == nullptr          ? key_rows
                       : params.key_lengths[b] < key_rows ? params.key_lengths[b]
                                                              : key_rows;
  const int shift = params.top_left ? 0 : key_rows - num_queries;
  return {packed ? 0 : b, query_start, key_start, key_rows,
          {num_queries, num_keys, shift, params.window_left, params.window_right}};
}

}  // namespace fastattn
