// Chooses a plan for the rows of a call and launches its kernel; for the files of instantiations/.
#pragma once

#include <climits>

#include "cross_entropy.cuh"
#include "launch.h"
#include "softmax.cuh"

namespace fastattn {

template <class Params>
cudaError_t launch_rows(void (*kernel)(Params, RowPlan), const Params& params, const RowPlan& plan, int64_t rows,
                        cudaStream_t stream) {
  const int rows_here = rows_per_block(plan);
  const int64_t blocks = (rows + rows_here - 1) / rows_here * plan.blocks;
  if (blocks == 0) {
    return cudaSuccess;
  }
  if (blocks > INT_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.blocks;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(plan.lanes * plan.warps * rows_here);
  config.dynamicSmemBytes = kRowSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params, plan);
}

inline int64_t count_rows(const RowSizes& sizes) {
  return sizes.columns == 0 ? 0 : sizes.outer * sizes.mid * sizes.inner;
}

// What a row may take up when its first vector begins before it. A row that fills its threads to the last element has
// to begin where a vector does.
template <class T>
int64_t covered_columns(const void* data, const RowStrides& strides, int64_t columns, int width) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) / sizeof(T) % width == 0 && strides.outer % width == 0 &&
                       strides.mid % width == 0 && strides.inner % width == 0;
  return aligned ? columns : columns + width - 1;
}

template <class In, class Out>
cudaError_t launch_softmax_forward(const SoftmaxForward& p, bool clusters, cudaStream_t stream) {
  const int64_t columns = covered_columns<In>(p.x, p.x_strides, p.sizes.columns, kVector<In, Out>);
  const RowPlan plan = plan_for(forward_plans<sizeof(In)>(), columns, clusters);
  const int64_t rows = count_rows(p.sizes);
  if (plan.elements == 8) {
    return launch_rows(softmax_forward_kernel<In, Out, 8, kRowThreads>, p, plan, rows, stream);
  }
  if (plan.elements == 16) {
    return launch_rows(softmax_forward_kernel<In, Out, 16, kMaxRowThreads>, p, plan, rows, stream);
  }
  if constexpr (sizeof(In) == 2) {
    if (plan.elements == 32) {
      return launch_rows(softmax_forward_kernel<In, Out, 32, kMaxRowThreads>, p, plan, rows, stream);
    }
  }
  return launch_rows(softmax_forward_long_kernel<In, Out>, p, plan, rows, stream);
}

template <class T, class Grad>
cudaError_t launch_softmax_backward(const SoftmaxBackward& p, bool clusters, cudaStream_t stream) {
  const int64_t columns = covered_columns<T>(p.y, p.y_strides, p.sizes.columns, kVector<T, Grad>);
  const RowPlan plan = plan_for(kWidePlans, columns, clusters);
  const int64_t rows = count_rows(p.sizes);
  if (plan.elements == 8) {
    return launch_rows(softmax_backward_kernel<T, Grad, 8, kRowThreads>, p, plan, rows, stream);
  }
  if (plan.elements == 16) {
    return launch_rows(softmax_backward_kernel<T, Grad, 16, kMaxRowThreads>, p, plan, rows, stream);
  }
  return launch_rows(softmax_backward_long_kernel<T, Grad>, p, plan, rows, stream);
}

template <class T>
cudaError_t launch_cross_entropy_forward(const CrossEntropyForward& p, cudaStream_t stream) {
  const RowPlan plan = plan_for(kLossPlans, p.classes, false);
  return launch_rows(cross_entropy_forward_kernel<T>, p, plan, p.rows, stream);
}

template <class T>
cudaError_t launch_cross_entropy_backward(const CrossEntropyBackward& p, cudaStream_t stream) {
  const int64_t blocks = p.rows * loss_parts<T>(p.classes);
  if (blocks == 0) {
    return cudaSuccess;
  }
  if (blocks > INT_MAX) {
    return cudaErrorInvalidConfiguration;
  }
  cross_entropy_backward_kernel<T><<<static_cast<unsigned>(blocks), kLossThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fastattn
