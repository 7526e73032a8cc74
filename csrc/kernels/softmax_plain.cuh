// Softmax without mask, causality or logarithm, the most frequent call, in two thirds of the instructions.
//
// A 16-bit element moves 4 bytes of memory, which leaves it 25 instructions at 4.8 TB/s. The scale is positive and
// moderate, so that the largest element has the largest score, and the difference of two elements can be scaled instead
// of both: y = exp2((x - max(x)) * (scale * log2(e))) / sum. A scale that is a power of two gives the general kernel's
// bits.
#pragma once

#include "softmax.cuh"

namespace fastattn {

// 16-bit elements alone: floats or float results move more bytes, and the general kernel keeps up with memory.
template <class In, class Out>
constexpr bool kHasPlain = sizeof(In) == 2 && sizeof(Out) == 2;

constexpr float kLeastPlainScale = 1e-30f;   // x - max(x) = -inf of two finite numbers has to have the power 0
constexpr float kLargestPlainScale = 1e30f;  // log2(e) times it is finite

inline bool is_plain(const SoftmaxForward& p) {
  return p.mask == nullptr && p.causal == Causal::kNone && !p.log && p.scale >= kLeastPlainScale &&
         p.scale <= kLargestPlainScale;
}

// Whether a row has neither NaN nor a largest score that is not finite.
FASTATTN_DEVICE bool is_plain_row(const SoftmaxForward& p, float largest, float sum) {
  return is_finite(sum) && is_finite(largest * p.scale);
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
  if (!is_plain_row(p, largest, sum)) {
    store_undefined_row<RowView<In, Out, int>>(p, plan, kVectors);
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

// One row of any length: maximum and sum online, then the result, from the row's end, which was read last.
template <class In, class Out>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(kLongRowThreads, 1)
    softmax_forward_plain_long_kernel(const FASTATTN_GRID_CONSTANT SoftmaxForward p,
                                      const FASTATTN_GRID_CONSTANT RowPlan plan) {
  constexpr int kV = kVector<In, Out>;
  const RowThreads mine = row_threads(plan);
  const RowView<In, Out, int64_t> row(p, mine.row);
  const int64_t vectors = vectors_of(row.columns, row.shift, kV);
  const float base_2_scale = p.scale * kLog2E;
  float largest = negative_infinity();
  float sum = 0.0f;
#pragma unroll 2
  for (int64_t vector = mine.thread; vector < vectors; vector += mine.threads()) {
    const Packed<In, kV> raw =
        load_vector<true, kV>(row.x, row.first_of(vector), row.columns, true, negative_infinity());
    float new_largest = largest;
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      new_largest = maximum(new_largest, raw.value(j));
    }
    const float reference = finite_maximum(new_largest);
    sum *= exp2_approx((largest - reference) * base_2_scale);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      sum += exp2_approx((raw.value(j) - reference) * base_2_scale);
    }
    largest = new_largest;
  }
  const float row_largest = reduce_row<Maximum>(largest, mine, 0);
  const float change = finite_maximum(largest) - finite_maximum(row_largest);
  sum = sum == 0.0f ? 0.0f : sum * exp2_approx(change * base_2_scale);  // 0 * inf is NaN
  sum = reduce_row<Sum>(sum, mine, 1);
  const int64_t steps = (vectors + mine.threads() - 1) >> mine.threads_log2;
  if (!is_plain_row(p, row_largest, sum)) {
    store_undefined_row<RowView<In, Out, int64_t>>(p, plan, steps);
    return;
  }
  const float factor = inverse_sum<Out>(sum);
#pragma unroll 2
  for (int64_t step = steps - 1; step >= 0; --step) {
    const int64_t first = row.first_of((step << mine.threads_log2) + mine.thread);
    const Packed<In, kV> raw = load_vector<true, kV>(row.x, first, row.columns, true, negative_infinity());
    float values[kV];
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      values[j] = exp2_approx((raw.value(j) - row_largest) * base_2_scale) * factor;
    }
    store_vector<kV>(row.y, first, row.columns, row.y_aligned, values);
  }
}

}  // namespace fastattn
