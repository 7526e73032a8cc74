// One small kernel per part of csrc/device, each with switches for the mistakes that this part allows.
#include "device/cluster.cuh"
#include "device/copy.cuh"
#include "device/math.cuh"
#include "device/mbarrier.cuh"
#include "device/sync.cuh"
#include "device/tensor_map.h"
#include "device/tma.cuh"
#include "device/warp.cuh"
#include "device/wgmma.cuh"
#include "device_tiles.h"
#include "emulator/tensor_map.h"
#include "emulator_test.h"

using namespace fastattn;

namespace {

// y = x by cp.async, `chunks` pieces of 16 bytes, of which the last has only `last` bytes. One warp.
FASTATTN_KERNEL void copy_async(const unsigned char* x, unsigned char* y, int chunks, int last, bool wait) {
  unsigned char* buffer = dynamic_shared_memory();
  for (int i = thread_index(); i < chunks; i += 32) {
    cp_async_16(buffer + 16 * i, x + 16 * i, i == chunks - 1 ? last : 16);
    cp_async_commit();
  }
  if (wait) cp_async_wait<0>();
  warp_sync();
  for (int i = 31 - thread_index(); i < chunks; i += 32) {
    const uint4 value = ld_shared(reinterpret_cast<uint4*>(buffer + 16 * i));
    st_global_16(y + 16 * i, value);
  }
}

// Four (or two) 8 x 8 matrices from fragments to shared memory, one below the other, then to y. One warp.
FASTATTN_KERNEL void store_matrices(const uint32_t* fragments, uint32_t* y, int count, bool transposed) {
  unsigned char* rows = dynamic_shared_memory();
  const int lane = lane_index();
  uint32_t four[4], two[2];
  for (int i = 0; i < count; ++i) (count == 4 ? four : two)[i] = fragments[32 * i + lane];
  unsigned char* row = rows + lane % (8 * count) * 16;
  if (count == 4) (transposed ? stmatrix_x4_transposed : stmatrix_x4)(row, four);
  if (count == 2) (transposed ? stmatrix_x2_transposed : stmatrix_x2)(row, two);
  warp_sync();
  for (int i = 0; i < count; ++i) y[32 * i + lane] = ld_shared(reinterpret_cast<uint32_t*>(rows) + 32 * i + lane);
}

enum ClusterMistake { kClusterRight, kNoStartSync, kNoMiddleSync, kNoEndSync };

// y[block] = the sum of x over the cluster: each block writes its x to all, as does an mbarrier arrival.
FASTATTN_KERNEL void cluster_sum(const float* x, float* y, ClusterMistake mistake) {
  auto* values = reinterpret_cast<float*>(dynamic_shared_memory());
  auto* arrivals = reinterpret_cast<Mbarrier*>(dynamic_shared_memory() + 256);
  const uint32_t blocks = cluster_blocks();
  if (thread_index() == 0) {
    mbarrier_init(arrivals, blocks);
    fence_barrier_init();
  }
  if (mistake != kNoStartSync) cluster_sync();
  if (thread_index() < static_cast<int>(blocks)) {
    st_shared(map_shared(&values[cluster_rank()], thread_index()), x[block_index().x]);
    mbarrier_arrive_cluster(arrivals, thread_index());
  }
  if (mistake != kNoMiddleSync) mbarrier_wait_cluster(arrivals, 0);
  float sum = 0;
  for (uint32_t i = 0; i < blocks; ++i) sum += ld_shared(&values[i]);
  // The same from the reader's side: what this block has written.
  block_sync();
  float again = 0;
  for (uint32_t i = 0; i < blocks; ++i) again += ld_shared(map_shared(values, i) + cluster_rank());
  if (thread_index() == 0) y[block_index().x] = sum + again - blocks * x[block_index().x];
  if (mistake != kNoEndSync) cluster_sync();
}

enum OrderMistake {
  kTurnRight,
  kTurnByFences,  // right too: device_fence and relaxed accesses
  kNoWait,
  kNoFenceBefore,
  kNoFenceAfter,
  kRelaxedLoad,
  kRelaxedAdd,
  kNoDeviceFenceBefore,
  kNoDeviceFenceAfter,
  kReadsWhatItWrites,
};

// Blocks store their index to y[0] in the order of their tickets, one after another.
FASTATTN_KERNEL void ordered_sum(float* y, uint32_t* semaphore, uint32_t* ticket, OrderMistake mistake) {
  const bool by_fences = mistake == kTurnByFences || mistake == kNoDeviceFenceBefore || mistake == kNoDeviceFenceAfter;
  auto* value = reinterpret_cast<float*>(dynamic_shared_memory());
  if (thread_index() > 0) return;
  const uint32_t mine = counter_fetch_add(ticket, 1);
  for (int i = 0; i < 4; ++i) st_shared(&value[i], float(mine));
  fence_proxy_async();
  if (by_fences || mistake == kRelaxedLoad) {
    while (emulator::relaxed_load(semaphore) != mine) {
    }
    if (by_fences && mistake != kNoDeviceFenceBefore) device_fence();
  } else {
    semaphore_wait(semaphore, mine);
  }
  if (mistake == kReadsWhatItWrites) ld_global_16(y);
  if (mistake != kNoFenceBefore) fence_proxy_async_global();
  bulk_store(y, value, 16);
  bulk_reduce_add(y + 4, value, 16);
  bulk_commit();
  if (mistake == kNoWait) {
    bulk_wait_read<0>();
  } else {
    bulk_wait<0>();
  }
  if (mistake != kNoFenceAfter) fence_proxy_async_global();
  if (by_fences && mistake != kNoDeviceFenceAfter) device_fence();
  if (by_fences || mistake == kRelaxedAdd) {
    counter_fetch_add(semaphore, 1);
  } else {
    semaphore_add_release(semaphore, 1);
  }
}

enum SharedMistake { kSharedRight, kPastTheEnd, kMisaligned, kNeverWritten, kArriveTwice, kNotWholeWarps };

// Thread t passes its index to thread t + 32 through shared memory and a named barrier.
FASTATTN_KERNEL void hand_over(int* y, SharedMistake mistake) {
  auto* values = reinterpret_cast<int*>(dynamic_shared_memory());
  const int thread = thread_index();
  if (mistake == kNotWholeWarps) named_barrier_sync(3, 60);
  if (thread < 32) {
    st_shared(&values[thread + (mistake == kPastTheEnd ? 1 : 0)], thread);
    if (mistake == kMisaligned) st_shared(reinterpret_cast<int*>(dynamic_shared_memory() + 2), thread);
    named_barrier_arrive(3, 64);
    if (mistake == kArriveTwice) named_barrier_arrive(3, 64);
  } else {
    named_barrier_sync(3, 64);
    if (mistake != kNeverWritten) y[thread - 32] = ld_shared(&values[thread - 32]);
    if (mistake == kNeverWritten) y[thread - 32] = ld_shared(&values[thread]);
  }
}

enum MapPlace { kMapOfTheGrid, kMapMisaligned, kMapInShared, kTooManyBytes, kTooManyBytesAtOnce };

// Loads a box by a tensor map that is not in the memory that TMA reads, or expects more bytes than a barrier counts.
FASTATTN_KERNEL void load_by_map(FASTATTN_GRID_CONSTANT const CUtensorMap map, unsigned char* copies, MapPlace place) {
  unsigned char* box = align_shared<1024>(dynamic_shared_memory());
  auto* full = reinterpret_cast<Mbarrier*>(box + 1024);
  if (thread_index() > 0) return;
  const auto* used = &map;
  if (place == kMapMisaligned) used = static_cast<const CUtensorMap*>(memcpy(copies + 16, &map, sizeof(map)));
  if (place == kMapInShared) used = static_cast<const CUtensorMap*>(memcpy(box + 2048, &map, sizeof(map)));
  mbarrier_init(full, 1);
  fence_barrier_init();
  for (int i = 0; place == kTooManyBytes && i < 1024; ++i) mbarrier_expect_tx(full, 1024);
  mbarrier_arrive_expect_tx(full, place == kTooManyBytesAtOnce ? 1 << 20 : 1024);
  tma_load_2d(box, used, full, 0, 0);
  mbarrier_wait(full, 0);
}

FASTATTN_KERNEL void do_nothing() {}

struct Parameters {
  char bytes[4100];
};
FASTATTN_KERNEL void take_parameters(Parameters) {}

// y[block] = how many blocks have started before.
FASTATTN_KERNEL void draw_tickets(uint32_t* y, uint32_t* ticket) {
  if (thread_index() == 0) y[block_index().x] = counter_fetch_add(ticket, 1);
}

// The first warpgroup goes down to `kept` registers, the second up to `wanted`.
FASTATTN_KERNEL void exchange_registers(int kept, int wanted) {
  const bool gives = warpgroup_index() == 0;
  emulator::set_max_registers(gives ? kept : wanted, !gives);
}

}  // namespace

extern "C" const char* run_copy_async(const unsigned char* x, unsigned char* y, int64_t chunks, int64_t last,
                                      int64_t wait) {
  return emulator::guarded([&] {
    const emulator::Launch launch{.threads = 32, .shared_bytes = size_t(chunks) * 16};
    emulator::launch(emulator::options, launch, copy_async, x, y, int(chunks), int(last), wait != 0);
  });
}

extern "C" const char* run_store_matrices(const uint32_t* fragments, uint32_t* y, int64_t count, int64_t transposed) {
  return emulator::guarded([&] {
    const emulator::Launch launch{.threads = 32, .shared_bytes = size_t(count) * 128};
    emulator::launch(emulator::options, launch, store_matrices, fragments, y, int(count), transposed != 0);
  });
}

extern "C" const char* run_cluster_sum(const float* x, float* y, int64_t blocks, int64_t cluster, int64_t mistake) {
  return emulator::guarded([&] {
    const emulator::Launch launch{
        .grid = {unsigned(blocks), 1, 1}, .threads = 64, .shared_bytes = 512, .cluster = int(cluster)};
    emulator::launch(emulator::options, launch, cluster_sum, x, y, ClusterMistake(mistake));
  });
}

extern "C" const char* run_ordered_sum(float* y, uint32_t* semaphore, uint32_t* ticket, int64_t blocks,
                                       int64_t mistake) {
  return emulator::guarded([&] {
    const emulator::Launch launch{.grid = {unsigned(blocks), 1, 1}, .threads = 32, .shared_bytes = 16};
    emulator::launch(emulator::options, launch, ordered_sum, y, semaphore, ticket, OrderMistake(mistake));
  });
}

extern "C" const char* run_load_by_map(const void* data, unsigned char* copies, int64_t place) {
  return emulator::guarded([&] {
    const CUtensorMap map = contiguous_map<float, 2>(data, {32, 8}, {32, 8}, CU_TENSOR_MAP_SWIZZLE_128B);
    const emulator::Launch launch{.threads = 32, .shared_bytes = 4096};
    emulator::launch(emulator::options, launch, load_by_map, map, copies, MapPlace(place));
  });
}

extern "C" const char* run_launch(int64_t x, int64_t y, int64_t z, int64_t threads, int64_t min_blocks,
                                  int64_t shared_bytes, int64_t max_shared_bytes, int64_t cluster,
                                  int64_t many_parameters) {
  return emulator::guarded([&] {
    const emulator::Launch launch{.grid = {unsigned(x), unsigned(y), unsigned(z)},
                                  .threads = int(threads),
                                  .shared_bytes = size_t(shared_bytes),
                                  .max_shared_bytes = size_t(max_shared_bytes),
                                  .cluster = int(cluster),
                                  .min_blocks = int(min_blocks)};
    if (many_parameters) return emulator::launch(emulator::options, launch, take_parameters, Parameters());
    emulator::launch(emulator::options, launch, do_nothing);
  });
}

extern "C" const char* run_draw_tickets(uint32_t* y, uint32_t* ticket, int64_t blocks) {
  return emulator::guarded([&] {
    const emulator::Launch launch{.grid = {unsigned(blocks), 1, 1}, .threads = 32};
    emulator::launch(emulator::options, launch, draw_tickets, y, ticket);
  });
}

extern "C" const char* run_exchange_registers(int64_t min_blocks, int64_t kept, int64_t wanted) {
  return emulator::guarded([&] {
    const emulator::Launch launch{.threads = 256, .min_blocks = int(min_blocks)};
    emulator::launch(emulator::options, launch, exchange_registers, int(kept), int(wanted));
  });
}

extern "C" const char* run_hand_over(int* y, int64_t mistake) {
  return emulator::guarded([&] {
    const emulator::Launch launch{.threads = 64, .shared_bytes = mistake == kNeverWritten ? 256 : 128};
    emulator::launch(emulator::options, launch, hand_over, y, SharedMistake(mistake));
  });
}
