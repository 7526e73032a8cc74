// Softmax of held rows without mask, causality or logarithm: what most calls are, in half the instructions.
//
// A 16-bit element moves 4 bytes of memory, for which there are about 25 instructions at 4.8 TB/s. The scale is positive
// and moderate, so that the largest element has the largest score, and the difference of two elements can be scaled
// instead of both: y = exp2((x - max(x)) * (scale * log2(e))) / sum.
#pragma once

#include "softmax.cuh"

namespace fastattn {

// Elements of 16 bits alone: float results or floats move more bytes, and the general kernel is as fast as memory there.
template <class In, class Out>
constexpr bool kHasPlain = sizeof(In) == 2 && sizeof(Out) == 2;

constexpr float kLeastPlainScale = 1e-30f;  // x - max(x) may be -inf where both are finite: its power has to be 0 then
constexpr float kLargestPlainScale = 1e30f;  // times log2(e) it is finite

inline bool is_plain(const SoftmaxForward& p) {
  return p.mask == nullptr && p.causal == Causal::kNone && !p.log && p.scale >= kLeastPlainScale &&
         p.scale <= kLargestPlainScale;
}

// One row, held by its threads: Elements of it in each.
template <class In, class Out, int Elements, int Threads>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(Threads, kRowBlocks<Threads>)
    softmax_forward_plain_kernel(const FASTATTN_GRID_CONSTANT SoftmaxForward p,
                                 const FASTATTN_GRID_CONSTANT RowPlan plan) {
  constexpr int kV = kVector<In, Out>;
  constexpr int kVectors = Elements / kV;
  const RowThreads mine = row_threads(plan);
  announce_block<kWithinWarp<Elements>>(mine);
  const RowView<In, Out, int> row(p, mine.row);
  Packed<In, kV> raw[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int first = row.first_of(mine.thread + (i << mine.threads_log2));
    raw[i] = load_vector<true, kV>(row.x, first, row.columns, true, negative_infinity());
  }
  float powers[kVectors][kV];
  float largest = negative_infinity();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      powers[i][j] = raw[i].value(j);
      largest = maximum(largest, powers[i][j]);
    }
  }
  largest = reduce_row<Maximum, kWithinWarp<Elements>>(largest, mine, 0);
  const float base_2_scale = p.scale * kLog2E;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      powers[i][j] = exp2_approx((powers[i][j] - largest) * base_2_scale);
      sum += powers[i][j];
    }
  }
  sum = reduce_row<Sum, kWithinWarp<Elements>>(sum, mine, 1);
  if (!is_finite(sum) || !is_finite(largest * p.scale)) {
    store_undefined_row<RowView<In, Out, int>>(p, mine, kVectors);
    return;
  }
  const float factor = inverse_sum<Out>(sum);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      powers[i][j] *= factor;
    }
    store_vector<kV>(row.y, row.first_of(mine.thread + (i << mine.threads_log2)), row.columns, row.y_aligned,
                     powers[i]);
  }
}

}  // namespace fastattn
