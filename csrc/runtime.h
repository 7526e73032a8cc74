// Queries of the CUDA runtime. Device properties and kernels prepared for launch are cached; driver functions are
// looked up at each call. Torch-free. Every function may be called for the first time during stream capture.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace fastattn {

// Lets this thread make calls that an active stream capture, of this thread or another, would otherwise reject and be
// invalidated by. Calls made in its scope enqueue no work.
class RelaxedCapture {
 public:
  RelaxedCapture() : error_(cudaThreadExchangeStreamCaptureMode(&mode_)) {}
  ~RelaxedCapture() {
    if (error_ == cudaSuccess) cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

  cudaError_t error() const { return error_; }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the one before
  cudaError_t error_;
};

struct DeviceProperties {
  int major;  // compute capability
  int minor;
  int multiprocessors;
};

// Of the current device.
inline cudaError_t device_properties(DeviceProperties* properties) {
  static std::mutex mutex;
  static std::map<int, DeviceProperties> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    *properties = found->second;
    return cudaSuccess;
  }
  const RelaxedCapture relaxed;
  if (relaxed.error() != cudaSuccess) return relaxed.error();
  const std::pair<cudaDeviceAttr, int*> wanted[] = {
      {cudaDevAttrComputeCapabilityMajor, &properties->major},
      {cudaDevAttrComputeCapabilityMinor, &properties->minor},
      {cudaDevAttrMultiProcessorCount, &properties->multiprocessors},
  };
  for (const auto& [attribute, value] : wanted) {
    error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess) return error;
  }
  known.emplace(device, *properties);
  return cudaSuccess;
}

// Loads a kernel on the current device, which a first launch would otherwise do in the middle of a capture, and allows
// it `shared_bytes` of dynamic shared memory, always the same number for a kernel.
inline cudaError_t prepare_kernel(const void* kernel, int shared_bytes) {
  constexpr int kAllowedAnyway = 48 * 1024;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> ready;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (ready.count({kernel, device}) != 0) return cudaSuccess;
  const RelaxedCapture relaxed;
  if (relaxed.error() != cudaSuccess) return relaxed.error();
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && shared_bytes > kAllowedAnyway) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error == cudaSuccess) ready.insert({kernel, device});
  return error;
}

// How many clusters of a kernel with this launch configuration, which is always the same, the current device holds at a
// time.
inline cudaError_t max_active_clusters(const void* kernel, const cudaLaunchConfig_t& config, int* clusters) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  cudaError_t error = prepare_kernel(kernel, static_cast<int>(config.dynamicSmemBytes));
  if (error != cudaSuccess) return error;
  int device = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) {
    *clusters = found->second;
    return cudaSuccess;
  }
  const RelaxedCapture relaxed;
  if (relaxed.error() != cudaSuccess) return relaxed.error();
  error = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  if (error == cudaSuccess) known.emplace(std::make_pair(kernel, device), *clusters);
  return error;
}

// A function of the driver, as it was in CUDA 12.0, or null where the driver has none of that name. Nothing links
// libcuda: a machine without a driver can load the extension.
inline cudaError_t driver_function(const char* name, void** function) {
  const RelaxedCapture relaxed;
  if (relaxed.error() != cudaSuccess) return relaxed.error();
  *function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, function, cudaEnableDefault, &found);
#endif
  if (found != cudaDriverEntryPointSuccess) *function = nullptr;
  return error;
}

}  // namespace fastattn
