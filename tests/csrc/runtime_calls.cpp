// Host code of csrc against a CUDA runtime that is captured and counts what it is asked: runtime.h and the cache of
// tensor maps. Prints the nanoseconds of a map that is found, then exits with 0, or names what was wrong.
//
// With OLD_RUNTIME, the runtime is that of CUDA 12.4, which has no cudaGetDriverEntryPointByVersion.
#include <cuda.h>
#include <cuda_runtime_api.h>

#if defined(OLD_RUNTIME)
#undef CUDART_VERSION
#define CUDART_VERSION 12040
#define cudaGetDriverEntryPointByVersion is_not_in_this_runtime
#endif

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "device/tensor_map.h"
#include "runtime.h"

namespace {

int device = 0;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
int attribute_calls = 0, loads = 0, allowed = 0, encodings = 0, occupancy_calls = 0;

cudaError_t permitted() {
  return mode == cudaStreamCaptureModeRelaxed ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  ++encodings;
  if (data == nullptr) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof(*map));
  uint64_t words[16] = {reinterpret_cast<uintptr_t>(data), rank, static_cast<uint64_t>(type), static_cast<uint64_t>(swizzle)};
  for (cuuint32_t i = 0; i < rank; ++i) {
    words[4 + i] = sizes[i] << 8 | box[i];
    if (i > 0) words[9 + i] = strides[i - 1];
  }
  std::memcpy(map, words, sizeof(*map) < sizeof(words) ? sizeof(*map) : sizeof(words));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(*other, mode);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int of) {
  ++attribute_calls;
  *value = 10 + of;
  return permitted();
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  ++loads;
  return permitted();
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  allowed = bytes;
  return permitted();
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  ++occupancy_calls;
  check(static_cast<int>(config->dynamicSmemBytes) == allowed, "a kernel that may not have its shared memory yet");
  *clusters = 60 + device;
  return permitted();
}

#if defined(OLD_RUNTIME)
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* found) {
#else
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  check(version == 12000, "a version of the driver's functions that CUDA 12.0 does not have");
#endif
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = reinterpret_cast<void*>(known ? &encode : nullptr);
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return permitted();
}

}  // extern "C"

namespace fastattn {

using Sizes = std::array<uint64_t, 4>;
using Strides = std::array<uint64_t, 3>;
using Box = std::array<uint32_t, 4>;

CUresult map_of(CUtensorMap* map, const void* data, const Sizes& sizes, const Strides& strides, const Box& box,
                CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  return encode_tensor_map<4>(&encode, map, type, data, sizes, strides, box, swizzle);
}

void test_first_calls_within_a_capture() {
  DeviceProperties properties = {};
  for (int repeat = 0; repeat < 3; ++repeat) {
    for (device = 0; device < 2; ++device) {
      check(device_properties(&properties) == cudaSuccess, "properties of a device within a capture");
      check(properties.major == 10 + device && properties.multiprocessors == 10 + device, "another device's properties");
    }
  }
  check(attribute_calls == 2 * 3, "each property is asked for once a device");
  const char kernel = 0, small = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    for (device = 0; device < 2; ++device) {
      check(prepare_kernel(&kernel, 200000) == cudaSuccess, "a kernel made ready within a capture");
      check(allowed == 200000, "its shared memory");
      check(prepare_kernel(&small, 3072) == cudaSuccess && allowed == 200000, "shared memory that every kernel has");
    }
  }
  check(loads == 4, "each kernel is loaded once a device");
  const char clustered = 0;
  cudaLaunchConfig_t config = {};
  config.dynamicSmemBytes = 210000;
  for (int repeat = 0; repeat < 3; ++repeat) {
    for (device = 0; device < 2; ++device) {
      int clusters = 0;
      check(max_active_clusters(&clustered, config, &clusters) == cudaSuccess, "clusters within a capture");
      check(clusters == 60 + device, "another device's clusters");
    }
  }
  check(occupancy_calls == 2, "a kernel's clusters are counted once a device");
  void* function = nullptr;
  check(driver_function("cuTensorMapEncodeTiled", &function) == cudaSuccess, "a function within a capture");
  check(function == reinterpret_cast<void*>(&encode), "the driver's function");
  check(driver_function("cuOfTheFuture", &function) == cudaSuccess && function == nullptr, "a function there is not");
  check(mode == cudaStreamCaptureModeGlobal, "the mode of captures is as it was");
}

void test_maps_are_encoded_once() {
  std::vector<char> data(64);
  const Sizes sizes = {64, 100, 4, 2};
  const Strides strides = {128, 12800, 51200};
  const Box box = {64, 128, 1, 1};
  CUtensorMap map, same, other;
  check(map_of(&map, data.data(), sizes, strides, box) == CUDA_SUCCESS && encodings == 1, "a first map");
  check(map_of(&same, data.data(), sizes, strides, box) == CUDA_SUCCESS && encodings == 1, "a map that is known");
  check(std::memcmp(&map, &same, sizeof(map)) == 0, "the map that was encoded");
  int expected = 1;
  const auto differs = [&](CUresult result, const char* what) {
    check(result == CUDA_SUCCESS && encodings == ++expected && std::memcmp(&map, &other, sizeof(map)) != 0, what);
  };
  differs(map_of(&other, data.data() + 16, sizes, strides, box), "another tensor");
  for (int i = 0; i < 4; ++i) {
    Sizes changed = sizes;
    changed[i] += 1;
    differs(map_of(&other, data.data(), changed, strides, box), "another size");
    Box smaller = box;
    smaller[i] = 7;
    differs(map_of(&other, data.data(), sizes, strides, smaller), "another box");
    if (i == 3) continue;
    Strides apart = strides;
    apart[i] += 16;
    differs(map_of(&other, data.data(), sizes, apart, box), "another stride");
  }
  differs(map_of(&other, data.data(), sizes, strides, box, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16), "another type");
  differs(map_of(&other, data.data(), sizes, strides, box, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_SWIZZLE_64B),
          "another swizzle");
  check(map_of(&other, nullptr, sizes, strides, box) == CUDA_ERROR_INVALID_VALUE, "a refusal");
  check(map_of(&other, nullptr, sizes, strides, box) == CUDA_ERROR_INVALID_VALUE, "a refusal is not kept");
  for (uint64_t rows = 1; rows < 3 * TensorMapCache::kPlaces; ++rows) {  // more than there are places
    CUtensorMap fresh;
    check(map_of(&other, data.data(), {64, rows, 4, 2}, strides, box) == CUDA_SUCCESS, "one map of many");
    const std::array<cuuint64_t, 4> these = {64, rows, 4, 2};
    encode(&fresh, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, data.data(), these.data(), strides.data(), box.data(), nullptr,
           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(std::memcmp(&fresh, &other, sizeof(fresh)) == 0, "a map of another description");
  }
  const int before = encodings;
  std::thread([&] { check(map_of(&same, data.data(), sizes, strides, box) == CUDA_SUCCESS, "another thread"); }).join();
  check(encodings == before + 1, "each thread has its own maps");
}

double nanoseconds_of_a_known_map() {
  std::vector<char> data(64);
  CUtensorMap map;
  constexpr int kCalls = 200000;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) map_of(&map, data.data(), {64, 100, 4, 2}, {128, 12800, 51200}, {64, 128, 1, 1});
  const std::chrono::duration<double, std::nano> passed = std::chrono::steady_clock::now() - begin;
  return passed.count() / kCalls;
}

}  // namespace fastattn

int main() {
  fastattn::test_first_calls_within_a_capture();
  fastattn::test_maps_are_encoded_once();
  std::printf("%.1f\n", fastattn::nanoseconds_of_a_known_map());
  return 0;
}
