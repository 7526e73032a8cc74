// The attention launches of csrc/launch.h in float16, at head dims 64 and 128, run by the emulation on the tensors' own
// memory.
#include "attention_runs.h"

namespace fastattn {

constexpr int kForwardBlocks = 2;

template <>
cudaError_t launch_attention_forward<half_t, 64>(const AttentionParams& params, TensorMapEncoder encode, int,
                                                 cudaStream_t) {
  return emulate_forward<half_t, 64>(params, encode, kForwardBlocks);
}

template <>
cudaError_t launch_attention_forward<half_t, 128>(const AttentionParams& params, TensorMapEncoder encode, int,
                                                  cudaStream_t) {
  return emulate_forward<half_t, 128>(params, encode, kForwardBlocks);
}

template <>
cudaError_t launch_attention_backward<half_t, 64>(const AttentionBackwardParams& params, TensorMapEncoder encode,
                                                  cudaStream_t) {
  return emulate_backward<half_t, 64>(params, encode);
}

template <>
cudaError_t launch_attention_backward<half_t, 128>(const AttentionBackwardParams& params, TensorMapEncoder encode,
                                                   cudaStream_t) {
  return emulate_backward<half_t, 128>(params, encode);
}

}  // namespace fastattn
