// Shapes, tensor maps, shared memory layout and tile numbering of the Hopper forward.
#pragma once

#include "../device/panel.cuh"
#include "../device/pipeline.cuh"
#include "../device/registers.cuh"
#include "attention_tile_queue.cuh"

namespace fastattn {

constexpr int kWarpgroupRows = 64;

// The shape of one instantiation: tiles of kBlockM queries, 64 per consumer warpgroup, by kBlockN keys. Head dims up to
// kHeadDim are served: TMA reads zeros for the columns that are missing, and does not write them.
//
// Blocks run in clusters of kCluster, in calls whose queries see every key. The blocks of a cluster take tiles of the
// same key head, and each loads its share of every block of keys and values to all of them by multicast.
template <class Element_, int kHeadDim_, int kBlockM_, int kBlockN_, bool kSoftcap_, int kCluster_ = 1>
struct ForwardShape {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr int kCluster = kCluster_;

  static constexpr int kStages = 2;
  static constexpr int kConsumers = kBlockM / kWarpgroupRows;
  static constexpr int kConsumerArrivals = kConsumers * 4;  // one per warp
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kMinBlocks = 1;  // per multiprocessor
  // The consumers take the registers that the producer releases.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  // Above head dim 128 the products of a tile take so much longer than its softmax that ping-pong scheduling gains
  // nothing.
  static constexpr bool kPingPong = kHeadDim <= 128;

  static constexpr uint32_t kQueryBytes = kTileBytes<kBlockM, kHeadDim>;
  static constexpr uint32_t kKeyBytes = kTileBytes<kBlockN, kHeadDim>;
  static constexpr uint32_t kRingBytes = 2 * kStages * kKeyBytes;
  static constexpr uint32_t kOtherBytes = 1024 + 256;  // to align the tiles, and the barriers
  // The next queries are loaded while the result is written. Where shared memory suffices the result has a buffer of
  // its own; elsewhere it is staged, kOutColumns columns at a time, in the last stage of values, which is then released
  // late.
  static constexpr bool kOwnOut = 2 * kQueryBytes + kRingBytes + kOtherBytes <= kMaxSharedBytes;
  static constexpr int kOutColumns =
      kOwnOut || kKeyBytes >= kQueryBytes
          ? kHeadDim
          : static_cast<int>(kKeyBytes / kTileBytes<kBlockM, kPanelColumns>) * kPanelColumns;
  static constexpr uint32_t kKeysAt = (kOwnOut ? 2 : 1) * kQueryBytes;
  static constexpr uint32_t kValuesAt = kKeysAt + kStages * kKeyBytes;
  static constexpr uint32_t kBarriersAt = kKeysAt + kRingBytes;
  static constexpr uint32_t kSharedBytes = kBarriersAt + kOtherBytes;

  static_assert(kOutColumns > 0 && kHeadDim % kOutColumns == 0);
  static_assert(kHeadDim % kPanelColumns == 0 && kBlockM % kWarpgroupRows == 0 && kBlockN % 16 == 0);
  static_assert(kConsumers == 2 || kConsumers == 3);
  static_assert(registers_fit(kThreads, kMinBlocks, kProducerRegisters, kConsumerRegisters));
  static_assert(kSharedBytes <= kMaxSharedBytes);
  static_assert(kBlockN % (8 * kCluster) == 0);
};

struct ForwardMaps {
  CUtensorMap q;    // (D, Sq, H, B) fastest first, packed (D, T, H, 1); boxes of 64 columns, kBlockM rows
  CUtensorMap k;    // (D, Sk, Hkv, B), packed (D, Tk, Hkv, 1); boxes of 64 columns, kBlockN / kCluster rows
  CUtensorMap v;    // the same
  CUtensorMap out;  // as q; boxes of 64 columns, 64 rows
};

// The block's shared memory. Tiles are panels of 64 columns, one after the other.
template <class Shape>
struct ForwardShared {
  struct Barriers {
    TileQueue tiles;
    Pipeline<1> queries;
    Pipeline<Shape::kStages, Shape::kCluster> keys;
    Pipeline<Shape::kStages, Shape::kCluster> values;
    Mbarrier landed;  // the producer's own, for tiles of values whose rows it zeroes
  };
  static_assert(sizeof(Barriers) <= 256);

  unsigned char* base;  // a multiple of 1024

  FASTATTN_DEVICE unsigned char* queries() const { return base; }
  FASTATTN_DEVICE unsigned char* out() const { return base + Shape::kQueryBytes; }  // where kOwnOut
  FASTATTN_DEVICE unsigned char* keys(int stage) const { return base + Shape::kKeysAt + stage * Shape::kKeyBytes; }
  FASTATTN_DEVICE unsigned char* values(int stage) const { return base + Shape::kValuesAt + stage * Shape::kKeyBytes; }
  FASTATTN_DEVICE Barriers& barriers() const { return *reinterpret_cast<Barriers*>(base + Shape::kBarriersAt); }
};

// The blocks of keys that a tile sees. In clusters these are all of them, as the blocks of a cluster load them
// together.
template <class Shape>
FASTATTN_DEVICE BlockRange forward_key_blocks(const Visibility& seen, int first_query) {
  const int keys = seen.num_keys;
  if constexpr (Shape::kCluster > 1) return block_range<Shape::kBlockN>(0, keys, 0, keys);
  return key_blocks<Shape::kBlockM, Shape::kBlockN>(seen, first_query);
}

// The tile of the block of this rank for a tile number of the schedule. In clusters a batch head is a key head, and a
// number stands for kCluster consecutive tiles of its query heads. Where their count is not a multiple of kCluster, the
// last tiles begin past the last query: their blocks take part in the loads and store nothing.
template <class Shape>
FASTATTN_DEVICE QueryTile forward_tile_at(const AttentionParams& params, const TileSchedule& schedule, int number,
                                          int rank = 0) {
  if constexpr (Shape::kCluster == 1) {
    const Tile place = tile_with_edges_last(schedule, number, [&](int block) {
      const BlockRange keys = forward_key_blocks<Shape>(sequence_of(params, 0).seen, block * Shape::kBlockM);
      return keys.end - keys.begin;
    });
    return query_tile<Shape::kBlockM>(params, place.query_block, place.batch_head);
  } else {
    const Tile place = tile_at(schedule, number, TileOrder::kEven);
    const int head_blocks = ceil_div(params.seqlen_q, Shape::kBlockM);
    const int group_size = params.num_heads / params.num_kv_heads;
    const int block = place.query_block * Shape::kCluster + rank;
    const int head = block / head_blocks < group_size ? block / head_blocks : group_size - 1;
    return {sequence_of(params, place.batch_head / params.num_kv_heads),
            place.batch_head % params.num_kv_heads * group_size + head, (block - head * head_blocks) * Shape::kBlockM};
  }
}

}  // namespace fastattn
