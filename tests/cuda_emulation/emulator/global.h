// Global memory: what TMA writes there during a launch, and who may write after it.
//
// Writes are recorded by units of 16 bytes. Who writes a unit again has to know of the last write: by a chain of
// waits for bulk stores, barriers and semaphores. A thread knows of a write through the generic proxy, through the
// async proxy, or both. Waiting for its own bulk stores tells a thread through the async proxy, semaphores pass on what
// is known through the generic one, and fence_proxy_async_global makes either both. Additions are ordered like writes,
// for the sum depends on their order. Ordinary accesses of global memory are not seen, but for ld_global_16 and
// st_global_16.
#pragma once

#include "machine.h"

namespace emulator {

constexpr size_t kGlobalUnit = 16;

// The running thread's component among the writers of global memory.
uint32_t global_component() {
  Thread& thread = self();
  if (thread.global_component == Event::kNone) {
    thread.global_component = machine().global_writers_.size();
    machine().global_writers_.push_back(name(*thread.block) + text(", thread %d", thread.index));
  }
  return thread.global_component;
}

void check_global(const void* pointer, Proxy proxy, const char* what) {
  const auto found = machine().global_writes_.find(reinterpret_cast<uintptr_t>(pointer) / kGlobalUnit);
  if (found == machine().global_writes_.end()) return;
  const Event write = found->second;
  const Clock& clock = self().clock;
  if (clock.global(proxy, write.component) >= write.tick) return;
  const Proxy other = proxy == Proxy::kAsync ? Proxy::kGeneric : Proxy::kAsync;
  const bool only_fence = clock.global(other, write.component) >= write.tick;
  fail(std::string(what) + " global memory that " + machine().global_writers_[write.component] +
       (only_fence ? " wrote, without fence_proxy_async_global" : " wrote, with nothing ordering the two"));
}

// A write by TMA, part of the running thread's store group `group`.
void note_global_write(const void* pointer, size_t bytes, uint32_t group, bool add) {
  if (!machine().options_.check) return;
  const Event write = {global_component(), group};
  const uintptr_t first = reinterpret_cast<uintptr_t>(pointer) / kGlobalUnit;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(pointer) + bytes - 1) / kGlobalUnit;
  for (uintptr_t unit = first; unit <= last; ++unit) {
    auto [found, fresh] = machine().global_writes_.try_emplace(unit, write);
    if (fresh || found->second == write) continue;
    check_global(reinterpret_cast<const void*>(unit * kGlobalUnit), Proxy::kAsync, add ? "adds to" : "overwrites");
    found->second = write;
  }
}

uint4 load_16(const void* source) {
  check_alignment(source, 16, "ld_global_16's source");
  if (machine().global_writes_.count(reinterpret_cast<uintptr_t>(source) / kGlobalUnit)) {
    fail("ld_global_16 reads what TMA writes during the launch");
  }
  return *static_cast<const uint4*>(source);
}

void store_16(void* destination, uint4 value) {
  check_alignment(destination, 16, "st_global_16's destination");
  check_global(destination, Proxy::kGeneric, "st_global_16 overwrites");
  *static_cast<uint4*>(destination) = value;
}

void fence_proxy_async_global() { self().clock.join_proxies(); }

// What a relaxed access of a semaphore or counter passes on: what was known at the last device_fence before it, to
// those who call device_fence after it.
void device_fence() {
  Thread& thread = self();
  machine().preempt();
  thread.clock.join_generic(thread.seen_relaxed);
  thread.fenced.join_generic(thread.clock);
}

void pass_on_relaxed(const uint32_t* semaphore) {
  Clock& clock = machine().semaphores_[semaphore];
  self().seen_relaxed.join_generic(clock);
  clock.join_generic(self().fenced);
}

uint32_t relaxed_load(const uint32_t* semaphore) {
  machine().poll("relaxed_load");
  self().seen_relaxed.join_generic(machine().semaphores_[semaphore]);
  return *semaphore;
}

uint32_t semaphore_load(const uint32_t* semaphore) {
  machine().poll("semaphore_load_acquire");
  self().clock.join_generic(machine().semaphores_[semaphore]);
  return *semaphore;
}

void semaphore_add(uint32_t* semaphore, uint32_t value) {
  Thread& thread = self();
  for (const StoreGroup& group : thread.stores) {
    if (!group.writes.empty()) fail("releases a semaphore while its bulk stores may not have reached global memory");
  }
  const uint32_t own = thread.global_component;
  if (own != Event::kNone && thread.clock.global(Proxy::kGeneric, own) < thread.clock.global(Proxy::kAsync, own)) {
    fail("releases a semaphore without fence_proxy_async_global behind its bulk stores");
  }
  machine().preempt();
  machine().semaphores_[semaphore].join_generic(thread.clock);
  *semaphore += value;
  machine().made_progress();
}

uint32_t counter_fetch_add(uint32_t* counter, uint32_t value) {
  machine().preempt();
  pass_on_relaxed(counter);
  const uint32_t before = *counter;
  *counter += value;
  machine().made_progress();
  return before;
}

}  // namespace emulator
