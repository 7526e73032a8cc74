// Two blocks of a cluster that load each tile together, half of it each, for both; and a switch for each thing to get
// wrong.
#include "device/cluster.cuh"
#include "device/copy.cuh"
#include "device/math.cuh"
#include "device/mbarrier.cuh"
#include "device/panel.cuh"
#include "device/pipeline.cuh"
#include "device/sync.cuh"
#include "device/tensor_map.h"
#include "device/tma.cuh"
#include "device/warp.cuh"
#include "emulator/tensor_map.h"
#include "emulator_test.h"

using namespace fastattn;

namespace {

constexpr int kBlocks = 2;
constexpr int kRows = 64;
constexpr int kColumns = 64;
constexpr int kStages = 2;
constexpr int kConsumerWarps = 2;
constexpr int kThreads = (1 + kConsumerWarps) * kWarpThreads;

// Mistakes, in the order of REPORTS in test_clusters.py.
enum Mistake {
  kNone,
  kNoRemoteRelease,
  kReleasedBeforeRead,
  kReleasedByOneBlock,
  kCopiesToSelfOnly,
  kCopiesBeyondCluster,
  kOwnShareExpected,
  kTwiceExpected,
  kSharesOverlap,
  kNoEmptyWait,
  kEmptyWaitOfBlockScope,
  kNoInitialClusterSync,
  kNoBarrierInitFence,
  kNoFinalClusterSync,
  kArrivesTwice,
  kWaitsWithoutArrival,
};

using Ring = Pipeline<kStages, kBlocks>;

struct Shared {
  bfloat16_t tiles[kStages][kRows * kColumns];
  Ring ring;
};

// Issues the copy of this block's share, or a wrong one.
void copy_share(void* tile, const CUtensorMap& map, Mbarrier* full, int row, Mistake mistake) {
  constexpr int kShare = kRows / kBlocks;
  const int rank = mistake == kSharesOverlap ? 0 : cluster_rank();
  uint32_t blocks = 3;
  if (mistake == kCopiesToSelfOnly) blocks = 1u << rank;
  if (mistake == kCopiesBeyondCluster) blocks = 7;
  tma_load_4d_multicast(static_cast<unsigned char*>(tile) + rank * kShare * kPanelRowBytes, &map, full, blocks, 0,
                        row + rank * kShare, 0, 0);
}

void produce(Shared& shared, const CUtensorMap& map, int tiles, Mistake mistake) {
  Ring& ring = shared.ring;
  Ring::State state;
  const bool issues = elect_one();
  uint32_t bytes = kTileBytes<kRows, kColumns>;
  if (mistake == kOwnShareExpected) bytes /= kBlocks;
  if (mistake == kTwiceExpected) bytes *= kBlocks;
  for (int j = 0; j < tiles; ++j, state.advance()) {
    Mbarrier* full = &ring.full[state.stage];
    void* tile = shared.tiles[state.stage];
    const auto copies = [&] {
      if (mistake == kNone) {
        load_tile_multicast<kRows, kColumns, kBlocks>(tile, &map, full, j * kRows, 0, 0);
      } else {
        copy_share(tile, map, full, j * kRows, mistake);
      }
    };
    if (mistake != kNoEmptyWait && mistake != kEmptyWaitOfBlockScope) {
      ring.load(state, *full, bytes, issues, copies);
      continue;
    }
    if (mistake == kEmptyWaitOfBlockScope) mbarrier_wait(&ring.empty[state.stage], state.parity ^ 1);
    warp_sync();
    if (!issues) continue;
    mbarrier_arrive_expect_tx(full, bytes);
    copies();
  }
}

// out[block] = (block + 1) times the sum of (j + 1) tile_j.
void consume(Shared& shared, float* out, int tiles, Mistake mistake) {
  Ring& ring = shared.ring;
  Ring::State state;
  const int row = thread_index() - kWarpThreads;
  const auto release = [&] {
    warp_sync();
    if (lane_index() != 0) return;
    if (mistake == kNoRemoteRelease) {
      mbarrier_arrive_cluster(&ring.empty[state.stage], cluster_rank());
    } else if (mistake == kReleasedByOneBlock) {
      for (int i = 0; i < kBlocks; ++i) mbarrier_arrive_cluster(&ring.empty[state.stage], cluster_rank());
    } else {
      ring.release(state);
    }
  };
  float sums[kColumns] = {};
  for (int j = 0; j < tiles; ++j, state.advance()) {
    ring.wait_full(state);
    if (mistake == kReleasedBeforeRead) release();
    const auto* tile = reinterpret_cast<const unsigned char*>(shared.tiles[state.stage]);
    for (int column = 0; column < kColumns; column += 8) {
      const uint4 chunk = ld_shared(reinterpret_cast<const uint4*>(tile + tile_offset<kRows>(row, column)));
      bfloat16_t values[8];
      memcpy(values, &chunk, sizeof(values));
      for (int i = 0; i < 8; ++i) sums[column + i] += float(j + 1) * values[i].to_float();
    }
    if (mistake != kReleasedBeforeRead) release();
  }
  const int block = block_index().x;
  for (int i = 0; i < kColumns; ++i) out[(block * kRows + row) * kColumns + i] = float(block + 1) * sums[i];
}

FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(kThreads, 1)
    sum_tiles(FASTATTN_GRID_CONSTANT const CUtensorMap map, float* out, int tiles, Mistake mistake) {
  Shared& shared = *reinterpret_cast<Shared*>(align_shared<1024>(dynamic_shared_memory()));
  if (thread_index() == 0) {
    shared.ring.init(kConsumerWarps);
    if (mistake != kNoBarrierInitFence) fence_barrier_init();
  }
  mistake == kNoInitialClusterSync ? block_sync() : cluster_sync();
  if (warp_index() == 0) {
    produce(shared, map, tiles, mistake);
  } else {
    consume(shared, out, tiles, mistake);
  }
  if (mistake == kNoFinalClusterSync) return;
  if (mistake == kArrivesTwice) cluster_arrive();
  if (mistake != kWaitsWithoutArrival) cluster_arrive();
  cluster_wait();
}

}  // namespace

extern "C" const char* run_sum_tiles(const void* x, float* out, int64_t clusters, int64_t tiles, int64_t mistake) {
  return emulator::guarded([&] {
    CUtensorMap map;
    const auto rows = static_cast<uint64_t>(tiles * kRows);
    const CUresult result =
        encode_tensor_map<4>(emulator::encode_tiled, &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, x, {kColumns, rows, 1, 1},
                             {kColumns * 2, rows * kColumns * 2, rows * kColumns * 2},
                             {kColumns, kRows / kBlocks, 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
    if (result != CUDA_SUCCESS) throw std::runtime_error("encode_tiled refuses");
    const emulator::Launch launch{.grid = {unsigned(clusters * kBlocks), 1, 1},
                                  .threads = kThreads,
                                  .shared_bytes = sizeof(Shared) + 1024,
                                  .cluster = kBlocks};
    emulator::launch(emulator::options, launch, sum_tiles, map, out, int(tiles), Mistake(mistake));
  });
}
