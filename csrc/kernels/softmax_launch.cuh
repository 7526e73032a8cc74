// The launches of launch.h, for the files of instantiations/.
#pragma once

#include "kernel_launch.cuh"
#include "softmax_select.cuh"

namespace fastattn {

template <class Params>
cudaError_t launch_rows(void (*kernel)(Params, RowPlan), const Params& params, const RowPlan& plan, int64_t rows,
                        cudaStream_t stream) {
  const int rows_here = rows_per_block(plan);
  const LaunchShape shape = {ceil_div(rows, rows_here) * plan.blocks(), plan.block_threads() * rows_here,
                             kRowSharedBytes, plan.blocks()};
  return launch_kernel(shape, stream, kernel, params, plan);
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
  return select_cross_entropy_backward<T>(p, [stream](auto kernel, int64_t blocks, const auto&... arguments) {
    return launch_kernel({blocks, kLossThreads}, stream, kernel, arguments...);
  });
}

}  // namespace fastattn
