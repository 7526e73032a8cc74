// Barriers of a block and a cluster, fences and registers.
#pragma once

#include "warp.h"

namespace emulator {

void tick(Thread& thread) { thread.clock.raise(thread.component, thread.clock[thread.component] + 1); }

// Release: joins the thread's clock into `clock`; its later accesses are not included.
void release(Thread& thread, Clock& clock) {
  clock.join(thread.clock);
  tick(thread);
}

void join_barrier(Barrier& barrier, int threads, bool wait, const char* place) {
  Thread& thread = self();
  machine().preempt();
  if (barrier.arrived > 0 && barrier.expected != threads) {
    fail(text("%s for %d threads, others came for %d", place, threads, barrier.expected));
  }
  barrier.expected = threads;
  const uint32_t bit = 1u << (&barrier - thread.block->barriers);
  if (thread.arrived_barriers & bit) fail(text("%s: the thread arrives twice before the others have come", place));
  thread.arrived_barriers |= bit;
  barrier.arrivals.push_back(&thread);
  barrier.clock.join(thread.clock);
  if (!wait) tick(thread);
  if (++barrier.arrived < threads) {
    if (wait) machine().sleep(barrier.waiting, place);
    return;
  }
  if (wait) barrier.waiting.push_back(&thread);
  for (Thread* waiter : barrier.waiting) {
    waiter->clock.join(barrier.clock);
    tick(*waiter);
  }
  if (wait) barrier.waiting.pop_back();
  barrier.arrived = 0;
  for (Thread* arrival : barrier.arrivals) arrival->arrived_barriers &= ~bit;
  barrier.arrivals.clear();
  barrier.clock.clear();
  machine().wake(barrier.waiting);
}

void block_sync() { join_barrier(self().block->barriers[0], block_threads(), true, "block_sync"); }

void named_barrier(int id, int threads, bool wait) {
  static const char* const kPlaces[16] = {
      "named barrier 0",  "named barrier 1",  "named barrier 2",  "named barrier 3",
      "named barrier 4",  "named barrier 5",  "named barrier 6",  "named barrier 7",
      "named barrier 8",  "named barrier 9",  "named barrier 10", "named barrier 11",
      "named barrier 12", "named barrier 13", "named barrier 14", "named barrier 15"};
  if (id < 1 || id > 15) fail(text("named barrier %d does not exist", id));
  if (threads % kWarp != 0 || threads < kWarp) fail(text("%d threads are not whole warps", threads));
  join_barrier(self().block->barriers[id], threads, wait, kPlaces[id]);
}

void fence_barrier_init() {
  Thread& thread = self();
  for (auto& barrier : thread.block->mbarriers) {
    if (barrier->initialised.component == thread.component) barrier->fenced = true;
  }
}

void fence_proxy_async() {
  Thread& thread = self();
  const uint32_t count = thread.block->cluster->thread_count;
  thread.clock.copy_range(count, 0, count);
  tick(thread);
  fence_barrier_init();
}

void set_max_registers(int count, bool increase) {
  Thread& thread = self();
  Block& block = *thread.block;
  const char* const kind = increase ? "increase_registers" : "decrease_registers";
  if (count < 24 || count > 256 || count % 8 != 0) {
    fail(text("%s<%d>: not a multiple of 8 from 24 to 256", kind, count));
  }
  if (increase ? count < thread.registers : count > thread.registers) {
    fail(text("%s<%d> with %d registers", kind, count, thread.registers));
  }
  struct Slot {
  } slot;
  warp_collective(kind, 0xffffffff, slot, [](Slot**) {});
  const int change = count - thread.registers;
  while (block.free_registers < change) machine().sleep(block.waiting_for_registers, kind);
  block.free_registers -= change;
  thread.registers = count;
  machine().wake(block.waiting_for_registers);
}

uint32_t cluster_rank() { return self().block->rank; }
uint32_t cluster_blocks() { return machine().launch_.cluster; }

void cluster_arrive() {
  Thread& thread = self();
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrivals != thread.cluster_waits) fail("arrives at the cluster's barrier twice before it waits");
  ++thread.cluster_arrivals;
  machine().preempt();
  release(thread, cluster.arriving);
  if (++cluster.arrived < static_cast<int>(cluster.thread_count)) return;
  cluster.arrived = 0;
  ++cluster.generation;
  cluster.released = cluster.arriving;
  cluster.arriving.clear();
  machine().wake(cluster.waiting);
}

void cluster_wait() {
  Thread& thread = self();
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrivals == thread.cluster_waits) fail("waits at the cluster's barrier without having arrived");
  const uint32_t wanted = ++thread.cluster_waits;
  while (cluster.generation < wanted) machine().sleep(cluster.waiting, "cluster_wait");
  thread.clock.join(cluster.released);
}

const void* mapped(const void* pointer, uint32_t rank) {
  const Block& mine = *self().block;
  if (rank >= mine.cluster->blocks.size()) {
    fail(text("map_shared to block %u of %zu", rank, mine.cluster->blocks.size()));
  }
  if (!mine.holds(pointer)) fail("map_shared of a pointer that is not in the block's shared memory");
  return mine.cluster->blocks[rank]->memory + (static_cast<const unsigned char*>(pointer) - mine.memory);
}

}  // namespace emulator
