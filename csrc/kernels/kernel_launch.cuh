// Launches a kernel, in clusters or not.
#pragma once

#include <climits>

#include "../launch.h"

namespace fastattn {

struct LaunchShape {
  int64_t blocks = 0;
  int threads = 0;
  int shared_bytes = 0;  // dynamic; always the same number for a kernel
  int cluster = 1;       // blocks; divides `blocks`
};

// The launch configuration in the runtime's form. It holds pointers to its own members.
struct LaunchConfig {
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = {};

  LaunchConfig(const LaunchShape& shape, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = shape.cluster;
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

// Queues the kernel, made ready for its shared memory. No blocks: nothing to do.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(const LaunchShape& shape, cudaStream_t stream, void (*kernel)(Parameters...),
                          const Arguments&... arguments) {
  if (shape.blocks == 0) return cudaSuccess;
  if (shape.blocks < 0 || shape.blocks > INT_MAX || shape.blocks % shape.cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  const cudaError_t error = prepare_kernel(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  if (error != cudaSuccess) return error;
  const LaunchConfig launch(shape, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, arguments...);
}

// How many clusters of the kernel the current device holds at a time. `shape` is that of one cluster.
template <class... Parameters>
cudaError_t resident_clusters(const LaunchShape& shape, void (*kernel)(Parameters...), int* clusters) {
  const LaunchConfig one(shape, nullptr);
  return max_active_clusters(reinterpret_cast<const void*>(kernel), one.config, clusters);
}

}  // namespace fastattn
