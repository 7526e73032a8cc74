// Cross-entropy of rows of logits z with a class each: an online pass for the loss, an elementwise one for its
// gradient.
//
//   loss = log(sum(exp(z - max))) + (1 - s) * (max - z[target]) + s * (max - mean(z))
//   dz = dloss * (exp(z - max - log(sum)) - (1 - s) * [target] - s / classes)
//
// With class weights w, and lse = max + log(sum):
//
//   loss = (1 - s) * w[target] * (lse - z[target]) + s * mean(w * (lse - z)) + z_loss * lse^2
//   dz = dloss * (exp(z - lse) * ((1 - s) * w[target] + s * mean(w) + 2 * z_loss * lse)
//                 - (1 - s) * w[target] * [target] - s * w / classes)
//
// An ignored row has loss 0, no gradient, and is not read; a target that is not a class gives NaN.
#pragma once

#include "rows.cuh"

namespace fastattn {

constexpr int kLossThreads = 256;  // of a block of the backward
constexpr int kLossVectors = 2;    // each of them takes

// Elements of a row that a block of the backward takes.
template <class T>
constexpr int kLossPart = kLossThreads * kLossVectors * kVector<T>;

// The number of parts a row is divided into; its first vector may begin before the row.
template <class T>
int64_t loss_parts(int64_t classes) {
  return ceil_div(classes + kVector<T> - 1, kLossPart<T>);
}

FASTATTN_DEVICE bool is_class(int64_t target, int64_t classes) { return target >= 0 && target < classes; }

// (1 - s) * w[target]
template <class Params>
FASTATTN_DEVICE float target_weight(const Params& p, int64_t target) {
  const float weight = p.class_weight != nullptr && is_class(target, p.classes) ? p.class_weight[target] : 1.0f;
  return (1.0f - p.smoothing) * weight;
}

// The loss of one row, read in steps by its threads.
template <class T>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(kLongRowThreads, 1)
    cross_entropy_forward_kernel(const FASTATTN_GRID_CONSTANT CrossEntropyForward p,
                                 const FASTATTN_GRID_CONSTANT RowPlan plan) {
  constexpr int kV = kVector<T>;
  const RowThreads mine = row_threads(plan);
  const bool exists = mine.row < p.rows;
  const int64_t target = exists ? p.target[mine.row] : p.ignore_index;
  const bool kept = target != p.ignore_index;
  const T* const z = static_cast<const T*>(p.logits) + (exists ? mine.row : 0) * p.row_stride;
  const int shift = misalignment<kV>(z);
  const int64_t vectors = kept ? vectors_of(p.classes, shift, kV) : 0;
  float largest = negative_infinity();
  float sum = 0.0f;
  float plain_sum = 0.0f;
#pragma unroll 2
  for (int64_t vector = mine.thread; vector < vectors; vector += mine.threads()) {
    const int64_t first = vector * kV - shift;
    const Packed<T, kV> raw = load_vector<true, kV>(z, first, p.classes, true, negative_infinity());
    float new_largest = largest;
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      new_largest = maximum(new_largest, raw.value(j));
    }
    const float reference = finite_maximum(new_largest);
    sum *= exponential(largest - reference);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      sum += exponential(raw.value(j) - reference);
    }
    if (p.smoothing != 0.0f) {
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        if (first + j >= 0 && first + j < p.classes) {
          plain_sum += p.class_weight == nullptr ? raw.value(j) : raw.value(j) * p.class_weight[first + j];
        }
      }
    }
    largest = new_largest;
  }
  const float row_largest = reduce_row<Maximum>(largest, mine, 0);
  sum = sum == 0.0f ? 0.0f : sum * exponential(finite_maximum(largest) - finite_maximum(row_largest));
  sum = reduce_row<Sum>(sum, mine, 1);
  plain_sum = reduce_row<Sum>(plain_sum, mine, 2);
  if (mine.thread != 0 || !exists) {
    return;
  }
  const float log_sum = kept ? logf(sum) : 0.0f;
  float loss = 0.0f;
  if (kept) {
    const float chosen = is_class(target, p.classes) ? to_float(z[target]) : not_a_number();
    const float mean = plain_sum / static_cast<float>(p.classes);
    if (p.class_weight == nullptr) {
      loss = log_sum + (1.0f - p.smoothing) * (row_largest - chosen);
      loss += p.smoothing != 0.0f ? p.smoothing * (row_largest - mean) : 0.0f;
    } else {
      const float weight_mean = *p.weight_mean;
      loss = target_weight(p, target) * (log_sum + (row_largest - chosen));
      loss += p.smoothing != 0.0f ? p.smoothing * (weight_mean * log_sum + (weight_mean * row_largest - mean)) : 0.0f;
    }
    const float lse = row_largest + log_sum;
    loss += p.z_loss != 0.0f ? p.z_loss * lse * lse : 0.0f;
  }
  p.losses[mine.row] = loss;
  p.norms[2 * mine.row] = row_largest;
  p.norms[2 * mine.row + 1] = log_sum;
}

// The gradient of a part of one row; `parts` divides the number of a block, of 31 bits, by loss_parts. A thread writes
// only where it alone has read: dlogits may be the logits.
template <class T>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(kLossThreads, 1)
    cross_entropy_backward_kernel(const FASTATTN_GRID_CONSTANT CrossEntropyBackward p,
                                  const FASTATTN_GRID_CONSTANT Divisor parts) {
  constexpr int kV = kVector<T>;
  const uint32_t block = block_index().x;
  const uint32_t block_row = quotient(block, parts);
  const int64_t row = block_row;
  const uint32_t part = block - block_row * static_cast<uint32_t>(parts.divisor);
  const int64_t target = p.target[row];
  const bool kept = target != p.ignore_index;
  const T* const z = static_cast<const T*>(p.logits) + row * p.row_stride;
  T* const dz = static_cast<T*>(p.dlogits) + row * p.dlogits_row_stride;
  const int shift = misalignment<kV>(z);
  const bool dz_aligned = aligned_before(dz, shift);
  const float reference = p.norms[2 * row];
  const float log_sum = p.norms[2 * row + 1];
  const float dloss = kept && !is_class(target, p.classes) ? not_a_number() : p.dlosses[row];
  const float everywhere = p.smoothing / static_cast<float>(p.classes);
  const float own = target_weight(p, target);
  float factor = p.class_weight == nullptr ? 1.0f : own + p.smoothing * *p.weight_mean;
  factor += p.z_loss != 0.0f ? 2.0f * p.z_loss * (reference + log_sum) : 0.0f;
  const int64_t vector = static_cast<int64_t>(part) * (kLossThreads * kLossVectors) + thread_index();
  Packed<T, kV> raw[kLossVectors];
#pragma unroll
  for (int i = 0; i < kLossVectors; ++i) {
    const int64_t first = (vector + i * kLossThreads) * kV - shift;
    raw[i] = load_vector<false, kV>(z, first, kept ? p.classes : int64_t{0}, true, 0.0f);
  }
#pragma unroll
  for (int i = 0; i < kLossVectors; ++i) {
    const int64_t first = (vector + i * kLossThreads) * kV - shift;
    const int chosen = target >= first && target < first + kV ? static_cast<int>(target - first) : kV;
    float spread[kV];
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      spread[j] = everywhere;
    }
    if (p.class_weight != nullptr && everywhere != 0.0f) {
#pragma unroll
      for (int j = 0; j < kV; ++j) {
        spread[j] *= first + j >= 0 && first + j < p.classes ? p.class_weight[first + j] : 0.0f;
      }
    }
    float gradient[kV];
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const float probability = exponential(raw[i].value(j) - reference - log_sum) * factor - spread[j];
      const float wanted = j == chosen ? own : 0.0f;
      gradient[j] = kept ? dloss * (probability - wanted) : 0.0f;
    }
    store_vector<kV>(dz, first, p.classes, dz_aligned, gradient);
  }
}

}  // namespace fastattn
