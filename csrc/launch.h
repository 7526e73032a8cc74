// Launches, one per kernel family and dtypes: torch-free, declared here and instantiated in instantiations/.
//
// Each enqueues its kernel on the stream of the current device and returns the runtime's error code. `clusters`:
// whether the device supports clusters. An empty call launches nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "attention_params.h"
#include "device/config.cuh"
#include "device/tensor_map.h"
#include "params.h"
#include "runtime.h"

namespace fastattn {

template <class In, class Out>
cudaError_t launch_softmax_forward(const SoftmaxForward& params, bool clusters, cudaStream_t stream);

template <class T, class Grad>
cudaError_t launch_softmax_backward(const SoftmaxBackward& params, bool clusters, cudaStream_t stream);

template <class T>
cudaError_t launch_cross_entropy_forward(const CrossEntropyForward& params, cudaStream_t stream);

template <class T>
cudaError_t launch_cross_entropy_backward(const CrossEntropyBackward& params, cudaStream_t stream);

// kHeadDim is padded_head_dim(params.head_dim). There is at least one query and one key. `multiprocessors` are the
// device's; the results do not depend on them.
template <class Element, int kHeadDim>
cudaError_t launch_attention_forward(const AttentionParams& params, TensorMapEncoder encode, int multiprocessors,
                                     cudaStream_t stream);

// The gradients whose pointers are not null, of a call with at least one query and one key; dk and dv come together.
template <class Element, int kHeadDim>
cudaError_t launch_attention_backward(const AttentionBackwardParams& params, TensorMapEncoder encode,
                                      cudaStream_t stream);

}  // namespace fastattn
