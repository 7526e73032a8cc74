// What kernels on rows share: who works on a row, its elements 16 bytes at a time, and sums over its threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "device/cluster.cuh"
#include "device/config.cuh"
#include "device/copy.cuh"
#include "device/math.cuh"
#include "device/sync.cuh"
#include "device/warp.cuh"
#include "params.h"
#include "row_plan.h"

namespace fastattn {

constexpr int kVectorBytes = 16;

// Shared memory of a row kernel: one float per warp, reduction and block of the cluster.
constexpr int kRowReductions = 3;
constexpr int kMaxRowBlocks = 8;
constexpr int kRowSharedBytes = kRowReductions * kMaxRowBlocks * kWarpThreads * static_cast<int>(sizeof(float));

// Elements worked on at a time: 16 bytes of the narrower of what is read and what is written.
template <class In, class Out = In>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(In) < sizeof(Out) ? sizeof(In) : sizeof(Out));

// Whether rows may belong to several blocks here.
#if defined(FASTATTN_EMULATION) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
constexpr bool kClusters = true;
#else
constexpr bool kClusters = false;
#endif

// Which row this thread works on, and its place among the row's threads.
struct RowThreads {
  int64_t row;
  int thread;   // 0 .. threads - 1, over all blocks of the row
  int threads;  // working on this row
  int lanes;    // of them in this warp
  int warps;    // of them in this block
  int blocks;
};

FASTATTN_DEVICE RowThreads row_threads(const RowPlan& plan) {
  const int in_block = plan.lanes * plan.warps;
  const int rows_here = block_threads() / in_block;
  RowThreads mine;
  mine.thread = thread_index() % in_block;
  mine.threads = in_block;
  mine.lanes = plan.lanes;
  mine.warps = plan.warps;
  mine.blocks = 1;
  if constexpr (kClusters) {
    if (plan.blocks > 1) {
      mine.thread += static_cast<int>(cluster_rank()) * in_block;
      mine.blocks = plan.blocks;
      mine.threads *= plan.blocks;
    }
  }
  const int64_t block = block_index().x / static_cast<uint32_t>(mine.blocks);
  mine.row = block * rows_here + thread_index() / in_block;
  return mine;
}

struct Sum {
  static FASTATTN_DEVICE float identity() { return 0.0f; }
  static FASTATTN_DEVICE float combine(float a, float b) { return a + b; }
};

struct Maximum {
  static FASTATTN_DEVICE float identity() { return negative_infinity(); }
  static FASTATTN_DEVICE float combine(float a, float b) { return maximum(a, b); }
};

template <class Operation>
FASTATTN_DEVICE float reduce_lanes(float value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = Operation::combine(value, shuffle_xor(value, distance));
  }
  return value;
}

// Before anything else: tells the other blocks of the row that this one has started, so that they may write to it.
FASTATTN_DEVICE void announce_block(const RowThreads& mine) {
  if constexpr (kClusters) {
    if (mine.blocks > 1) {
      cluster_arrive();
    }
  }
}

// A value combined over the threads of a row, in an order that depends on nothing but the plan. All threads of the
// block (and cluster) call it, with slot 0 first, and each slot once in a kernel: so one barrier is enough.
template <class Operation>
FASTATTN_DEVICE float reduce_row(float value, const RowThreads& mine, int slot) {
  value = reduce_lanes<Operation>(value, mine.lanes);
  if (mine.warps == 1 && mine.blocks == 1) {
    return value;
  }
  float* const shared = reinterpret_cast<float*>(dynamic_shared_memory()) + slot * kMaxRowBlocks * kWarpThreads;
  const int warp = thread_index() / kWarpThreads;
  const int lane = lane_index();
  if (mine.blocks == 1) {
    if (lane == 0) {
      st_shared(shared + warp, value);
    }
    block_sync();
    const int first = warp / mine.warps * mine.warps;
    value = lane < mine.warps ? ld_shared(shared + first + lane) : Operation::identity();
    return reduce_lanes<Operation>(value, kWarpThreads);
  }
  if constexpr (kClusters) {
    if (slot == 0) {
      cluster_wait();  // for announce_block
    }
    const int rank = static_cast<int>(cluster_rank());
    if (lane < mine.blocks) {  // lane b tells block b
      st_shared(map_shared(shared + rank * kWarpThreads + warp, lane), value);
    }
    cluster_sync();
    value = Operation::identity();
    for (int block = 0; block < mine.blocks; ++block) {
      if (lane < mine.warps) {
        value = Operation::combine(value, ld_shared(shared + block * kWarpThreads + lane));
      }
    }
    value = reduce_lanes<Operation>(value, kWarpThreads);
  }
  return value;
}

FASTATTN_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

FASTATTN_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The outer, mid and inner of a row.
struct RowPosition {
  int64_t outer;
  int64_t mid;
  int64_t inner;

  FASTATTN_DEVICE int64_t offset(const RowStrides& strides) const {
    return outer * strides.outer + mid * strides.mid + inner * strides.inner;
  }
};

FASTATTN_DEVICE int64_t row_count(const RowSizes& sizes) { return sizes.outer * sizes.mid * sizes.inner; }

// Division is by 32-bit numbers where they suffice.
FASTATTN_DEVICE RowPosition row_position(int64_t row, const RowSizes& sizes) {
  if (sizes.outer * sizes.mid == 1) {
    return {0, 0, row};
  }
  if (row_count(sizes) <= UINT32_MAX) {
    const uint32_t number = static_cast<uint32_t>(row);
    const uint32_t inner = static_cast<uint32_t>(sizes.inner);
    const uint32_t mid = static_cast<uint32_t>(sizes.mid);
    return {number / inner / mid, number / inner % mid, number % inner};
  }
  return {row / sizes.inner / sizes.mid, row / sizes.inner % sizes.mid, row % sizes.inner};
}

// How many elements a pointer lies behind a multiple of V elements. A row is cut into vectors at those multiples, so
// its first vector may begin before it and its last end after it.
template <int V, class T>
FASTATTN_DEVICE int misalignment(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % V);
}

// Whether the address `elements` before a pointer is a multiple of 16.
template <class T>
FASTATTN_DEVICE bool aligned_before(const T* pointer, int elements) {
  return (reinterpret_cast<uintptr_t>(pointer) - elements * sizeof(T)) % kVectorBytes == 0;
}

// Vectors that cover a row, the first beginning `shift` elements before it.
template <class Index>
FASTATTN_DEVICE Index vectors_of(Index columns, int shift, int width) {
  return (columns + shift + width - 1) / width;
}

// V elements of a row, packed into registers.
template <class T, int V>
struct Packed {
  static constexpr int kBytes = V * static_cast<int>(sizeof(T));
  static constexpr int kPieces = kBytes / kVectorBytes;  // that move at once
  static_assert(kBytes % kVectorBytes == 0 && (sizeof(T) == 2 || sizeof(T) == 4));
  uint32_t words[kBytes / 4];

  FASTATTN_DEVICE T get(int i) const {
    T value;
    if constexpr (sizeof(T) == 4) {
      memcpy(&value, &words[i], sizeof(T));
    } else {
      const uint16_t half = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
      memcpy(&value, &half, sizeof(T));
    }
    return value;
  }

  // Elements are set in order.
  FASTATTN_DEVICE void set(int i, T value) {
    if constexpr (sizeof(T) == 4) {
      memcpy(&words[i], &value, sizeof(T));
    } else {
      uint16_t half;
      memcpy(&half, &value, sizeof(T));
      words[i / 2] = i % 2 == 0 ? half : words[i / 2] | static_cast<uint32_t>(half) << 16;
    }
  }

  FASTATTN_DEVICE float value(int i) const { return to_float(get(i)); }
};

// Reads elements first .. first + V - 1 of a row of `columns`; what lies outside is `other`. `aligned`: that address is
// a multiple of 16. ReadOnly: nothing writes there while the kernel runs.
template <bool ReadOnly, int V, class T, class Index>
FASTATTN_DEVICE Packed<T, V> load_vector(const T* row, Index first, Index columns, bool aligned, float other) {
  Packed<T, V> packed;
  if (aligned && first >= 0 && first + V <= columns) {
#pragma unroll
    for (int piece = 0; piece < Packed<T, V>::kPieces; ++piece) {
      const void* const address = row + first + piece * kVector<T>;
      const uint4 four = ReadOnly ? ld_global_16(address) : *static_cast<const uint4*>(address);
      packed.words[4 * piece] = four.x;
      packed.words[4 * piece + 1] = four.y;
      packed.words[4 * piece + 2] = four.z;
      packed.words[4 * piece + 3] = four.w;
    }
    return packed;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const bool inside = first + i >= 0 && first + i < columns;
    packed.set(i, inside ? row[first + i] : from_float<T>(other));
  }
  return packed;
}

// Writes the elements that lie inside the row.
template <int V, class T, class Index>
FASTATTN_DEVICE void store_vector(T* row, Index first, Index columns, bool aligned, const float (&values)[V]) {
  Packed<T, V> packed;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    packed.set(i, from_float<T>(values[i]));
  }
  if (aligned && first >= 0 && first + V <= columns) {
#pragma unroll
    for (int piece = 0; piece < Packed<T, V>::kPieces; ++piece) {
      const uint32_t* const word = packed.words + 4 * piece;
      st_global_16(row + first + piece * kVector<T>, make_uint4(word[0], word[1], word[2], word[3]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (first + i >= 0 && first + i < columns) {
      row[first + i] = packed.get(i);
    }
  }
}

// exp(x) for x <= 0.
FASTATTN_DEVICE float exponential(float x) { return exp2_approx(x * kLog2E); }

// A maximum that can be subtracted: where nothing is kept, -inf - -inf would be NaN.
FASTATTN_DEVICE float finite_maximum(float x) { return x == negative_infinity() ? 0.0f : x; }

}  // namespace fastattn
