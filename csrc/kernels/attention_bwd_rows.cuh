// The backward's first pass: what every query row contributes to its scores' gradients.
//
//     lse_log2[i] = log2(e) * lse[i],   +inf for a row that sees nothing, so that exp2(score - lse_log2) is 0
//     delta[i]    = sum_d dout[i, d] * out[i, d] - dlse[i]
//
// Both are kept in blocks of kRowBlock rows of one sequence, padded with +inf and 0, so that the passes that follow
// copy whole blocks and need no mask for queries that do not exist.
#pragma once

#include "../device/copy.cuh"
#include "attention_sequence.cuh"

namespace fastattn {

// The offset of row 0 of a head of a sequence in lse_log2 and delta, which have query_row_blocks blocks per head.
FASTATTN_DEVICE int64_t padded_row(const AttentionParams& call, const Sequence& sequence, int head) {
  const int64_t head_rows = int64_t{query_row_blocks(call)} * kRowBlock;
  if (call.cu_seqlens_q == nullptr) return (int64_t{sequence.batch} * call.num_heads + head) * head_rows;
  return head * head_rows + (sequence.query_start / kRowBlock + sequence.index) * int64_t{kRowBlock};
}

// The sum of the products of 8 pairs of T.
template <class T>
FASTATTN_DEVICE float dot_8(uint4 a, uint4 b) {
  const uint32_t left[4] = {a.x, a.y, a.z, a.w};
  const uint32_t right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack<T>(left[i]);
    const float2 y = unpack<T>(right[i]);
    sum += x.x * y.x + x.y * y.y;
  }
  return sum;
}

// One block of threads per kRowBlock rows of one head of one sequence. kRowThreads threads share a row, 8 columns each.
template <class T, int kRowThreads>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(256, 4)
    attention_bwd_rows_kernel(const FASTATTN_GRID_CONSTANT AttentionBackwardParams params) {
  const AttentionParams& call = params.call;
  const int row_blocks = query_row_blocks(call);
  const QueryTile tile = query_tile<kRowBlock>(call, block_index().x % row_blocks, block_index().x / row_blocks);
  const Sequence& sequence = tile.sequence;
  const int first_row = tile.first_query;
  const int head = tile.head;
  if (first_row >= sequence.seen.num_queries) return;
  const int64_t out_base = sequence.batch * call.out_strides.batch + head * call.out_strides.head;
  const int64_t dout_base = sequence.batch * params.dout_strides.batch + head * params.dout_strides.head;
  const int64_t lse_base = sequence.batch * call.lse_strides.batch + head * call.lse_strides.head;
  const int64_t padded_base = padded_row(call, sequence, head);

  for (int row = thread_index() / kRowThreads; row < kRowBlock; row += block_threads() / kRowThreads) {
    const int query = first_row + row;
    const bool exists = query < sequence.seen.num_queries;
    const int64_t source = sequence.query_start + query;
    float delta = 0.0f;
    const int column = thread_index() % kRowThreads * 8;
    if (exists && column < call.head_dim) {
      const T* out = static_cast<const T*>(call.out) + out_base + source * call.out_strides.row + column;
      const T* dout = static_cast<const T*>(params.dout) + dout_base + source * params.dout_strides.row + column;
      delta = dot_8<T>(ld_global_16(out), ld_global_16(dout));
    }
#pragma unroll
    for (int other = kRowThreads / 2; other > 0; other /= 2) delta += shuffle_xor(delta, other);
    if (column != 0) continue;
    float lse = exists ? call.lse[lse_base + source] : negative_infinity();
    const bool sees_nothing = lse == negative_infinity();
    if (!sees_nothing && params.dlse != nullptr) delta -= params.dlse[lse_base + source];
    params.lse_log2[padded_base + query] = sees_nothing ? -negative_infinity() : lse * kLog2E;
    params.delta[padded_base + query] = sees_nothing ? 0.0f : delta;
  }
}

}  // namespace fastattn
