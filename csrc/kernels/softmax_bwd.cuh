// The gradient of softmax over rows.
//
//   dx = scale * y * (dy - sum(y * dy))                         log: scale * (dy - exp(y) * sum(dy))
//
// Arithmetic and columns are as in softmax.cuh. Where y is the constant that softmax.cuh gives to hidden elements, dx
// is 0.
#pragma once

#include "rows.cuh"

namespace fastattn {

// A row of a backward call and how this thread reads it. T: dtype of y and dy, Grad: of dx.
template <class T, class Grad, class Index>
struct BackwardRow {
  static constexpr int kV = kVector<T, Grad>;

  const T* y;
  const T* dy;
  Grad* dx;
  Index columns;
  int shift;  // the first vector begins this many elements before the row
  bool dy_aligned;
  bool dx_aligned;
  bool log;

  FASTATTN_DEVICE BackwardRow(const SoftmaxBackward& p, int64_t row) {
    const RowStrides* const strides[] = {&p.y_strides, &p.dy_strides, &p.dx_strides};
    int64_t offsets[3];
    row_offsets(row, p.sizes, strides, offsets);
    y = opaque(static_cast<const T*>(p.y) + offsets[0]);
    dy = opaque(static_cast<const T*>(p.dy) + offsets[1]);
    dx = opaque(static_cast<Grad*>(p.dx) + offsets[2]);
    columns = row < p.sizes.rows ? static_cast<Index>(p.sizes.columns) : 0;
    shift = misalignment<kV>(y);
    dy_aligned = aligned_before(dy, shift);
    dx_aligned = aligned_before(dx, shift);
    log = p.log;
  }

  FASTATTN_DEVICE Index first_of(Index vector) const { return vector * kV - shift; }

  FASTATTN_DEVICE float constant() const { return log ? negative_infinity() : 0.0f; }

  FASTATTN_DEVICE Packed<T, kV> load_y(Index first) const {
    return load_vector<true, kV>(y, first, columns, true, constant());
  }

  FASTATTN_DEVICE Packed<T, kV> load_dy(Index first) const {
    return load_vector<true, kV>(dy, first, columns, dy_aligned, 0.0f);
  }

  // The term of the row's sum: y * dy, in log dy; 0 where y is that constant, even if dy is NaN there.
  FASTATTN_DEVICE float term(float result, float upstream_grad) const {
    if (result == constant()) {
      return 0.0f;
    }
    return log ? upstream_grad : result * upstream_grad;
  }

  FASTATTN_DEVICE float gradient(float result, float upstream_grad, float total, float scale) const {
    if (result == constant()) {
      return 0.0f;
    }
    return scale * (log ? upstream_grad - exponential(result) * total : result * (upstream_grad - total));
  }
};

// The gradient of one row, held by its threads.
template <class T, class Grad, int Elements, int Threads>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(Threads, kRowBlocks<Threads>)
    softmax_backward_kernel(const FASTATTN_GRID_CONSTANT SoftmaxBackward p, const FASTATTN_GRID_CONSTANT RowPlan plan) {
  constexpr int kV = kVector<T, Grad>;
  constexpr int kVectors = Elements / kV;
  const RowThreads mine = row_threads(plan);
  announce_block<kWithinWarp<Elements>>(mine);
  const BackwardRow<T, Grad, int> row(p, mine.row);
  Packed<T, kV> y[kVectors];
  Packed<T, kV> dy[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int first = row.first_of(mine.thread + (i << mine.threads_log2));
    y[i] = row.load_y(first);
    dy[i] = row.load_dy(first);
  }
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      total += row.term(y[i].value(j), dy[i].value(j));
    }
  }
  total = reduce_row<Sum, kWithinWarp<Elements>>(total, mine, 0);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float gradient[kV];
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      gradient[j] = row.gradient(y[i].value(j), dy[i].value(j), total, p.scale);
    }
    store_vector<kV>(row.dx, row.first_of(mine.thread + (i << mine.threads_log2)), row.columns, row.dx_aligned,
                     gradient);
  }
}

// The gradient of one row of any length: the sum, then the gradient, from the row's end, which was read last.
template <class T, class Grad>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(kLongRowThreads, 1)
    softmax_backward_long_kernel(const FASTATTN_GRID_CONSTANT SoftmaxBackward p,
                                 const FASTATTN_GRID_CONSTANT RowPlan plan) {
  constexpr int kV = kVector<T, Grad>;
  const RowThreads mine = row_threads(plan);
  const BackwardRow<T, Grad, int64_t> row(p, mine.row);
  const int64_t vectors = vectors_of(row.columns, row.shift, kV);
  float total = 0.0f;
#pragma unroll 2
  for (int64_t vector = mine.thread; vector < vectors; vector += mine.threads()) {
    const int64_t first = row.first_of(vector);
    const Packed<T, kV> y = row.load_y(first);
    const Packed<T, kV> dy = row.load_dy(first);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      total += row.term(y.value(j), dy.value(j));
    }
  }
  total = reduce_row<Sum>(total, mine, 0);
  const int64_t steps = (vectors + mine.threads() - 1) >> mine.threads_log2;
#pragma unroll 2
  for (int64_t step = steps - 1; step >= 0; --step) {
    const int64_t first = row.first_of((step << mine.threads_log2) + mine.thread);
    const Packed<T, kV> y = row.load_y(first);
    const Packed<T, kV> dy = row.load_dy(first);
    float gradient[kV];
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      gradient[j] = row.gradient(y.value(j), dy.value(j), total, p.scale);
    }
    store_vector<kV>(row.dx, first, row.columns, row.dx_aligned, gradient);
  }
}

}  // namespace fastattn
