// The attention launches of csrc/launch.h in float16, at head dims 64 and 128, run by the emulation on the tensors' own
// memory.
#include "attention_runs.h"

namespace fastattn {

// The cluster size of the last forward launch.
int forward_cluster_blocks = 0;

// As on a device of so many multiprocessors, all of them in clusters.
template <int kHeadDim>
cudaError_t run_forward(const AttentionParams& params, TensorMapEncoder encode, int multiprocessors) {
  constexpr int kForwardBlocks = 2;
  const int clusters = multiprocessors / forward_cluster(kHeadDim);
  const bool in_clusters = runs_in_clusters<half_t, kHeadDim>(params, multiprocessors, clusters);
  forward_cluster_blocks = in_clusters ? forward_cluster(kHeadDim) : 1;
  return emulate_forward<half_t, kHeadDim>(params, encode, in_clusters, kForwardBlocks);
}

template <>
cudaError_t launch_attention_forward<half_t, 64>(const AttentionParams& params, TensorMapEncoder encode,
                                                 int multiprocessors, cudaStream_t) {
  return run_forward<64>(params, encode, multiprocessors);
}

template <>
cudaError_t launch_attention_forward<half_t, 128>(const AttentionParams& params, TensorMapEncoder encode,
                                                  int multiprocessors, cudaStream_t) {
  return run_forward<128>(params, encode, multiprocessors);
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

extern "C" __attribute__((visibility("default"))) int last_forward_cluster() {
  return fastattn::forward_cluster_blocks;
}
