// A small kernel with everything a Hopper attention kernel has but the softmax, and a switch for each thing to get
// wrong.
#include <cmath>

#include "device/cluster.cuh"
#include "device/copy.cuh"
#include "device/math.cuh"
#include "device/mbarrier.cuh"
#include "device/sync.cuh"
#include "device/tensor_map.h"
#include "device/tma.cuh"
#include "device/warp.cuh"
#include "device/wgmma.cuh"
#include "emulator/tensor_map.h"
#include "emulator_test.h"

using namespace fastattn;

namespace {

constexpr int kTile = 64;
constexpr int kTileBytes = kTile * kTile * 2;
constexpr int kStages = 2;
constexpr int kConsumers = 2;  // warpgroups

// Mistakes, in the order of REPORTS in test_pipeline.py.
enum Mistake {
  kNone,
  kNoQueryWait,
  kNoKeyFullWait,
  kNoValueFullWait,
  kNoKeyEmptyWait,
  kNoValueEmptyWait,
  kSwappedEmptyParity,
  kSwappedFullParity,
  kHalvedExpectTx,
  kKeyReleasedBeforeWait,
  kValueReleasedBeforeWait,
  kScoresWaitTooLax,
  kAccumulatorTouched,
  kWeightsTouched,
  kNoWgmmaFence,
  kNoProxyFence,
  kNoStoreWait,
  kNoInitialSync,
  kNoBarrierInitFence,
  kWrongStride,
  kWrongTranspose,
  kUnswizzledEpilogue,
  kNoBarrierBeforeStore,
  kUnalignedBase,
  kArrivalMissing,
  kArrivalTooMany,
  kTooManyRegisters,
  kWaitByOneWarp,
  kNoCommitOfStore,
  kScoresNeverWaited,
};

struct Shared {
  bfloat16_t q[kConsumers][kTile * kTile];  // and the output
  bfloat16_t k[kStages][kTile * kTile];
  bfloat16_t v[kStages][kTile * kTile];
  Mbarrier q_full, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

void produce(Shared& shared, const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v, int tiles,
             Mistake mistake) {
  const int first_row = block_index().x * kConsumers * kTile;
  mbarrier_arrive_expect_tx(&shared.q_full, kConsumers * kTileBytes);
  for (int i = 0; i < kConsumers; ++i) tma_load_2d(shared.q[i], &q, &shared.q_full, 0, first_row + i * kTile);
  const int expected = mistake == kHalvedExpectTx ? kTileBytes / 2 : kTileBytes;
  const auto empty_parity = [&](int j) { return uint32_t(j / kStages % 2 ^ (mistake == kSwappedEmptyParity ? 0 : 1)); };
  const auto load_keys = [&](int j) {
    const int stage = j % kStages;
    if (mistake != kNoKeyEmptyWait) mbarrier_wait(&shared.k_empty[stage], empty_parity(j));
    mbarrier_arrive_expect_tx(&shared.k_full[stage], expected);
    tma_load_2d(shared.k[stage], &k, &shared.k_full[stage], 0, j * kTile);
  };
  load_keys(0);
  for (int j = 0; j < tiles; ++j) {
    if (j + 1 < tiles) load_keys(j + 1);
    const int stage = j % kStages;
    if (mistake != kNoValueEmptyWait) mbarrier_wait(&shared.v_empty[stage], empty_parity(j));
    mbarrier_arrive_expect_tx(&shared.v_full[stage], kTileBytes);
    tma_load_2d(shared.v[stage], &v, &shared.v_full[stage], 0, j * kTile);
  }
}

// acc += weights (64 x 64, in registers) v.
void multiply_values(float (&acc)[32], const uint32_t (&weights)[4][4], const bfloat16_t* v, Mistake mistake) {
  const uint64_t descriptor = wgmma_descriptor(v);
  for (int step = 0; step < 4; ++step) {
    if (mistake == kWrongTranspose) {
      wgmma<bfloat16_t>(acc, weights[step], advance_descriptor(descriptor, 32 * step), true);
    } else {
      wgmma<bfloat16_t, Operand::kAcrossK>(acc, weights[step], advance_descriptor(descriptor, 2048 * step), true);
    }
  }
}

// scores = q k^T.
void multiply_keys(float (&scores)[32], const bfloat16_t* q, const bfloat16_t* k, Mistake mistake) {
  uint64_t key_descriptor = wgmma_descriptor(k);
  if (mistake == kWrongStride) key_descriptor ^= static_cast<uint64_t>((1024 ^ 2048) >> 4) << 32;
  for (int step = 0; step < 4; ++step) {
    wgmma<bfloat16_t>(scores, advance_descriptor(wgmma_descriptor(q), 32 * step),
                      advance_descriptor(key_descriptor, 32 * step), step > 0);
  }
}

void round_scores(uint32_t (&weights)[4][4], const float (&scores)[32]) {
  for (int i = 0; i < 16; ++i) weights[i / 4][i % 4] = pack<bfloat16_t>(scores[2 * i], scores[2 * i + 1]);
}

void store_output(Shared& shared, const CUtensorMap& out, const float (&acc)[32], int consumer, Mistake mistake) {
  const int thread = thread_index() % 128;
  for (int i = 0; i < 16; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
    const int column = i / 2 * 8 + thread % 4 * 2;
    const uint32_t offset = mistake == kUnswizzledEpilogue ? row * 128 + column * 2 : swizzled_offset(row, column);
    auto* destination = reinterpret_cast<unsigned char*>(shared.q[consumer]) + offset;
    st_shared(reinterpret_cast<uint32_t*>(destination), pack<bfloat16_t>(acc[2 * i], acc[2 * i + 1]));
  }
  if (mistake != kNoProxyFence) fence_proxy_async();
  if (mistake != kNoBarrierBeforeStore) named_barrier_sync(1 + consumer, 128);
  if (thread == 0) {
    tma_store_2d(&out, shared.q[consumer], 0, (block_index().x * kConsumers + consumer) * kTile);
    if (mistake != kNoCommitOfStore) bulk_commit();
    if (mistake != kNoStoreWait) bulk_wait_read<0>();
  }
}

void consume(Shared& shared, const CUtensorMap& out, int tiles, Mistake mistake) {
  const int consumer = warpgroup_index() - 1;
  const int flip = mistake == kSwappedFullParity ? 1 : 0;
  const auto wait_full = [&](Mbarrier* barriers, int j) {
    if (mistake == kWaitByOneWarp && thread_index() % 128 >= 32) return;
    mbarrier_wait(&barriers[j % kStages], (j / kStages % 2) ^ flip);
  };
  const auto release = [&](Mbarrier* barriers, int j) {
    if (mistake == kArrivalMissing && warp_index() == 4) return;
    if (lane_index() == 0) mbarrier_arrive(&barriers[j % kStages]);
    if (mistake == kArrivalTooMany && lane_index() == 1) mbarrier_arrive(&barriers[j % kStages]);
  };
  float acc[32] = {};
  float scores[32];
  uint32_t weights[4][4];
  uint32_t next_weights[4][4];

  if (mistake != kNoQueryWait) mbarrier_wait(&shared.q_full, 0);
  if (mistake != kNoKeyFullWait) wait_full(shared.k_full, 0);
  wgmma_fence();
  multiply_keys(scores, shared.q[consumer], shared.k[0], mistake);
  wgmma_commit();
  if (mistake != kScoresNeverWaited) wgmma_wait<0>();
  release(shared.k_empty, 0);
  round_scores(weights, scores);

  for (int j = 1; j < tiles; ++j) {
    if (mistake != kNoKeyFullWait) wait_full(shared.k_full, j);
    if (mistake != kNoWgmmaFence) wgmma_fence();
    multiply_keys(scores, shared.q[consumer], shared.k[j % kStages], mistake);
    wgmma_commit();
    if (mistake != kNoValueFullWait) wait_full(shared.v_full, j - 1);
    multiply_values(acc, weights, shared.v[(j - 1) % kStages], mistake);
    wgmma_commit();
    if (mistake == kKeyReleasedBeforeWait) release(shared.k_empty, j);
    if (mistake == kScoresWaitTooLax) {
      wgmma_wait<2>();
    } else {
      wgmma_wait<1>();
    }
    if (mistake != kKeyReleasedBeforeWait) release(shared.k_empty, j);
    if (mistake == kAccumulatorTouched) acc[3] *= 1.5f;
    if (mistake == kValueReleasedBeforeWait) release(shared.v_empty, j - 1);
    round_scores(mistake == kWeightsTouched ? weights : next_weights, scores);
    wgmma_wait<0>();
    if (mistake != kValueReleasedBeforeWait) release(shared.v_empty, j - 1);
    if (mistake != kWeightsTouched) memcpy(weights, next_weights, sizeof(weights));
  }

  if (mistake != kNoValueFullWait) wait_full(shared.v_full, tiles - 1);
  wgmma_fence();
  multiply_values(acc, weights, shared.v[(tiles - 1) % kStages], mistake);
  wgmma_commit();
  wgmma_wait<0>();
  release(shared.v_empty, tiles - 1);
  store_output(shared, out, acc, consumer, mistake);
}

// out = (q k^T rounded to bfloat16) v, all with 64 columns. One block owns 128 rows of q.
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(384, 1)
    pipeline(FASTATTN_GRID_CONSTANT const CUtensorMap q, FASTATTN_GRID_CONSTANT const CUtensorMap k,
             FASTATTN_GRID_CONSTANT const CUtensorMap v, FASTATTN_GRID_CONSTANT const CUtensorMap out, int tiles,
             Mistake mistake) {
  unsigned char* base = dynamic_shared_memory();
  Shared& shared = *reinterpret_cast<Shared*>(mistake == kUnalignedBase ? base : align_shared<1024>(base));
  if (thread_index() == 0) {
    mbarrier_init(&shared.q_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&shared.k_full[stage], 1);
      mbarrier_init(&shared.v_full[stage], 1);
      mbarrier_init(&shared.k_empty[stage], 4 * kConsumers);
      mbarrier_init(&shared.v_empty[stage], 4 * kConsumers);
    }
    if (mistake != kNoBarrierInitFence) fence_barrier_init();
  }
  if (mistake != kNoInitialSync) block_sync();
  if (warpgroup_index() == 0) {
    if (mistake == kTooManyRegisters) {
      decrease_registers<32>();
    } else {
      decrease_registers<24>();
    }
    if (warp_index() == 0 && elect_one()) produce(shared, q, k, v, tiles, mistake);
  } else {
    increase_registers<240>();
    consume(shared, out, tiles, mistake);
  }
}

CUtensorMap tile_map(const void* data, int64_t rows) {
  CUtensorMap map;
  const CUresult result = encode_tensor_map<2>(emulator::encode_tiled, &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data,
                                               {kTile, static_cast<uint64_t>(rows)}, {kTile * 2}, {kTile, kTile},
                                               CU_TENSOR_MAP_SWIZZLE_128B);
  if (result != CUDA_SUCCESS) throw std::runtime_error("encode_tiled refuses");
  return map;
}

}  // namespace

extern "C" const char* run_pipeline(const void* q, const void* k, const void* v, void* out, int64_t rows, int64_t keys,
                                    int64_t mistake) {
  return emulator::guarded([&] {
    const emulator::Launch launch{.grid = {unsigned((rows + 127) / 128), 1, 1},
                                  .threads = 384,
                                  .shared_bytes = sizeof(Shared) + 1024,
                                  .max_shared_bytes = sizeof(Shared) + 1024};
    emulator::launch(emulator::options, launch, pipeline, tile_map(q, rows), tile_map(k, keys), tile_map(v, keys),
                     tile_map(out, rows), int(ceil_div(keys, kTile)), Mistake(mistake));
  });
}
