// A ring of stages in shared memory between a producer and its consumers.
#pragma once

#include "cluster.cuh"
#include "mbarrier.cuh"
#include "sync.cuh"

namespace fastattn {

// A role's position in a ring: the stage it uses next, and the parity of that stage's current phase.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;

  FASTATTN_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The mbarriers of a ring, in shared memory. Per stage and round: the producer waits until the stage is empty, fills it
// and arrives at `full` once; the consumers wait until it is full, read it and arrive at `empty`, with the arrival
// count given to init. Every role keeps its own PipelineState.
//
// In a cluster of kBlocks whose producers fill each other's stages (tma_load_4d_multicast), the rings are synchronised:
// a producer waits until the consumers of all blocks have released a stage. A cluster_sync is needed between init and
// the first copy, and another after the last release, since a block that has exited can receive neither copies nor
// arrivals.
template <int kStages, int kBlocks = 1>
struct Pipeline {
  using State = PipelineState<kStages>;

  Mbarrier full[kStages];
  Mbarrier empty[kStages];

  // By one thread, before fence_barrier_init and block_sync (cluster_sync). `consumer_arrivals` are those of one block.
  FASTATTN_DEVICE void init(int consumer_arrivals) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&empty[stage], kBlocks * consumer_arrivals);
    }
  }

  // Fills a stage. The whole producer warp waits until the stage is empty. Once every lane has seen that, the lane with
  // `issues` set expects the number of bytes at `arrived` and issues their copies. A lane that were still waiting for
  // this phase when the consumers completed the next one would wait forever. `arrived` is the stage's full barrier, or
  // one of the producer's own if it edits the loaded data before it arrives at `full`.
  template <class Copies>
  FASTATTN_DEVICE void load(State state, Mbarrier& arrived, uint32_t bytes, bool issues, Copies copies) {
    wait_empty(state);
    warp_sync();
    if (!issues) return;
    mbarrier_arrive_expect_tx(&arrived, bytes);
    copies();
  }

  // The same where the issuing lane writes the stage itself.
  template <class Write>
  FASTATTN_DEVICE void fill(State state, bool issues, Write write) {
    wait_empty(state);
    warp_sync();
    if (!issues) return;
    write();
    mbarrier_arrive(&full[state.stage]);
  }

  FASTATTN_DEVICE void wait_full(State state) { mbarrier_wait(&full[state.stage], state.parity); }

  // Releases a stage, which load and fill wait for: the caller has finished reading.
  FASTATTN_DEVICE void release(State state) {
    if constexpr (kBlocks == 1) {
      mbarrier_arrive(&empty[state.stage]);
    } else {
#pragma unroll
      for (uint32_t rank = 0; rank < kBlocks; ++rank) mbarrier_arrive_cluster_read(&empty[state.stage], rank);
    }
  }

 private:
  // By the whole warp, which must reconverge before one of its lanes arrives at the stage: load and fill do both. A
  // fresh stage counts as empty.
  FASTATTN_DEVICE void wait_empty(State state) {
    if constexpr (kBlocks == 1) {
      mbarrier_wait(&empty[state.stage], state.parity ^ 1);
    } else {
      mbarrier_wait_cluster(&empty[state.stage], state.parity ^ 1);
    }
  }
};

}  // namespace fastattn
