// An emulation of the CUDA execution model, which csrc/device calls when the kernels are compiled with g++.
//
// Threads are fibers that run in an order drawn from a seed. Shared memory begins poisoned and at an address that is a
// multiple of 16 and no more. Copies and multiplies run in the background and land when the options say. What a GPU
// would punish with a wrong answer now and then is a Failure here: divergence in a collective, a race on shared memory,
// a missing fence, registers touched in flight, a deadlock. README.md says how a kernel test is written.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "emulator/types.h"

namespace emulator {

// When TMA and wgmma complete: at once, when a thread waits for it, or at any time between.
enum class Landing { kEager, kLazy, kRandom };

struct Options {
  uint64_t seed = 0;
  Landing landing = Landing::kRandom;
  int resident = 1;   // clusters (blocks, where there are no clusters) that are alive at the same time
  bool check = true;  // watch for races
  // The thread (`starved`) or warp (`starved` - 1024) of every block that runs only when no other can; -1 for none.
  int starved = -1;
};

struct Launch {
  uint3 grid = {1, 1, 1};
  int threads = kWarp;
  size_t shared_bytes = 0;
  size_t max_shared_bytes = 0;  // cudaFuncAttributeMaxDynamicSharedMemorySize, without which a launch has 48 KB
  int cluster = 1;              // blocks, along x
  int min_blocks = 1;           // per multiprocessor, as in the kernel's launch bounds: they share its registers
  size_t parameter_bytes = 0;   // launch() counts them
};

// The options of the last emulator_configure.
extern Options options;

// Runs kernel(context) in every thread of the grid.
void run(const Options& options, const Launch& launch, void (*kernel)(const void*), const void* context);

// Runs the kernel over the grid. Throws Failure.
template <class... Parameters, class... Arguments>
void launch(const Options& options, const Launch& launch, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  const auto body = [&] { kernel(arguments...); };
  Launch counted = launch;
  counted.parameter_bytes = (0 + ... + sizeof(Parameters));
  run(options, counted, [](const void* context) { (*static_cast<decltype(&body)>(context))(); }, &body);
}

// Ends the kernel, if one runs, by throwing a Failure.
[[noreturn]] void fail(const std::string& what);

// config.cuh
int thread_index();
int block_threads();
uint3 block_index();
uint3 grid_blocks();
unsigned char* dynamic_shared_memory();
uint32_t shared_address(const void* pointer);

// warp.cuh
void shuffle_bytes(void* value, size_t bytes, int source, uint32_t mask, const char* kind);
template <class T>
T shuffle(T value, int source, uint32_t mask, const char* kind) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  shuffle_bytes(&value, sizeof(T), source, mask, kind);
  return value;
}
uint32_t ballot(bool predicate, uint32_t mask);
bool elect_one();

// sync.cuh
void block_sync();
void warp_sync(uint32_t mask);
void named_barrier(int id, int threads, bool wait);
void fence_proxy_async();
void fence_proxy_async_global();
void set_max_registers(int count, bool increase);
void device_fence();
uint32_t semaphore_load(const uint32_t* semaphore);
uint32_t relaxed_load(const uint32_t* semaphore);  // has no wrapper: semaphore_load without its ordering
void semaphore_add(uint32_t* semaphore, uint32_t value);
uint32_t counter_fetch_add(uint32_t* counter, uint32_t value);

// mbarrier.cuh
void mbarrier_init(void* barrier, uint32_t arrivals);
void fence_barrier_init();
void mbarrier_arrive(void* barrier, uint32_t bytes);
void mbarrier_expect_tx(void* barrier, uint32_t bytes);
void mbarrier_arrive_cluster(void* barrier, uint32_t rank);
bool mbarrier_try_wait(void* barrier, uint32_t parity, bool cluster_scope);
void mbarrier_wait(void* barrier, uint32_t parity, bool cluster_scope);

// cluster.cuh
uint32_t cluster_rank();
uint32_t cluster_blocks();
void cluster_arrive();
void cluster_wait();
const void* mapped(const void* pointer, uint32_t rank);
template <class T>
T* map_shared(T* pointer, uint32_t rank) {
  return static_cast<T*>(const_cast<void*>(mapped(pointer, rank)));
}

// copy.cuh
void track_shared_read(const void* pointer, size_t bytes);
void track_shared_write(const void* pointer, size_t bytes);
uint4 load_16(const void* source);
void store_16(void* destination, uint4 value);
void cp_async_16(void* destination, const void* source, int bytes);
void cp_async_commit();
void cp_async_wait(size_t pending);
void stmatrix(void* row, const uint32_t* matrices, int count, bool transposed);

// tma.cuh; tensor maps are those of encode_tiled in emulator/tensor_map.h
void tma_load(void* destination, const void* tensor_map, void* barrier, std::initializer_list<int> given);
void tma_load_multicast(void* destination, const void* tensor_map, void* barrier, std::initializer_list<int> given,
                        uint32_t blocks);
void tma_store(const void* tensor_map, const void* source, std::initializer_list<int> given, bool add);
void bulk_load(void* destination, const void* source, uint32_t bytes, void* barrier);
void bulk_store(void* destination, const void* source, uint32_t bytes, bool add);
void bulk_commit();
void bulk_wait(uint32_t pending, bool read);

// wgmma.cuh
void wgmma_fence();
void wgmma(float (*to_float)(uint16_t), float* acc, int columns, uint64_t a, const uint32_t* a_registers, uint64_t b,
           bool accumulate, bool a_transposed, bool b_transposed);
template <class T>
void wgmma(float* acc, int columns, uint64_t a, const uint32_t* a_registers, uint64_t b, bool accumulate,
           bool a_transposed, bool b_transposed) {
  const auto to_float = [](uint16_t bits) { return T{bits}.to_float(); };
  wgmma(to_float, acc, columns, a, a_registers, b, accumulate, a_transposed, b_transposed);
}
void wgmma_commit();
void wgmma_wait(size_t pending);

}  // namespace emulator
