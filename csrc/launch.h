// Launches, one per kernel family and dtypes: torch-free, declared here and instantiated in instantiations/.
//
// Each queues its kernel on the stream of the current device and returns what the runtime said. `clusters`: the device
// has them. An empty call launches nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "device/config.cuh"
#include "params.h"

namespace fastattn {

template <class In, class Out>
cudaError_t launch_softmax_forward(const SoftmaxForward& params, bool clusters, cudaStream_t stream);

template <class T, class Grad>
cudaError_t launch_softmax_backward(const SoftmaxBackward& params, bool clusters, cudaStream_t stream);

template <class T>
cudaError_t launch_cross_entropy_forward(const CrossEntropyForward& params, cudaStream_t stream);

template <class T>
cudaError_t launch_cross_entropy_backward(const CrossEntropyBackward& params, cudaStream_t stream);

}  // namespace fastattn
