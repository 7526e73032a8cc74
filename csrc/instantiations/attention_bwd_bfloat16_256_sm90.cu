#include "kernels/attention_bwd_launch.cuh"

namespace fastattn {

template cudaError_t launch_attention_backward<bfloat16_t, 256>(const AttentionBackwardParams&, TensorMapEncoder, cudaStream_t);

}  // namespace fastattn
