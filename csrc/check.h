// Checks of host code: arguments (the message gives the name, the value and the requirement) and kernel launches.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "runtime.h"

namespace fastattn {

inline void check_cuda(const char* name, const at::Tensor& tensor) {
#if defined(FASTATTN_EMULATION)
  TORCH_CHECK_VALUE(tensor.is_cpu(), name, ": the emulation has the CPU's memory");
  return;
#endif
  TORCH_CHECK_VALUE(tensor.is_cuda(), name, ": got device ", tensor.device(), ", needs a CUDA device");
}

inline void check_same_device(const char* name, const at::Tensor& tensor, const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), name, ": got device ", tensor.device(), ", needs ",
                    other.device());
}

inline void check_dtype(const char* name, const at::Tensor& tensor, at::ScalarType wanted) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == wanted, name, ": got ", tensor.scalar_type(), ", needs ", wanted);
}

inline void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef wanted) {
  TORCH_CHECK_VALUE(tensor.sizes() == wanted, name, ": got shape ", tensor.sizes(), ", needs ", wanted);
}

// Raises the error of a launch, if any, and clears it, so that the next call does not see it.
inline void check_launch(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) {
    return;
  }
  cudaGetLastError();
  TORCH_CHECK(error != cudaErrorNoKernelImageForDevice, kernel,
              ": the extension is not built for this GPU; `fastattn build` builds it for the GPUs present");
  TORCH_CHECK(false, kernel, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// Whether the current device supports thread block clusters.
inline bool has_clusters() {
  DeviceProperties device = {};
  check_launch("cudaDeviceGetAttribute", device_properties(&device));
  return device.major >= 9;
}

}  // namespace fastattn
