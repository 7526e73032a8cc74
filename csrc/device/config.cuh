// Common definitions of all device files: function macros, 16-bit types, indices and shared memory.
//
// Kernels reach the GPU only through this folder. With FASTATTN_EMULATION the same sources compile with g++, and each
// wrapper calls the stand-in of tests/cuda_emulation instead of an instruction. Blocks are one-dimensional, and all
// shared memory is dynamic, so that the stand-in owns it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(FASTATTN_EMULATION)

#include "emulator.h"

#define FASTATTN_KERNEL
#define FASTATTN_DEVICE inline
#define FASTATTN_HOST_DEVICE inline
#define FASTATTN_LAUNCH_BOUNDS(threads, blocks_per_multiprocessor)
#define FASTATTN_GRID_CONSTANT
#define FASTATTN_CLUSTER_DIMS(x)

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FASTATTN_KERNEL __global__
#define FASTATTN_DEVICE __device__ __forceinline__
#define FASTATTN_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTATTN_LAUNCH_BOUNDS(threads, blocks_per_multiprocessor) __launch_bounds__(threads, blocks_per_multiprocessor)
#define FASTATTN_GRID_CONSTANT __grid_constant__
#define FASTATTN_CLUSTER_DIMS(x) __cluster_dims__(x, 1, 1)

#endif

namespace fastattn {

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;

#if defined(FASTATTN_EMULATION)
using half_t = emulator::Half;
using bfloat16_t = emulator::Bfloat16;
#else
using half_t = __half;
using bfloat16_t = __nv_bfloat16;
#endif

// a / b rounded up, a >= 0 and b > 0.
template <class A, class B>
FASTATTN_HOST_DEVICE constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

#if defined(FASTATTN_EMULATION) || defined(__CUDACC__)

// This thread's index in its block, 0 .. block_threads() - 1.
FASTATTN_DEVICE int thread_index() {
#if defined(FASTATTN_EMULATION)
  return emulator::thread_index();
#else
  return threadIdx.x;
#endif
}

// Threads in a block.
FASTATTN_DEVICE int block_threads() {
#if defined(FASTATTN_EMULATION)
  return emulator::block_threads();
#else
  return blockDim.x;
#endif
}

// This block's index in the grid, .x .y .z.
FASTATTN_DEVICE uint3 block_index() {
#if defined(FASTATTN_EMULATION)
  return emulator::block_index();
#else
  return blockIdx;
#endif
}

// Blocks in the grid, .x .y .z.
FASTATTN_DEVICE uint3 grid_blocks() {
#if defined(FASTATTN_EMULATION)
  return emulator::grid_blocks();
#else
  return make_uint3(gridDim.x, gridDim.y, gridDim.z);
#endif
}

// This thread's lane in its warp, 0 .. 31.
FASTATTN_DEVICE int lane_index() { return thread_index() % kWarpThreads; }

// The block's dynamic shared memory. Only 16-byte alignment is promised: tiles read through a 128-byte swizzle need
// align_shared<1024>.
FASTATTN_DEVICE unsigned char* dynamic_shared_memory() {
#if defined(FASTATTN_EMULATION)
  return emulator::dynamic_shared_memory();
#else
  extern __shared__ __align__(16) unsigned char fastattn_shared_memory[];
  return fastattn_shared_memory;
#endif
}

// The 32-bit shared-window address of a pointer to this block's shared memory.
FASTATTN_DEVICE uint32_t shared_address(const void* pointer) {
#if defined(FASTATTN_EMULATION)
  return emulator::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// The first address at or after `pointer` whose shared-window address is a multiple of Alignment.
template <uint32_t Alignment>
FASTATTN_DEVICE unsigned char* align_shared(unsigned char* pointer) {
  static_assert((Alignment & (Alignment - 1)) == 0, "Alignment is a power of two");
  return pointer + (-shared_address(pointer) & (Alignment - 1));
}

// Returns its argument, a pointer or a 64-bit number, through an empty asm statement, so that the compiler knows
// nothing of its origin. It then adds offsets to such a pointer instead of computing the addresses of rarely taken
// branches in advance, and does not keep in registers what a rare branch computes from such a number.
template <class T>
FASTATTN_DEVICE T opaque(T value) {
  static_assert(sizeof(T) == 8);
#if !defined(FASTATTN_EMULATION)
  asm("" : "+l"(value));
#endif
  return value;
}

// Ends the kernel with an error.
FASTATTN_DEVICE void trap() {
#if defined(FASTATTN_EMULATION)
  emulator::fail("trap");
#else
  __trap();
#endif
}

#endif  // device code

}  // namespace fastattn
