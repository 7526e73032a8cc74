// Thread block clusters: block rank, cluster barrier and distributed shared memory.
#pragma once

#include "config.cuh"

namespace fastattn {

// This block's rank in its cluster, 0 .. cluster_blocks() - 1.
FASTATTN_DEVICE uint32_t cluster_rank() {
#if defined(FASTATTN_EMULATION)
  return emulator::cluster_rank();
#else
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

// Blocks in the cluster; 1 where the kernel was launched without one.
FASTATTN_DEVICE uint32_t cluster_blocks() {
#if defined(FASTATTN_EMULATION)
  return emulator::cluster_blocks();
#else
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#endif
}

// Arrives at the cluster barrier without waiting. Every thread arrives once, then waits.
FASTATTN_DEVICE void cluster_arrive() {
#if defined(FASTATTN_EMULATION)
  emulator::cluster_arrive();
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// Waits for the arrivals of all threads of the cluster.
FASTATTN_DEVICE void cluster_wait() {
#if defined(FASTATTN_EMULATION)
  emulator::cluster_wait();
#else
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Waits for all threads of the cluster. A block may not end before the others have stopped reading its shared memory.
FASTATTN_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The same place in the shared memory of block `rank`, for ld_shared and st_shared.
template <class T>
FASTATTN_DEVICE T* map_shared(T* pointer, uint32_t rank) {
#if defined(FASTATTN_EMULATION)
  return emulator::map_shared(pointer, rank);
#else
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#endif
}

}  // namespace fastattn
