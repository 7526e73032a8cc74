#include "kernels/softmax_launch.cuh"

namespace fastattn {

template cudaError_t launch_softmax_forward<float, float>(const SoftmaxForward&, bool, cudaStream_t);
template cudaError_t launch_softmax_backward<float, float>(const SoftmaxBackward&, bool, cudaStream_t);

}  // namespace fastattn
