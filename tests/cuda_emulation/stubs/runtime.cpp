// The little of the CUDA runtime that host code of csrc calls, where the emulation stands in for a GPU.
#include <cuda_runtime_api.h>

#include <cstring>

#include "emulator.h"
#include "emulator/tensor_map.h"

namespace {

int compute_capability = 90;

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t) { return "an error"; }

const char* cudaGetErrorString(cudaError_t) { return "of the emulated runtime"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = compute_capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = compute_capability % 10;
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
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&emulator::encode_tiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

__attribute__((visibility("default"))) void emulate_compute_capability(int value) { compute_capability = value; }

__attribute__((visibility("default"))) extern const char fastattn_build_info[] = "emulated";

}  // extern "C"
