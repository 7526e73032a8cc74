// The launches of csrc/launch.h, run by the emulation on the tensors' own memory.
#include "emulator_test.h"
#include "kernels/softmax_select.cuh"
#include "launch.h"

namespace fastattn {

template <class Params>
cudaError_t launch_rows(void (*kernel)(Params, RowPlan), const Params& params, const RowPlan& plan, int64_t rows) {
  const int64_t rows_here = rows_per_block(plan);
  const int64_t blocks = ceil_div(rows, rows_here) * plan.blocks();
  if (blocks == 0) {
    return cudaSuccess;
  }
  emulator::Launch launch{.grid = {static_cast<unsigned>(blocks), 1, 1},
                          .threads = static_cast<int>(plan.block_threads() * rows_here),
                          .shared_bytes = kRowSharedBytes,
                          .cluster = plan.blocks()};
  emulator::launch(emulator::options, launch, kernel, params, plan);
  return cudaSuccess;
}

constexpr auto kLaunch = [](auto kernel, const auto& params, const RowPlan& plan, int64_t rows) {
  return launch_rows(kernel, params, plan, rows);
};

template <class In, class Out>
cudaError_t launch_softmax_forward(const SoftmaxForward& params, bool clusters, cudaStream_t) {
  return select_softmax_forward<In, Out>(params, clusters, kLaunch);
}

template <class T, class Grad>
cudaError_t launch_softmax_backward(const SoftmaxBackward& params, bool clusters, cudaStream_t) {
  return select_softmax_backward<T, Grad>(params, clusters, kLaunch);
}

template <class T>
cudaError_t launch_cross_entropy_forward(const CrossEntropyForward& params, cudaStream_t) {
  return select_cross_entropy_forward<T>(params, kLaunch);
}

template <class T>
cudaError_t launch_cross_entropy_backward(const CrossEntropyBackward& params, cudaStream_t) {
  return select_cross_entropy_backward<T>(params, [](auto kernel, int64_t blocks, const auto&... arguments) {
    if (blocks > 0) {
      emulator::Launch launch{.grid = {static_cast<unsigned>(blocks), 1, 1}, .threads = kLossThreads};
      emulator::launch(emulator::options, launch, kernel, arguments...);
    }
    return cudaSuccess;
  });
}

#define INSTANTIATE(T)                                                                            \
  template cudaError_t launch_softmax_forward<T, T>(const SoftmaxForward&, bool, cudaStream_t);   \
  template cudaError_t launch_softmax_backward<T, T>(const SoftmaxBackward&, bool, cudaStream_t); \
  template cudaError_t launch_cross_entropy_forward<T>(const CrossEntropyForward&, cudaStream_t); \
  template cudaError_t launch_cross_entropy_backward<T>(const CrossEntropyBackward&, cudaStream_t);

INSTANTIATE(half_t)
INSTANTIATE(bfloat16_t)
INSTANTIATE(float)
template cudaError_t launch_softmax_forward<half_t, float>(const SoftmaxForward&, bool, cudaStream_t);
template cudaError_t launch_softmax_forward<bfloat16_t, float>(const SoftmaxForward&, bool, cudaStream_t);
template cudaError_t launch_softmax_backward<float, half_t>(const SoftmaxBackward&, bool, cudaStream_t);
template cudaError_t launch_softmax_backward<float, bfloat16_t>(const SoftmaxBackward&, bool, cudaStream_t);

}  // namespace fastattn
