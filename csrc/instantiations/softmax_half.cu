#include "kernels/softmax_launch.cuh"

namespace fastattn {

template cudaError_t launch_softmax_forward<half_t, half_t>(const SoftmaxForward&, bool, cudaStream_t);
template cudaError_t launch_softmax_forward<half_t, float>(const SoftmaxForward&, bool, cudaStream_t);
template cudaError_t launch_softmax_backward<half_t, half_t>(const SoftmaxBackward&, bool, cudaStream_t);
template cudaError_t launch_softmax_backward<float, half_t>(const SoftmaxBackward&, bool, cudaStream_t);

}  // namespace fastattn
