// TMA: boxes of tensors between global and shared memory, described by tensor maps the host encodes.
//
// Coordinates count elements, fastest dimension first, and name the box's first element. Elements outside the tensor
// are read as zeros, which count towards the barrier's bytes, and are not written. One thread issues a copy.
#pragma once

#include <cuda.h>

#include "config.cuh"
#include "mbarrier.cuh"

namespace fastattn {

// How long a line loaded by TMA should stay in the L2 cache.
enum class CachePolicy : uint64_t {
  kEvictNormal = 0x1000000000000000ull,
  kEvictFirst = 0x12f0000000000000ull,
  kEvictLast = 0x14f0000000000000ull,
};

// Fetches a tensor map, a grid-constant kernel parameter, ahead of its first use.
FASTATTN_DEVICE void tma_prefetch_map(const CUtensorMap* map) {
#if !defined(FASTATTN_EMULATION)
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// tma_load_Nd: starts copying the box at (c0, c1, ...) to shared memory; its bytes complete at the barrier, which must
// have been told to expect them. The destination is a multiple of 128, of 1024 under the 128-byte swizzle.

FASTATTN_DEVICE void tma_load_2d(void* destination, const CUtensorMap* map, Mbarrier* barrier, int c0, int c1,
                                 CachePolicy policy = CachePolicy::kEvictNormal) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_load(destination, map, barrier, {c0, c1});
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "l"(static_cast<uint64_t>(policy)), "r"(c0), "r"(c1)
      : "memory");
#endif
}

FASTATTN_DEVICE void tma_load_3d(void* destination, const CUtensorMap* map, Mbarrier* barrier, int c0, int c1, int c2,
                                 CachePolicy policy = CachePolicy::kEvictNormal) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_load(destination, map, barrier, {c0, c1, c2});
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "l"(static_cast<uint64_t>(policy)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}

FASTATTN_DEVICE void tma_load_4d(void* destination, const CUtensorMap* map, Mbarrier* barrier, int c0, int c1, int c2,
                                 int c3, CachePolicy policy = CachePolicy::kEvictNormal) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_load(destination, map, barrier, {c0, c1, c2, c3});
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "l"(static_cast<uint64_t>(policy)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

FASTATTN_DEVICE void tma_load_5d(void* destination, const CUtensorMap* map, Mbarrier* barrier, int c0, int c1, int c2,
                                 int c3, int c4, CachePolicy policy = CachePolicy::kEvictNormal) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_load(destination, map, barrier, {c0, c1, c2, c3, c4});
#else
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "l"(static_cast<uint64_t>(policy)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "r"(c4)
      : "memory");
#endif
}

// tma_load_4d to several blocks of the cluster, bit r of `blocks` standing for rank r: the box goes to the place of
// `destination` in the shared memory of each, and its bytes complete at the barrier in the place of `barrier` there,
// which that block has told to expect them, or tells before it arrives.
FASTATTN_DEVICE void tma_load_4d_multicast(void* destination, const CUtensorMap* map, Mbarrier* barrier,
                                           uint16_t blocks, int c0, int c1, int c2, int c3,
                                           CachePolicy policy = CachePolicy::kEvictNormal) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_load_multicast(destination, map, barrier, {c0, c1, c2, c3}, blocks);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%5, %6, %7, %8}], [%2], %3, %4;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "h"(blocks), "l"(static_cast<uint64_t>(policy)), "r"(c0), "r"(c1),
      "r"(c2), "r"(c3)
      : "memory");
#endif
}

// tma_store_Nd: starts copying a box from shared memory to (c0, c1, ...). Part of this thread's current bulk group.

FASTATTN_DEVICE void tma_store_2d(const CUtensorMap* map, const void* source, int c0, int c1) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_store(map, source, {c0, c1}, false);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group "
      "[%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(c0), "r"(c1)
      : "memory");
#endif
}

FASTATTN_DEVICE void tma_store_3d(const CUtensorMap* map, const void* source, int c0, int c1, int c2) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_store(map, source, {c0, c1, c2}, false);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group "
      "[%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}

FASTATTN_DEVICE void tma_store_4d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_store(map, source, {c0, c1, c2, c3}, false);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

FASTATTN_DEVICE void tma_store_5d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3, int c4) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_store(map, source, {c0, c1, c2, c3, c4}, false);
#else
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group "
      "[%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#endif
}

// tma_reduce_add_Nd: tma_store_Nd that adds to what is there. Each element is one atomic addition, in no fixed order.

FASTATTN_DEVICE void tma_reduce_add_2d(const CUtensorMap* map, const void* source, int c0, int c1) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_store(map, source, {c0, c1}, true);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group "
      "[%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(c0), "r"(c1)
      : "memory");
#endif
}

FASTATTN_DEVICE void tma_reduce_add_3d(const CUtensorMap* map, const void* source, int c0, int c1, int c2) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_store(map, source, {c0, c1, c2}, true);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group "
      "[%0, {%2, %3, %4}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}

FASTATTN_DEVICE void tma_reduce_add_4d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_store(map, source, {c0, c1, c2, c3}, true);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

FASTATTN_DEVICE void tma_reduce_add_5d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3,
                                       int c4) {
#if defined(FASTATTN_EMULATION)
  emulator::tma_store(map, source, {c0, c1, c2, c3, c4}, true);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.bulk_group "
      "[%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#endif
}

// Starts copying `bytes` contiguous bytes to shared memory, completing at the barrier. All three are multiples of 16.
FASTATTN_DEVICE void bulk_load(void* destination, const void* source, uint32_t bytes, Mbarrier* barrier) {
#if defined(FASTATTN_EMULATION)
  emulator::bulk_load(destination, source, bytes, barrier);
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// Starts copying `bytes` contiguous bytes from shared memory. Part of this thread's current bulk group.
FASTATTN_DEVICE void bulk_store(void* destination, const void* source, uint32_t bytes) {
#if defined(FASTATTN_EMULATION)
  emulator::bulk_store(destination, source, bytes, false);
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
#endif
}

// bulk_store of floats that adds to what is there.
FASTATTN_DEVICE void bulk_reduce_add(float* destination, const float* source, uint32_t bytes) {
#if defined(FASTATTN_EMULATION)
  emulator::bulk_store(destination, source, bytes, true);
#else
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(destination),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
#endif
}

// Closes the group of this thread's stores since the last commit.
FASTATTN_DEVICE void bulk_commit() {
#if defined(FASTATTN_EMULATION)
  emulator::bulk_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last Pending of this thread's groups have read their shared memory, which may then be reused.
template <int Pending>
FASTATTN_DEVICE void bulk_wait_read() {
#if defined(FASTATTN_EMULATION)
  emulator::bulk_wait(Pending, true);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
#endif
}

// Waits until all but the last Pending of this thread's groups are written to global memory.
template <int Pending>
FASTATTN_DEVICE void bulk_wait() {
#if defined(FASTATTN_EMULATION)
  emulator::bulk_wait(Pending, false);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace fastattn
