// mbarriers: shared-memory barriers that count arrivals and the bytes of asynchronous copies, phase by phase.
//
// A phase completes when all expected arrivals have come and no expected byte is outstanding; the next then begins with
// the same arrival count. Waiting names the parity of the phase: the first phase has 0, and a wait for parity 1 on a
// fresh barrier passes at once, as for the phase before the first.
#pragma once

#include "config.cuh"

namespace fastattn {

struct alignas(8) Mbarrier {
  uint64_t state;
};

// Initialises the barrier with `arrivals` arrivals per phase. One thread calls it, then fence_barrier_init, then
// block_sync.
FASTATTN_DEVICE void mbarrier_init(Mbarrier* barrier, uint32_t arrivals) {
#if defined(FASTATTN_EMULATION)
  emulator::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Makes this thread's mbarrier_init calls visible to TMA and to the other blocks of the cluster.
FASTATTN_DEVICE void fence_barrier_init() {
#if defined(FASTATTN_EMULATION)
  emulator::fence_barrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives once, with release semantics: this thread's earlier accesses are visible to threads that wait for the phase.
FASTATTN_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
#if defined(FASTATTN_EMULATION)
  emulator::mbarrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Adds `bytes` to the bytes that the phase expects, then arrives. Called before the copies of these bytes are issued.
FASTATTN_DEVICE void mbarrier_arrive_expect_tx(Mbarrier* barrier, uint32_t bytes) {
#if defined(FASTATTN_EMULATION)
  emulator::mbarrier_arrive(barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Adds `bytes` to the bytes that the phase expects, without arriving.
FASTATTN_DEVICE void mbarrier_expect_tx(Mbarrier* barrier, uint32_t bytes) {
#if defined(FASTATTN_EMULATION)
  emulator::mbarrier_expect_tx(barrier, bytes);
#else
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Arrives once at the barrier at the same shared-memory offset in block `rank` of the cluster.
FASTATTN_DEVICE void mbarrier_arrive_cluster(Mbarrier* barrier, uint32_t rank) {
#if defined(FASTATTN_EMULATION)
  emulator::mbarrier_arrive_cluster(barrier, rank);
#else
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// The same for a consumer that releases a stage after reading it; its earlier writes are visible only within its own
// block. Release semantics at cluster scope would cost a device-wide fence before every arrival.
FASTATTN_DEVICE void mbarrier_arrive_cluster_read(Mbarrier* barrier, uint32_t rank) {
#if defined(FASTATTN_EMULATION)
  emulator::mbarrier_arrive_cluster(barrier, rank);
#else
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// Whether the phase of this parity has completed; may suspend the thread for a bounded time before returning false.
FASTATTN_DEVICE bool mbarrier_try_wait(Mbarrier* barrier, uint32_t parity) {
#if defined(FASTATTN_EMULATION)
  return emulator::mbarrier_try_wait(barrier, parity, false);
#else
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
#endif
}

// Waits until the phase of this parity has completed; its copies and what preceded its arrivals are then visible. For
// arrivals of this block only: those of other blocks of the cluster need mbarrier_wait_cluster.
FASTATTN_DEVICE void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
#if defined(FASTATTN_EMULATION)
  emulator::mbarrier_wait(barrier, parity, false);
#else
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

// mbarrier_try_wait with acquire semantics at cluster scope, for barriers at which other blocks of the cluster arrive.
FASTATTN_DEVICE bool mbarrier_try_wait_cluster(Mbarrier* barrier, uint32_t parity) {
#if defined(FASTATTN_EMULATION)
  return emulator::mbarrier_try_wait(barrier, parity, true);
#else
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(complete)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return complete != 0;
#endif
}

// mbarrier_wait with acquire semantics at cluster scope.
FASTATTN_DEVICE void mbarrier_wait_cluster(Mbarrier* barrier, uint32_t parity) {
#if defined(FASTATTN_EMULATION)
  emulator::mbarrier_wait(barrier, parity, true);
#else
  while (!mbarrier_try_wait_cluster(barrier, parity)) {
  }
#endif
}

}  // namespace fastattn
