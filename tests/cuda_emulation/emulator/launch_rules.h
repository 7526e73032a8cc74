// A launch: what the driver refuses, then the run.
#pragma once

#include "copies.h"
#include "machine.h"

namespace emulator {

constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr size_t kParameterBytes = 4096;
constexpr int kPortableCluster = 8;  // blocks
constexpr int kMultiprocessorThreads = 2048;

void check_launch(const Launch& launch) {
  const auto refuse = [](const std::string& why) { throw Failure("the launch is refused: " + why); };
  const uint3 grid = launch.grid;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) refuse("an empty grid");
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    refuse(text("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z));
  }
  if (launch.threads < 1 || launch.threads > kMaxThreads) refuse("a block has 1 to 1024 threads");
  if (launch.min_blocks < 1 || launch.threads * launch.min_blocks > kMultiprocessorThreads) {
    refuse(text("%d blocks of %d threads on a multiprocessor", launch.min_blocks, launch.threads));
  }
  if (launch.shared_bytes > kSharedLimit) refuse(text("%zu bytes of shared memory", launch.shared_bytes));
  if (launch.shared_bytes > std::max(launch.max_shared_bytes, kDefaultSharedBytes)) {
    refuse(text("%zu bytes of shared memory need cudaFuncAttributeMaxDynamicSharedMemorySize", launch.shared_bytes));
  }
  if (launch.cluster < 1 || launch.cluster > kPortableCluster) refuse(text("a cluster of %d blocks", launch.cluster));
  if (grid.x % launch.cluster != 0) refuse("the grid is not a multiple of the cluster");
  if (launch.parameter_bytes > kParameterBytes) refuse(text("%zu bytes of parameters", launch.parameter_bytes));
}

void run(const Options& options, const Launch& launch, void (*kernel)(const void*), const void* context) {
  check_launch(launch);
  loaded_boxes.clear();
  Machine machine(options, launch, [=] { kernel(context); });
  machine_pointer = &machine;
  try {
    machine.run();
  } catch (...) {
    machine_pointer = nullptr;
    throw;
  }
  machine_pointer = nullptr;
}

}  // namespace emulator
