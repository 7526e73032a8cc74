// Collectives of a warp: all lanes of the mask must reach the same one.
#pragma once

#include <string_view>

#include "shared.h"

namespace emulator {

// Waits for all lanes of `mask` to call this with the same kind, then the last runs complete(slots), slots being the
// Slot pointers of all 32 lanes, null outside the mask.
template <class Slot, class Complete>
void warp_collective(const char* kind, uint32_t mask, Slot& slot, Complete complete) {
  Thread& thread = self();
  const auto& threads = thread.block->threads;
  const int first = thread.index / kWarp * kWarp;
  if (!(mask >> (thread.index - first) & 1)) fail(text("calls %s with a mask that leaves it out", kind));
  thread.collective = kind;
  thread.collective_mask = mask;
  thread.collective_slot = &slot;
  bool all = true;
  Slot* slots[kWarp] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= static_cast<int>(threads.size()))
      fail(text("%s names lane %d, which the warp lacks", kind, lane));
    const Thread& other = *threads[first + lane];
    if (other.done) fail(text("calls %s with lane %d, which has ended", kind, lane));
    if (!other.collective) {
      all = false;
    } else if ((other.collective != kind && std::string_view(other.collective) != kind) ||
               other.collective_mask != mask) {
      fail(text("diverges: calls %s (mask %08x) while lane %d is in %s (mask %08x)", kind, mask, lane, other.collective,
                other.collective_mask));
    }
    slots[lane] = static_cast<Slot*>(other.collective_slot);
  }
  if (!all) {
    machine().sleep(kind);  // the last lane to arrive wakes the others
    return;
  }
  complete(slots);
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!slots[lane]) continue;
    Thread* other = threads[first + lane].get();
    other->collective = nullptr;
    if (other != &thread) machine().wake(*other);
  }
}

void shuffle_bytes(void* value, size_t bytes, int source, uint32_t mask, const char* kind) {
  struct Slot {
    void* value;
    unsigned char sent[16];
    int source;
  } slot{value, {}, source};
  std::memcpy(slot.sent, value, bytes);
  warp_collective(kind, mask, slot, [&](Slot** slots) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!slots[lane]) continue;
      const Slot* from = slots[slots[lane]->source];
      if (!from) fail(text("%s: lane %d reads lane %d, which takes no part", kind, lane, slots[lane]->source));
      std::memcpy(slots[lane]->value, from->sent, bytes);
    }
  });
}

uint32_t ballot(bool predicate, uint32_t mask) {
  struct Slot {
    bool predicate;
    uint32_t result;
  } slot{predicate, 0};
  warp_collective("ballot", mask, slot, [](Slot** slots) {
    uint32_t result = 0;
    for (int lane = 0; lane < kWarp; ++lane)
      result |= static_cast<uint32_t>(slots[lane] && slots[lane]->predicate) << lane;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (slots[lane]) slots[lane]->result = result;
    }
  });
  return slot.result;
}

bool elect_one() {
  struct Slot {
  } slot;
  warp_collective("elect_one", 0xffffffff, slot, [](Slot**) {});
  const Thread& thread = self();
  return thread.index % kWarp == static_cast<int>(thread.block->elected[thread.index / kWarp]);
}

// Each lane acquires what the others did before.
void warp_sync(uint32_t mask) {
  Clock* slot = &self().clock;
  const auto& threads = self().block->threads;
  const int first = self().index / kWarp * kWarp;
  warp_collective("warp_sync", mask, slot, [&](Clock*** slots) {
    Clock all;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (slots[lane]) all.join(**slots[lane]);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!slots[lane]) continue;
      Thread& other = *threads[first + lane];
      other.clock = all;
      other.clock.raise(other.component, other.clock[other.component] + 1);
    }
  });
}

}  // namespace emulator
