// The launches of launch.h, for the files of instantiations/.
#pragma once

#include <climits>

#include "launch.h"
#include "softmax_select.cuh"

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
  const cudaError_t error = prepare_kernel(reinterpret_cast<const void*>(kernel), kRowSharedBytes);
  if (error != cudaSuccess) {
    return error;
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

// launch_rows on a stream, as select_* calls it.
inline auto on(cudaStream_t stream) {
  return [stream](auto kernel, const auto& params, const RowPlan& plan, int64_t rows) {
    return launch_rows(kernel, params, plan, rows, stream);
  };
}

template <class In, class Out>
cudaError_t launch_softmax_forward(const SoftmaxForward& params, bool clusters, cudaStream_t stream) {
  return select_softmax_forward<In, Out>(params, clusters, on(stream));
}

template <class T, class Grad>
cudaError_t launch_softmax_backward(const SoftmaxBackward& params, bool clusters, cudaStream_t stream) {
  return select_softmax_backward<T, Grad>(params, clusters, on(stream));
}

template <class T>
cudaError_t launch_cross_entropy_forward(const CrossEntropyForward& params, cudaStream_t stream) {
  return select_cross_entropy_forward<T>(params, on(stream));
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
  const auto kernel = cross_entropy_backward_kernel<T>;
  const cudaError_t error = prepare_kernel(reinterpret_cast<const void*>(kernel), 0);
  if (error != cudaSuccess) {
    return error;
  }
  kernel<<<static_cast<unsigned>(blocks), kLossThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fastattn
