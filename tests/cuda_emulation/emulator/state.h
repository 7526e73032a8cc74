// What the clusters, blocks and threads of a launch hold while they run.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../emulator.h"
#include "clock.h"
#include "fiber.h"

namespace emulator {

// Work of TMA that has been issued. `land` runs once.
struct Operation {
  std::function<void()> land;
  bool landed = false;
};
using OperationPointer = std::shared_ptr<Operation>;

struct Thread;
struct Cluster;

// Threads that wait for an event.
using WaitQueue = std::vector<Thread*>;

struct Barrier {  // block_sync and the named barriers
  int expected = 0;
  int arrived = 0;
  Clock clock;
  std::vector<Thread*> arrivals;
  WaitQueue waiting;
};

struct MbarrierState {
  uint32_t index = 0;  // in the block
  uint32_t expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  uint32_t component = 0;
  Event initialised;
  bool fenced = false;  // a fence has followed the initialisation
  Clock arriving, completed;
  bool remote_arriving = false, remote_completed = false;  // whether other blocks arrived in the phase
  WaitQueue waiting;
};

struct StoreGroup {
  std::vector<OperationPointer> reads, writes;
};

struct CopyRange {
  unsigned char* destination;
  size_t bytes;
  OperationPointer operation;
};

// A 64 x columns tile of sums, one while its multiplies are in flight.
struct Accumulator {
  int columns;
  std::vector<float> tile;
};

struct Multiply {
  std::shared_ptr<Accumulator> accumulator;
  uint64_t a, b;
  bool a_in_registers, a_transposed, b_transposed, accumulate;
  float (*to_float)(uint16_t);
  uint32_t group;
  int issued = 0;  // threads
  float a_tile[64 * 16];
  std::vector<Event> writers;  // of what it reads
};

struct Warpgroup {
  struct Block* block = nullptr;
  std::deque<std::shared_ptr<Multiply>> multiplies;  // the last ones issued
  uint32_t dropped = 0;                              // multiplies before the first of these
  uint32_t executed = 0;
  WaitQueue waiting;
};

// Registers of a thread that a multiply still uses: accumulators, or A, with what they must hold when it is done.
struct InFlight {
  uint32_t* registers;
  uint32_t group;
  std::shared_ptr<Accumulator> accumulator;  // null for A
  std::vector<uint32_t> expected;
};

struct RegisterCopy {  // what an array of a thread held at its last wgmma_fence
  const void* array;
  std::vector<unsigned char> bytes;
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  struct Block* block = nullptr;
  int index = 0;
  uint32_t component = 0;
  Clock clock;
  bool done = false;
  const char* place = nullptr;         // where it waits
  const void* place_object = nullptr;  // for what

  uint32_t collective_mask = 0;
  void* collective_slot = nullptr;
  const char* collective = nullptr;

  int registers = 0;
  uint32_t cluster_arrivals = 0, cluster_waits = 0;
  uint32_t arrived_barriers = 0;  // a bit for each of the block's barriers
  uint32_t store_component = Event::kNone;
  std::deque<StoreGroup> stores;  // committed and not known to be finished; the last one is open
  uint32_t stores_committed = 0;
  uint32_t global_component = Event::kNone;   // among the writers of global memory
  Clock fenced, seen_relaxed;                 // see device_fence
  std::deque<std::vector<CopyRange>> copies;  // likewise for cp.async

  uint32_t multiplies_issued = 0;
  std::vector<uint32_t> multiplies_committed;  // by each group and all before it
  bool wgmma_fenced = false;
  std::vector<RegisterCopy> register_copies;
  std::vector<InFlight> in_flight;

  Event now() const { return {component, clock[component]}; }
};

struct Block {
  Cluster* cluster = nullptr;
  uint3 index = {0, 0, 0};
  uint32_t rank = 0;
  int alive = 0;
  unsigned char* arena = nullptr;   // begins at a multiple of 1024, like the shared window
  unsigned char* memory = nullptr;  // where the kernel's dynamic shared memory begins
  size_t bytes = 0;
  std::vector<unsigned char> storage;
  Shadow shadow;
  std::vector<std::unique_ptr<Thread>> threads;
  Barrier barriers[16];
  std::vector<std::unique_ptr<MbarrierState>> mbarriers;
  std::vector<std::unique_ptr<Warpgroup>> warpgroups;
  int loads_in_flight = 0;
  std::vector<uint32_t> elected;  // lane per warp
  int free_registers = 0;         // given up by decrease_registers; a launch leaves none over
  WaitQueue waiting_for_registers;
  std::vector<Event> remote_accesses;  // of other blocks to its shared memory, or on their behalf
  Clock ending;                        // what its ended threads knew

  bool holds(const void* pointer) const {
    return memory <= pointer && static_cast<const unsigned char*>(pointer) < memory + bytes;
  }
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  uint32_t thread_count = 0;
  uint32_t components = 0;
  std::map<uint32_t, std::string> names;  // of components beyond the threads'
  int alive = 0;
  int arrived = 0;
  uint32_t generation = 0;
  Clock arriving, released;
  WaitQueue waiting;

  uint32_t warps() const { return (thread_count + kWarp - 1) / kWarp; }
  uint32_t warp_component(const Thread& thread) const { return 2 * thread_count + thread.component / kWarp; }
  uint32_t add_component(std::string name) {
    names[components] = std::move(name);
    return components++;
  }
};

constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point type
constexpr size_t kGuardBytes = 1024;
constexpr int kMaxThreads = 1024;  // of a block
constexpr size_t kSharedLimit = 227 * 1024;
constexpr int kMultiprocessorRegisters = 64 * 1024;
constexpr uint32_t kWindowStart = 1024;

}  // namespace emulator
