// Which kernel and which plan the rows of a call take. `launch(kernel, params, plan, rows)` is the caller's: the
// runtime's on a GPU, the stand-in's in emulation.
#pragma once

#include "cross_entropy.cuh"
#include "softmax.cuh"
#include "softmax_bwd.cuh"
#include "softmax_plain.cuh"

namespace fastattn {

inline int64_t count_rows(const RowSizes& sizes) { return sizes.columns == 0 ? 0 : sizes.rows; }

// The columns a row's vectors cover at most: where rows are not aligned, the first vector may begin before the row. A
// row that fills its threads completely must be aligned.
template <class T>
int64_t covered_columns(const void* data, const RowStrides& strides, int64_t columns, int width) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) / sizeof(T) % width == 0 && strides.outer % width == 0 &&
                       strides.mid % width == 0 && strides.inner % width == 0;
  return aligned ? columns : columns + width - 1;
}

template <class In, class Out, class Launch>
auto select_softmax_forward(const SoftmaxForward& p, bool clusters, Launch launch) {
  const int64_t columns = covered_columns<In>(p.x, p.x_strides, p.sizes.columns, kVector<In, Out>);
  const RowPlan plan = plan_for(forward_plans<sizeof(In)>(), columns, clusters);
  const int64_t rows = count_rows(p.sizes);
  if constexpr (kHasPlain<In, Out>) {
    if (is_plain(p)) {
      switch (plan.elements) {
        case 8:
          return launch(softmax_forward_plain_kernel<In, Out, 8, kRowThreads>, p, plan, rows);
        case 16:
          return launch(softmax_forward_plain_kernel<In, Out, 16, kMaxRowThreads>, p, plan, rows);
        case 32:
          return launch(softmax_forward_plain_kernel<In, Out, 32, kMaxRowThreads>, p, plan, rows);
        default:
          return launch(softmax_forward_plain_long_kernel<In, Out>, p, plan, rows);
      }
    }
  }
  if (plan.elements == 8) {
    return launch(softmax_forward_kernel<In, Out, 8, kRowThreads>, p, plan, rows);
  }
  if (plan.elements == 16) {
    return launch(softmax_forward_kernel<In, Out, 16, kMaxRowThreads>, p, plan, rows);
  }
  if constexpr (sizeof(In) == 2) {
    if (plan.elements == 32) {
      return launch(softmax_forward_kernel<In, Out, 32, kMaxRowThreads>, p, plan, rows);
    }
  }
  return launch(softmax_forward_long_kernel<In, Out>, p, plan, rows);
}

template <class T, class Grad, class Launch>
auto select_softmax_backward(const SoftmaxBackward& p, bool clusters, Launch launch) {
  const int64_t columns = covered_columns<T>(p.y, p.y_strides, p.sizes.columns, kVector<T, Grad>);
  const RowPlan plan = plan_for(kWidePlans, columns, clusters);
  const int64_t rows = count_rows(p.sizes);
  if (plan.elements == 8) {
    return launch(softmax_backward_kernel<T, Grad, 8, kRowThreads>, p, plan, rows);
  }
  if (plan.elements == 16) {
    return launch(softmax_backward_kernel<T, Grad, 16, kMaxRowThreads>, p, plan, rows);
  }
  return launch(softmax_backward_long_kernel<T, Grad>, p, plan, rows);
}

template <class T, class Launch>
auto select_cross_entropy_forward(const CrossEntropyForward& p, Launch launch) {
  return launch(cross_entropy_forward_kernel<T>, p, plan_for(kLossPlans, p.classes, false), p.rows);
}

// launch(kernel, blocks, params, parts)
template <class T, class Launch>
auto select_cross_entropy_backward(const CrossEntropyBackward& p, Launch launch) {
  const int64_t parts = loss_parts<T>(p.classes);
  return launch(cross_entropy_backward_kernel<T>, p.rows * parts, p, Divisor(parts, INT32_MAX));
}

}  // namespace fastattn
