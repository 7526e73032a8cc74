// The functions of the CUDA runtime that the host code of csrc calls, for the emulated GPU.
#include <cuda_runtime_api.h>

#include <cstring>
#include <utility>

#include "emulator.h"
#include "emulator/tensor_map.h"

namespace {

// The current device's number is its compute capability, so that values cached per device stay valid.
int current_device = 90;
bool capturing = false;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

// The error of a call that a capture in progress does not permit.
cudaError_t unless_capturing() {
  return capturing && capture_mode != cudaStreamCaptureModeRelaxed ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t) { return "an error"; }

const char* cudaGetErrorString(cudaError_t) { return "of the emulated runtime"; }

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (const cudaError_t error = unless_capturing(); error != cudaSuccess) return error;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  if (const cudaError_t error = unless_capturing(); error != cudaSuccess) return error;
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&emulator::encode_tiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

__attribute__((visibility("default"))) void emulate_compute_capability(int value) { current_device = value; }

__attribute__((visibility("default"))) void emulate_capture(int value) { capturing = value != 0; }

__attribute__((visibility("default"))) extern const char fastattn_build_info[] = "emulated";

}  // extern "C"
