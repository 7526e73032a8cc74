// Barriers in shared memory: arrivals, expected bytes, phases.
#pragma once

#include "barriers.h"

namespace emulator {

constexpr uint64_t kMbarrierMark = 0x6d626172;  // upper half of the word in shared memory; the lower is the index

MbarrierState& mbarrier_state(Block& block, const void* barrier) {
  check_alignment(barrier, 8, "an mbarrier");
  uint64_t word;
  std::memcpy(&word, barrier, sizeof(word));
  const uint64_t index = word & 0xffffffff;
  if (word >> 32 != kMbarrierMark || index >= block.mbarriers.size()) fail("uses an mbarrier that is not initialised");
  MbarrierState& state = *block.mbarriers[index];
  if (!state.initialised.known_to(self().clock)) {
    fail(text("uses mbarrier %u with nothing ordering that after its initialisation", state.index));
  }
  return state;
}

void mbarrier_init(void* barrier, uint32_t arrivals) {
  Thread& thread = self();
  Block& block = *thread.block;
  check_alignment(barrier, 8, "an mbarrier");
  checked_offset(block, barrier, 8);
  if (arrivals < 1 || arrivals >= 1 << 20) fail(text("an mbarrier of %u arrivals", arrivals));
  auto state = std::make_unique<MbarrierState>();
  state->index = block.mbarriers.size();
  state->expected = state->pending = arrivals;
  state->component =
      block.cluster->add_component(text("a copy completing at mbarrier %u of ", state->index) + name(block));
  state->initialised = thread.now();
  const uint64_t word = kMbarrierMark << 32 | state->index;
  std::memcpy(barrier, &word, sizeof(word));
  block.mbarriers.push_back(std::move(state));
  tick(thread);
}

void complete_phase_if_done(const Block& block, MbarrierState& state) {
  if (state.pending > 0) return;
  if (state.bytes < 0) {
    throw Failure(name(block) + text(": mbarrier %u was told to expect fewer bytes than were copied", state.index));
  }
  if (state.bytes > 0) return;
  ++state.phase;
  state.pending = state.expected;
  state.completed = state.arriving;
  state.completed.set(state.component, state.phase);
  state.arriving.clear();
  state.remote_completed = state.remote_arriving;
  state.remote_arriving = false;
  machine().wake(state.waiting);
}

void expect_bytes(MbarrierState& state, uint32_t bytes) {
  constexpr int64_t kLimit = (1 << 20) - 1;
  state.bytes += bytes;
  if (bytes > kLimit || state.bytes > kLimit) {
    fail(text("mbarrier %u is to expect more than %lld bytes in a phase", state.index, static_cast<long long>(kLimit)));
  }
}

void arrive(const Block& block, MbarrierState& state, uint32_t bytes) {
  if (state.pending == 0) fail(text("arrives at mbarrier %u once more than it expects in a phase", state.index));
  expect_bytes(state, bytes);
  state.remote_arriving |= self().block != &block;
  release(self(), state.arriving);
  --state.pending;
  complete_phase_if_done(block, state);
}

void mbarrier_arrive(void* barrier, uint32_t bytes) {
  machine().preempt();
  Block& block = *self().block;
  arrive(block, mbarrier_state(block, barrier), bytes);
}

// TMA and other blocks see an initialisation only after its fence.
void check_fenced(const MbarrierState& state, const char* what) {
  if (!state.fenced) {
    fail(text("%s at mbarrier %u without fence_barrier_init behind its initialisation", what, state.index));
  }
}

void mbarrier_expect_tx(void* barrier, uint32_t bytes) { expect_bytes(mbarrier_state(*self().block, barrier), bytes); }

void mbarrier_arrive_cluster(void* barrier, uint32_t rank) {
  machine().preempt();
  const void* remote = mapped(barrier, rank);
  Block& block = block_holding(remote);
  MbarrierState& state = mbarrier_state(block, remote);
  check_fenced(state, "arrives from another block");
  arrive(block, state, 0);
}

bool phase_completed(const MbarrierState& state, uint32_t parity) { return (state.phase & 1) != parity; }

void check_parity(uint32_t parity) {
  if (parity > 1) fail(text("waits for parity %u, which is neither 0 nor 1", parity));
}

// Acquires what the phase makes visible. A wait at block scope does not synchronise with other blocks.
void acquire(const MbarrierState& state, bool cluster_scope) {
  if (state.remote_completed && !cluster_scope) {
    fail(text("waits for arrivals of other blocks at mbarrier %u without mbarrier_wait_cluster", state.index));
  }
  self().clock.join(state.completed);
}

void mbarrier_wait(void* barrier, uint32_t parity, bool cluster_scope) {
  check_parity(parity);
  MbarrierState& state = mbarrier_state(*self().block, barrier);
  while (!phase_completed(state, parity))
    machine().sleep(state.waiting, parity ? "mbarrier_wait(1)" : "mbarrier_wait(0)", &state);
  acquire(state, cluster_scope);
}

bool mbarrier_try_wait(void* barrier, uint32_t parity, bool cluster_scope) {
  check_parity(parity);
  MbarrierState& state = mbarrier_state(*self().block, barrier);
  machine().poll("mbarrier_try_wait");
  if (!phase_completed(state, parity)) return false;
  acquire(state, cluster_scope);
  return true;
}

// `bytes` of a copy issued in phase `phase` have arrived.
void complete_bytes(const Block& block, MbarrierState& state, uint32_t phase, uint32_t bytes) {
  const std::string where = name(block) + text(": mbarrier %u", state.index);
  if (state.phase != phase)
    throw Failure(where + text(" completed phase %u without a copy that was issued in it", phase));
  state.bytes -= bytes;  // below 0 until the block says what it expects, where another block's copy came first
  complete_phase_if_done(block, state);
}

}  // namespace emulator
