// The attention launches of csrc/launch.h at head dim 64 in float16, run by the emulation on the tensors' own memory.
#include "emulator_test.h"
#include "kernels/attention_bwd_launch.cuh"
#include "kernels/attention_fwd_launch.cuh"

namespace fastattn {

template <class Shape>
emulator::Launch blocks_of(int blocks) {
  return {
      .grid = {static_cast<unsigned>(blocks), 1, 1}, .threads = Shape::kThreads, .shared_bytes = Shape::kSharedBytes};
}

template <>
cudaError_t launch_attention_forward<half_t, 64>(const AttentionParams& params, TensorMapEncoder encode, int,
                                                 cudaStream_t) {
  return with_forward_shape<half_t, 64>(params, [&](auto shape) {
    using Shape = decltype(shape);
    ForwardMaps maps;
    if (encode_forward_maps<Shape>(encode, params, &maps) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    emulator::launch(emulator::options, blocks_of<Shape>(2), attention_fwd_sm90<Shape>, maps, params,
                     forward_schedule<Shape>(params));
    return cudaSuccess;
  });
}

template <bool kSoftcap>
cudaError_t run_backward(const AttentionBackwardParams& params, TensorMapEncoder encode) {
  const emulator::Launch rows{.grid = {static_cast<unsigned>(row_pass_blocks(params.call)), 1, 1},
                              .threads = kRowPassThreads};
  emulator::launch(emulator::options, rows, attention_bwd_rows_kernel<half_t, kRowThreads<64>>, params);
  const auto pass = [&](auto shape, auto kernel, const TileSchedule& schedule) {
    using Shape = decltype(shape);
    BackwardMaps maps;
    if (encode_backward_maps<Shape>(encode, params, &maps) != CUDA_SUCCESS) return cudaErrorInvalidValue;
    emulator::launch(emulator::options, blocks_of<Shape>(schedule.num_tiles), kernel, params, maps, schedule);
    return cudaSuccess;
  };
  return run_gradient_passes<cudaError_t, half_t, 64, kSoftcap>(
      params,
      [&](auto shape, const TileSchedule& schedule) {
        return pass(shape, attention_bwd_dkdv_kernel<decltype(shape)>, schedule);
      },
      [&](auto shape, const TileSchedule& schedule) {
        return pass(shape, attention_bwd_dq_kernel<decltype(shape)>, schedule);
      });
}

template <>
cudaError_t launch_attention_backward<half_t, 64>(const AttentionBackwardParams& params, TensorMapEncoder encode,
                                                  cudaStream_t) {
  return params.call.softcap != 0.0f ? run_backward<true>(params, encode) : run_backward<false>(params, encode);
}

}  // namespace fastattn
