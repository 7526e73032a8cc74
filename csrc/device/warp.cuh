// Exchanges within a warp. Every wrapper is a collective of the lanes in `mask`, which all must reach it.
#pragma once

#include "config.cuh"

namespace fastattn {

constexpr uint32_t kAllLanes = 0xffffffffu;

// The value of lane (lane ^ lane_mask). T is any 4- or 8-byte type that __shfl_xor_sync takes.
template <class T>
FASTATTN_DEVICE T shuffle_xor(T value, int lane_mask, uint32_t mask = kAllLanes) {
#if defined(FASTATTN_EMULATION)
  return emulator::shuffle(value, (emulator::thread_index() % kWarpThreads) ^ lane_mask, mask, "shuffle_xor");
#else
  return __shfl_xor_sync(mask, value, lane_mask);
#endif
}

// The value of lane (lane + delta), this lane's own where that is past the last lane.
template <class T>
FASTATTN_DEVICE T shuffle_down(T value, int delta, uint32_t mask = kAllLanes) {
#if defined(FASTATTN_EMULATION)
  const int lane = emulator::thread_index() % kWarpThreads;
  return emulator::shuffle(value, lane + delta < kWarpThreads ? lane + delta : lane, mask, "shuffle_down");
#else
  return __shfl_down_sync(mask, value, delta);
#endif
}

// The value of lane (lane - delta), this lane's own where that is before the first lane.
template <class T>
FASTATTN_DEVICE T shuffle_up(T value, int delta, uint32_t mask = kAllLanes) {
#if defined(FASTATTN_EMULATION)
  const int lane = emulator::thread_index() % kWarpThreads;
  return emulator::shuffle(value, lane >= delta ? lane - delta : lane, mask, "shuffle_up");
#else
  return __shfl_up_sync(mask, value, delta);
#endif
}

// The value of lane `source`.
template <class T>
FASTATTN_DEVICE T shuffle(T value, int source, uint32_t mask = kAllLanes) {
#if defined(FASTATTN_EMULATION)
  return emulator::shuffle(value, source % kWarpThreads, mask, "shuffle");
#else
  return __shfl_sync(mask, value, source);
#endif
}

// One bit per lane of `mask`: whether its predicate holds.
FASTATTN_DEVICE uint32_t ballot(bool predicate, uint32_t mask = kAllLanes) {
#if defined(FASTATTN_EMULATION)
  return emulator::ballot(predicate, mask);
#else
  return __ballot_sync(mask, predicate);
#endif
}

FASTATTN_DEVICE bool any_lane(bool predicate, uint32_t mask = kAllLanes) { return ballot(predicate, mask) != 0; }

FASTATTN_DEVICE bool all_lanes(bool predicate, uint32_t mask = kAllLanes) { return ballot(predicate, mask) == mask; }

// This warp's index in its block, known to the compiler to be the same in all its lanes.
FASTATTN_DEVICE int warp_index() { return shuffle(thread_index() / kWarpThreads, 0); }

// This warpgroup's index in its block, known to the compiler to be the same in all its lanes.
FASTATTN_DEVICE int warpgroup_index() { return shuffle(thread_index() / kWarpgroupThreads, 0); }

// True in exactly one lane of a converged warp. The same lane each time.
FASTATTN_DEVICE bool elect_one() {
#if defined(FASTATTN_EMULATION)
  return emulator::elect_one();
#else
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
#endif
}

}  // namespace fastattn
