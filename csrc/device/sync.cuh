// Barriers and fences of one block, register reallocation between warpgroups, and semaphores in global memory.
#pragma once

#include "config.cuh"

namespace fastattn {

// Waits for all threads of the block; orders their ordinary memory accesses.
FASTATTN_DEVICE void block_sync() {
#if defined(FASTATTN_EMULATION)
  emulator::block_sync();
#else
  __syncthreads();
#endif
}

// Waits for the lanes in `mask`; orders their ordinary memory accesses.
FASTATTN_DEVICE void warp_sync(uint32_t mask = 0xffffffffu) {
#if defined(FASTATTN_EMULATION)
  emulator::warp_sync(mask);
#else
  __syncwarp(mask);
#endif
}

// Waits at named barrier `id` (1 .. 15; 0 is block_sync's) until `threads` threads have synced or arrived there.
// `threads` is a multiple of 32. Whole warps only.
FASTATTN_DEVICE void named_barrier_sync(int id, int threads) {
#if defined(FASTATTN_EMULATION)
  emulator::named_barrier(id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Arrives at named barrier `id` without waiting. Whole warps only.
FASTATTN_DEVICE void named_barrier_arrive(int id, int threads) {
#if defined(FASTATTN_EMULATION)
  emulator::named_barrier(id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Makes this thread's earlier ordinary accesses to shared memory visible to TMA and the tensor cores.
// Each writing thread calls it before the barrier behind which they read.
FASTATTN_DEVICE void fence_proxy_async() {
#if defined(FASTATTN_EMULATION)
  emulator::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The same for global memory.
FASTATTN_DEVICE void fence_proxy_async_global() {
#if defined(FASTATTN_EMULATION)
  emulator::fence_proxy_async_global();
#else
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// Raises this warpgroup's registers per thread to Count, waiting until others have released enough. All warps of the
// warpgroup call it. Count is a multiple of 8 in 24 .. 256.
template <int Count>
FASTATTN_DEVICE void increase_registers() {
  static_assert(24 <= Count && Count <= 256 && Count % 8 == 0);
#if defined(FASTATTN_EMULATION)
  emulator::set_max_registers(Count, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

// Lowers this warpgroup's registers per thread to Count. All of the warpgroup's warps call it.
template <int Count>
FASTATTN_DEVICE void decrease_registers() {
  static_assert(24 <= Count && Count <= 256 && Count % 8 == 0);
#if defined(FASTATTN_EMULATION)
  emulator::set_max_registers(Count, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

// Orders this thread's earlier memory accesses before its later ones, for all threads of the device.
FASTATTN_DEVICE void device_fence() {
#if defined(FASTATTN_EMULATION)
  emulator::device_fence();
#else
  __threadfence();
#endif
}

// Reads a semaphore in global memory; what was written before the matching release is visible afterwards.
FASTATTN_DEVICE uint32_t semaphore_load_acquire(const uint32_t* semaphore) {
#if defined(FASTATTN_EMULATION)
  return emulator::semaphore_load(semaphore);
#else
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(semaphore) : "memory");
  return value;
#endif
}

// Spins until the semaphore holds `value`. One thread calls it; a barrier then releases the other threads of its block.
FASTATTN_DEVICE void semaphore_wait(const uint32_t* semaphore, uint32_t value) {
  while (semaphore_load_acquire(semaphore) != value) {
  }
}

// Adds to a semaphore in global memory after everything this thread has done or seen (its block's, behind a barrier).
FASTATTN_DEVICE void semaphore_add_release(uint32_t* semaphore, uint32_t value) {
#if defined(FASTATTN_EMULATION)
  emulator::semaphore_add(semaphore, value);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(semaphore), "r"(value) : "memory");
#endif
}

// Adds to a counter in global memory and returns what it held: the next tile of a dynamic schedule. Orders nothing.
FASTATTN_DEVICE uint32_t counter_fetch_add(uint32_t* counter, uint32_t value) {
#if defined(FASTATTN_EMULATION)
  return emulator::counter_fetch_add(counter, value);
#else
  return atomicAdd(counter, value);
#endif
}

}  // namespace fastattn
