#include "kernels/attention_fwd_launch.cuh"

namespace fastattn {

template cudaError_t launch_attention_forward<half_t, 64>(const AttentionParams&, TensorMapEncoder, int, cudaStream_t);

}  // namespace fastattn
