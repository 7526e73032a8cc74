// Online softmax along the rows of an accumulator, block of columns by block of columns.
#pragma once

#include "fragment.cuh"

namespace fastattn {

// tanh(x) to the accuracy of exp2_approx, three special functions in all: tanh_approx is too coarse for a softcap.
FASTATTN_DEVICE float tanh_exact(float x) {
  return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(2.0f * kLog2E * x));
}

// Running maximum and sum of the two rows that a thread shares with its quad. `factor` > 0 is the scores' factor times
// log2(e). The probabilities of row r so far, relative to 2**row_max_log2[r], sum to row_sum[r], of which each thread
// of the quad holds the part of its own columns. A row that has seen only -inf has row_max_log2 = -inf and row_sum = 0.
struct OnlineSoftmax {
  float row_max_log2[2] = {negative_infinity(), negative_infinity()};
  float row_sum[2] = {0.0f, 0.0f};

  // Converts a block of scores to probabilities; earlier sums must be multiplied by rescale[r].
  template <int N>
  FASTATTN_DEVICE void update(float (&scores)[N], float factor, float (&rescale)[2]) {
    float block_max[4] = {scores[0], scores[1], scores[2], scores[3]};  // two per row, for shorter dependency chains
#pragma unroll
    for (int i = 4; i < N; ++i) block_max[i % 4] = maximum(block_max[i % 4], scores[i]);
    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float new_max =
          maximum(row_max_log2[r], quad_max(maximum(block_max[2 * r], block_max[2 * r + 1])) * factor);
      base[r] = new_max == negative_infinity() ? 0.0f : new_max;  // -inf - -inf would be NaN; -inf - 0 is -inf
      rescale[r] = exp2_approx(row_max_log2[r] - base[r]);
      row_max_log2[r] = new_max;
      row_sum[r] *= rescale[r];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int r = fragment_half(i);
      scores[i] = exp2_approx(scores[i] * factor - base[r]);
      row_sum[r] += scores[i];
    }
  }

  // Sums over the quad. inverse_sum[r] normalises row r, 0 for a row that sees no key; lse[r] is the row's logsumexp.
  FASTATTN_DEVICE void finish(float (&inverse_sum)[2], float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] = quad_sum(row_sum[r]);
      inverse_sum[r] = row_sum[r] == 0.0f ? 0.0f : reciprocal_approx(row_sum[r]);
      lse[r] = (row_max_log2[r] + log2_approx(row_sum[r])) * kLn2;
    }
  }
};

// Multiplies the two rows of an accumulator.
template <int N>
FASTATTN_DEVICE void scale_rows(float (&accumulator)[N], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) accumulator[i] *= factor[fragment_half(i)];
}

}  // namespace fastattn
