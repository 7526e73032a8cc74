#include "kernels/softmax_launch.cuh"

namespace fastattn {

template cudaError_t launch_softmax_forward<bfloat16_t, bfloat16_t>(const SoftmaxForward&, bool, cudaStream_t);
template cudaError_t launch_softmax_forward<bfloat16_t, float>(const SoftmaxForward&, bool, cudaStream_t);
template cudaError_t launch_softmax_backward<bfloat16_t, bfloat16_t>(const SoftmaxBackward&, bool, cudaStream_t);
template cudaError_t launch_softmax_backward<float, bfloat16_t>(const SoftmaxBackward&, bool, cudaStream_t);

}  // namespace fastattn
