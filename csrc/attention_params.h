// Parameters of the attention kernels: plain structs that the host fills and passes by value.
//
// Shapes: B batch, H query heads, Hkv key/value heads, Sq and Sk lengths, D head dim. In packed calls the sequences are
// concatenated, with T query tokens and Tk key tokens in total, and B counts sequences.
#pragma once

#include <cstdint>

#include "device/config.cuh"

namespace fastattn {

// Element (b, h, s, d) of a tensor is at offset b * batch + h * head + s * row + d, in elements.
struct Strides {
  int64_t batch;  // 0 in packed calls
  int64_t head;
  int64_t row;
};

// Lengths, windows and positions are all below this bound, so that sums of three of them fit 32 bits.
constexpr int kUnbounded = 1 << 29;

// Parameters common to forward and backward. device/mask.cuh defines which keys a query sees.
struct AttentionParams {
  const void* q;  // (B, H, Sq, D), packed (H, T, D)
  const void* k;  // (B, Hkv, Sk, D), packed (Hkv, Tk, D)
  const void* v;  // (B, Hkv, Sk, D), packed (Hkv, Tk, D)
  void* out;      // (B, H, Sq, D), packed (H, T, D); the backward reads it
  float* lse;     // (B, H, Sq), packed (H, T): natural logarithm; rows adjacent; the backward reads it
  Strides q_strides;
  Strides k_strides;
  Strides v_strides;
  Strides out_strides;
  Strides lse_strides;  // row is 1

  const int32_t* cu_seqlens_q;  // (B + 1,), null unless packed: sequence b owns tokens cu[b] .. cu[b + 1]
  const int32_t* cu_seqlens_k;  // (B + 1,), null unless packed
  const int32_t* key_lengths;   // (B,), or null: keys from key_lengths[b] on are masked; their memory may hold anything

  int batch;
  int num_heads;
  int num_kv_heads;  // divides num_heads; query head h reads key/value head h / (num_heads / num_kv_heads)
  int seqlen_q;      // Sq; packed: an upper bound of every sequence's
  int seqlen_k;      // Sk; packed: an upper bound of every sequence's
  int64_t total_q;   // rows of q per head: Sq, packed T
  int64_t total_k;   // rows of k and v per head: Sk, packed Tk
  int head_dim;      // D, a multiple of 8

  // Forward only: how many tiles have been taken besides each block's first; 0 at launch. Null for a static schedule.
  uint32_t* tile_counter;
  // forward only: clusters, which multicast keys and values, are allowed where they add no round of tiles
  bool clusters;

  bool top_left;     // query i has key position i, not i + Sk - Sq
  int window_left;   // keys seen before a query's position, kUnbounded for all
  int window_right;  // keys seen after it, kUnbounded for all; 0 for causal
  float scale;       // positive: score = scale * q.k
  float softcap;     // then softcap * tanh(score / softcap); 0 for none
};

// Row blocks of packed tensors are numbered without knowing the lengths on the host: sequence b begins at block
// cu_seqlens[b] / kBlock + b and reserves as many blocks as it can need, some of them possibly empty.
template <int kBlock>
FASTATTN_HOST_DEVICE constexpr int64_t packed_blocks(int64_t rows, int64_t sequences) {
  return rows / kBlock + sequences + 1;  // the rows after the last sequence count as one more sequence
}

// Each block of rows of lse_log2 and delta belongs to one sequence.
constexpr int kRowBlock = 128;

// Minimum number of rows of dq per semaphore.
constexpr int kSemaphoreRows = 64;

// Blocks of rows of a head, those of all packed sequences together.
FASTATTN_HOST_DEVICE int query_row_blocks(const AttentionParams& call) {
  if (call.cu_seqlens_q != nullptr) return static_cast<int>(packed_blocks<kRowBlock>(call.total_q, call.batch));
  return ceil_div(call.seqlen_q, kRowBlock);
}

// Parameters that only the backward needs. Each gradient has the shape of its tensor.
struct AttentionBackwardParams {
  AttentionParams call;
  const void* dout;   // (B, H, Sq, D), packed (H, T, D)
  const float* dlse;  // (B, H, Sq), packed (H, T), with the strides of lse; or null
  void* dq;           // (B, H, Sq, D), packed (H, T, D)
  void* dk;           // (B, Hkv, Sk, D), packed (Hkv, Tk, D)
  void* dv;           // (B, Hkv, Sk, D), packed (Hkv, Tk, D)
  Strides dout_strides;
  Strides dq_strides;
  Strides dk_strides;
  Strides dv_strides;

  float* lse_log2;  // (B, H, query_row_blocks * kRowBlock), packed without B: see kernels/attention_bwd_rows.cuh
  float* delta;     // the same

  // One-pass backward only, zero at launch: see kernels/attention_bwd_fused_sm90.cuh. Null for two passes.
  float* dq_sum;           // as many rows as lse_log2 has, of the kernel's head dim
  uint32_t* dq_semaphore;  // one per tile of these rows, of kSemaphoreRows or more: how many tiles of keys have added
  uint32_t* ticket;        // how many blocks have taken a tile of keys
};

}  // namespace fastattn
