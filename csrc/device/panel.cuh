// Tiles of 16-bit values in shared memory in the layout of the tensor cores: consecutive panels of 64 columns, whose
// rows are 128 bytes each under the 128-byte swizzle. Tiles begin at multiples of 1024 bytes.
#pragma once

#include "cluster.cuh"
#include "copy.cuh"
#include "fragment.cuh"
#include "sync.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace fastattn {

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr uint32_t kMaxSharedBytes = 232448;  // of a block on sm_90

// Bytes of a tile. kColumns is a multiple of 64, kRows of 8.
template <int kRows, int kColumns>
constexpr uint32_t kTileBytes = kRows * kColumns * 2;

// Byte offset of (row, column) in a tile of kRows.
template <int kRows>
FASTATTN_DEVICE uint32_t tile_offset(int row, int column) {
  return column / kPanelColumns * (kRows * kPanelRowBytes) + swizzled_offset(row, column % kPanelColumns);
}

// Starts copying kRows rows of one head from `row` on, all columns, to a tile. One thread calls it.
template <int kRows, int kColumns>
FASTATTN_DEVICE void load_tile(void* tile, const CUtensorMap* map, Mbarrier* barrier, int row, int head, int batch,
                               CachePolicy policy = CachePolicy::kEvictNormal) {
#pragma unroll
  for (int panel = 0; panel < kColumns / kPanelColumns; ++panel) {
    tma_load_4d(static_cast<unsigned char*>(tile) + panel * kRows * kPanelRowBytes, map, barrier, panel * kPanelColumns,
                row, head, batch, policy);
  }
}

// Loads this block's kRows / kBlocks rows of a tile, to all kBlocks blocks of its cluster by multicast. The map's box
// has kRows / kBlocks rows. The barrier of every block receives the bytes of the whole tile.
template <int kRows, int kColumns, int kBlocks>
FASTATTN_DEVICE void load_tile_multicast(void* tile, const CUtensorMap* map, Mbarrier* barrier, int row, int head,
                                         int batch, CachePolicy policy = CachePolicy::kEvictNormal) {
  constexpr int kShare = kRows / kBlocks;
  static_assert(kRows % kBlocks == 0 && kShare % 8 == 0, "a share begins at a multiple of 1024 bytes");
  const int first = static_cast<int>(cluster_rank()) * kShare;
#pragma unroll
  for (int panel = 0; panel < kColumns / kPanelColumns; ++panel) {
    tma_load_4d_multicast(static_cast<unsigned char*>(tile) + (panel * kRows + first) * kPanelRowBytes, map, barrier,
                          (1u << kBlocks) - 1, panel * kPanelColumns, row + first, head, batch, policy);
  }
}

// Zeroes the rows of a tile from `first_row` on. A whole warp calls it, then calls fence_proxy_async so that the tensor
// cores read the zeros.
template <int kRows, int kColumns>
FASTATTN_DEVICE void zero_rows(void* tile, int first_row) {
  constexpr int kChunks = kPanelRowBytes / 16;
#pragma unroll 1  // rare, and its callers have few registers
  for (int panel = 0; panel < kColumns / kPanelColumns; ++panel) {
    uint4* rows = reinterpret_cast<uint4*>(static_cast<unsigned char*>(tile) + panel * kRows * kPanelRowBytes);
#pragma unroll 1
    for (int chunk = first_row * kChunks + lane_index(); chunk < kRows * kChunks; chunk += kWarpThreads) {
      st_shared(&rows[chunk], make_uint4(0, 0, 0, 0));
    }
  }
}

// Waits until tiles have arrived at the producer's own mbarrier, zeroes their rows from `first_row` on and arrives at
// `full`. The whole producer warp calls it after issuing the load of these tiles.
template <int kRows, int kColumns, class... Tiles>
FASTATTN_DEVICE void zero_landed_rows(Mbarrier& landed, uint32_t& parity, Mbarrier& full, int first_row, bool issues,
                                      Tiles... tiles) {
  mbarrier_wait(&landed, parity);
  parity ^= 1;
  (zero_rows<kRows, kColumns>(tiles, first_row), ...);
  fence_proxy_async();
  warp_sync();
  if (issues) mbarrier_arrive(&full);
}

// The same descriptor, recomputed at each use: the compiler would otherwise keep one for each k-step of a product in
// registers around a loop.
FASTATTN_DEVICE uint64_t recomputed(uint64_t descriptor) {
#if !defined(FASTATTN_EMULATION)
  asm volatile("" : "+l"(descriptor));
#endif
  return descriptor;
}

// Starts acc = A B^T over kDepth columns: A is 64 rows, from `row` on, of a tile of kRowsA, B all rows of a tile of
// kRowsB.
template <class T, int kRowsA, int kRowsB, int kDepth, int Accumulators>
FASTATTN_DEVICE void multiply_transposed(float (&acc)[Accumulators], const void* a, int row, const void* b) {
  static_assert(2 * Accumulators == kRowsB);
  const uint64_t first_a = recomputed(wgmma_descriptor(static_cast<const unsigned char*>(a) + row * kPanelRowBytes));
  const uint64_t first_b = recomputed(wgmma_descriptor(b));
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    const uint32_t within = step % 4 * 32;
    wgmma<T>(acc, advance_descriptor(first_a, step / 4 * kRowsA * kPanelRowBytes + within),
             advance_descriptor(first_b, step / 4 * kRowsB * kPanelRowBytes + within), step > 0);
  }
}

// Reads 64 rows, from `row` on, of a tile of kRows as the A operands of products over its columns.
template <int kRows, int Steps>
FASTATTN_DEVICE void load_operand(uint32_t (&a)[Steps][4], const void* tile, int row) {
  const int thread = thread_index() % kWarpgroupThreads;
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = step * 16 + fragment_column(thread) + i / 2 * 8;
      const uint32_t offset = tile_offset<kRows>(row + fragment_row(thread) + i % 2 * 8, column);
      a[step][i] = ld_shared(reinterpret_cast<const uint32_t*>(static_cast<const unsigned char*>(tile) + offset));
    }
  }
}

// Starts acc = A B^T with A in registers: the product reads half as much shared memory.
template <class T, int kRowsB, int Accumulators, int Steps>
FASTATTN_DEVICE void multiply_transposed(float (&acc)[Accumulators], const uint32_t (&a)[Steps][4], const void* b) {
  static_assert(2 * Accumulators == kRowsB);
  const uint64_t first_b = recomputed(wgmma_descriptor(b));
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
    const uint32_t within = step % 4 * 32;
    wgmma<T>(acc, a[step], advance_descriptor(first_b, step / 4 * kRowsB * kPanelRowBytes + within), step > 0);
  }
}

// Starts acc += A B: A is 64 x kRowsB in registers, B a tile of kRowsB rows and 2 * Accumulators columns.
template <class T, int kRowsB, int Accumulators, int Steps>
FASTATTN_DEVICE void multiply_add(float (&acc)[Accumulators], const uint32_t (&a)[Steps][4], const void* b) {
  static_assert(16 * Steps == kRowsB);
  const uint64_t first_b = wgmma_descriptor(b, kRowsB * kPanelRowBytes);
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
    wgmma<T, Operand::kAcrossK>(acc, a[step], advance_descriptor(first_b, step * 16 * kPanelRowBytes), true);
  }
}

// Starts acc = A B: A is a tile of 64 rows and kDepth columns, B the columns from `column` on, a multiple of 64, of a
// tile of kDepth rows.
template <class T, int kRowsA, int kDepth, int Accumulators>
FASTATTN_DEVICE void multiply_columns(float (&acc)[Accumulators], const void* a, const void* b, int column) {
  static_assert(kRowsA == 64);
  constexpr uint32_t kPanelBytes = kDepth * kPanelRowBytes;
  const unsigned char* columns = static_cast<const unsigned char*>(b) + column / kPanelColumns * kPanelBytes;
  const uint64_t first_a = recomputed(wgmma_descriptor(a));
  const uint64_t first_b = recomputed(wgmma_descriptor(columns, kPanelBytes));
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    wgmma<T, Operand::kAlongK, Operand::kAcrossK>(
        acc, advance_descriptor(first_a, step / 4 * kRowsA * kPanelRowBytes + step % 4 * 32),
        advance_descriptor(first_b, step * 16 * kPanelRowBytes), step > 0);
  }
}

// Writes a warp's 16 rows of a 64 x N accumulator, rounded to T, to the rows of a tile of kRows from `row` on.
template <class T, int kRows, int Accumulators>
FASTATTN_DEVICE void store_fragment(void* tile, int row, const float (&acc)[Accumulators]) {
  uint32_t operand[Accumulators / 8][4];
  to_operand<T>(acc, operand);
  const int lane = recomputed(lane_index());
#pragma unroll
  for (int step = 0; step < Accumulators / 8; ++step) {
    const uint32_t offset = tile_offset<kRows>(row + lane % 16, step * 16 + lane / 16 * 8);
    stmatrix_x4(static_cast<unsigned char*>(tile) + offset, operand[step]);
  }
}

}  // namespace fastattn
