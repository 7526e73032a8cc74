#include "kernels/attention_bwd_launch.cuh"

namespace fastattn {

template cudaError_t launch_attention_backward<half_t, 128>(const AttentionBackwardParams&, TensorMapEncoder, cudaStream_t);

}  // namespace fastattn
