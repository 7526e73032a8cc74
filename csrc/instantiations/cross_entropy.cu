#include "kernels/softmax_launch.cuh"

namespace fastattn {

template cudaError_t launch_cross_entropy_forward<half_t>(const CrossEntropyForward&, cudaStream_t);
template cudaError_t launch_cross_entropy_forward<bfloat16_t>(const CrossEntropyForward&, cudaStream_t);
template cudaError_t launch_cross_entropy_forward<float>(const CrossEntropyForward&, cudaStream_t);
template cudaError_t launch_cross_entropy_backward<half_t>(const CrossEntropyBackward&, cudaStream_t);
template cudaError_t launch_cross_entropy_backward<bfloat16_t>(const CrossEntropyBackward&, cudaStream_t);
template cudaError_t launch_cross_entropy_backward<float>(const CrossEntropyBackward&, cudaStream_t);

}  // namespace fastattn
