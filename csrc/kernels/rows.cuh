// What kernels on rows share: who works on a row, its elements 16 bytes at a time, and sums over its threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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
constexpr int kRowSharedBytes = kRowReductions * kMaxRowBlocks * kWarpThreads * static_cast<int>(sizeof(float));

// The elements of one vector: 16 bytes of the narrower of what is read and what is written.
template <class In, class Out = In>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(In) < sizeof(Out) ? sizeof(In) : sizeof(Out));

// Whether rows may belong to several blocks here.
#if defined(FASTATTN_EMULATION) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
constexpr bool kClusters = true;
#else
constexpr bool kClusters = false;
#endif

// Blocks of `threads` that are to fit a multiprocessor: for short rows many resident blocks hide latency. Blocks of up
// to 1024 threads get 64 registers per thread, so that two of 512 fit.
template <int Threads>
constexpr int kRowBlocks = Threads == kRowThreads ? 12 : 1;

// Whether a held row fits in a warp; exactly these rows are processed by blocks of kRowThreads.
template <int Elements>
constexpr bool kWithinWarp = Elements == kWarpElements;

// Which row this thread works on, and its place among the row's threads.
struct RowThreads {
  int64_t row;
  int thread;        // 0 .. threads - 1, over all blocks of the row
  int threads_log2;  // working on this row
  int lanes_log2;    // of them in this warp
  int warps_log2;    // of them in this block
  int blocks_log2;

  FASTATTN_DEVICE int threads() const { return 1 << threads_log2; }
};

// A block takes rows_per_block rows, a cluster one: threads are numbered through the grid, and a row's are neighbours.
FASTATTN_DEVICE RowThreads row_threads(const RowPlan& plan, uint64_t block) {
  const uint64_t number = block * static_cast<uint32_t>(block_threads()) + static_cast<uint32_t>(thread_index());
  const int in_row = static_cast<int>(number) & ((1 << plan.threads_log2) - 1);
  return {static_cast<int64_t>(number >> plan.threads_log2),
          in_row,
          plan.threads_log2,
          plan.lanes_log2,
          plan.warps_log2,
          plan.blocks_log2};
}

FASTATTN_DEVICE RowThreads row_threads(const RowPlan& plan) { return row_threads(plan, block_index().x); }

struct Sum {
  static constexpr bool kIdempotent = false;
  static FASTATTN_DEVICE float identity() { return 0.0f; }
  static FASTATTN_DEVICE float combine(float a, float b) { return a + b; }
};

struct Maximum {
  static constexpr bool kIdempotent = true;
  static FASTATTN_DEVICE float identity() { return negative_infinity(); }
  static FASTATTN_DEVICE float combine(float a, float b) { return maximum(a, b); }
};

// The value combined over 2^lanes_log2 neighbouring lanes.
template <class Operation>
FASTATTN_DEVICE float reduce_lanes(float value, int lanes_log2) {
#pragma unroll
  for (int log2 = 4; log2 >= 0; --log2) {
    if constexpr (Operation::kIdempotent) {  // past the row's end, with itself
      value = Operation::combine(value, shuffle_xor(value, (1 << log2) & ((1 << lanes_log2) - 1)));
    } else {
      const float other = shuffle_xor(value, 1 << log2);
      value = log2 < lanes_log2 ? Operation::combine(value, other) : value;
    }
  }
  return value;
}

template <class Operation>
FASTATTN_DEVICE float reduce_warp(float value) {
  return reduce_lanes<Operation>(value, 5);
}

// Called first: announces to the other blocks of the cluster that this one runs, so that they may write to its shared
// memory.
template <bool WithinWarp = false>
FASTATTN_DEVICE void announce_block(const RowThreads& mine) {
  if constexpr (kClusters && !WithinWarp) {
    if (mine.blocks_log2 > 0) {
      cluster_arrive();
    }
  }
}

// The value combined over the threads of a row, in an order that depends on the plan only. All threads of the block
// (and cluster) call it, with slot 0 first and each slot once in a kernel, so that one barrier suffices. WithinWarp:
// all rows lie within a warp; otherwise all have whole warps.
template <class Operation, bool WithinWarp = false>
FASTATTN_DEVICE float reduce_row(float value, const RowThreads& mine, int slot) {
  if constexpr (WithinWarp) {
    return reduce_lanes<Operation>(value, mine.lanes_log2);
  }
  value = reduce_warp<Operation>(value);
  if (mine.warps_log2 + mine.blocks_log2 == 0) {
    return value;
  }
  float* const shared = reinterpret_cast<float*>(dynamic_shared_memory()) + slot * kMaxRowBlocks * kWarpThreads;
  const int warp = static_cast<int>(static_cast<unsigned>(thread_index()) / kWarpThreads);
  const int lane = lane_index();
  const int warps = 1 << mine.warps_log2;
  if (mine.blocks_log2 == 0) {
    if (lane == 0) {
      st_shared(shared + warp, value);
    }
    block_sync();
    const int first = warp & -warps;
    value = lane < warps ? ld_shared(shared + first + lane) : Operation::identity();
    return reduce_warp<Operation>(value);
  }
  if constexpr (kClusters) {
    if (slot == 0) {
      cluster_wait();  // for announce_block
    }
    const int blocks = 1 << mine.blocks_log2;
    const int rank = static_cast<int>(cluster_rank());
    if (lane < blocks) {  // lane b tells block b
      st_shared(map_shared(shared + rank * kWarpThreads + warp, lane), value);
    }
    cluster_sync();
    value = Operation::identity();
    for (int block = 0; block < blocks; ++block) {
      if (lane < warps) {
        value = Operation::combine(value, ld_shared(shared + block * kWarpThreads + lane));
      }
    }
    value = reduce_warp<Operation>(value);
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
};

// 0 <= numerator <= what the divisor was made for, of 31 bits.
FASTATTN_DEVICE uint32_t quotient(uint32_t numerator, const Divisor& by) {
  const uint64_t product = static_cast<uint64_t>(2 * numerator) * static_cast<uint32_t>(by.multiplier);
  return static_cast<uint32_t>(product >> 32) >> by.shift;
}

// The same with 63 bits.
FASTATTN_DEVICE uint64_t quotient(uint64_t numerator, const Divisor& by) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(2 * numerator) * by.multiplier >> 64) >> by.shift;
}

template <class Number>
FASTATTN_DEVICE RowPosition divided_position(Number row, const RowSizes& sizes) {
  const Number slice = quotient(row, sizes.by_inner);
  const Number outer = quotient(slice, sizes.by_mid);
  return {static_cast<int64_t>(outer), static_cast<int64_t>(slice - outer * static_cast<Number>(sizes.mid)),
          static_cast<int64_t>(row - slice * static_cast<Number>(sizes.inner))};
}

// Sets the offset of a row's first element in each tensor and returns the row's inner index. Both are meaningless for a
// row that does not exist.
template <int Count>
FASTATTN_DEVICE int64_t row_offsets(int64_t row, const RowSizes& sizes, const RowStrides* const (&strides)[Count],
                                    int64_t (&offsets)[Count]) {
  if (sizes.numbers == RowNumbers::kInnerAlone) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      offsets[i] = row * strides[i]->inner;
    }
    return row;
  }
  const RowPosition position = sizes.numbers == RowNumbers::k31Bits
                                   ? divided_position(static_cast<uint32_t>(row), sizes)
                                   : divided_position(static_cast<uint64_t>(row), sizes);
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    offsets[i] =
        position.outer * strides[i]->outer + position.mid * strides[i]->mid + position.inner * strides[i]->inner;
  }
  return position.inner;
}

// The number of elements from the previous multiple of V elements to a pointer. A row is cut into vectors at those
// multiples, so its first vector may begin before it and its last end after it.
template <int V, class T>
FASTATTN_DEVICE int misalignment(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T)) & (V - 1);
}

// Whether the address `elements` before a pointer is a multiple of 16.
template <class T>
FASTATTN_DEVICE bool aligned_before(const T* pointer, int elements) {
  return (reinterpret_cast<uintptr_t>(pointer) - elements * sizeof(T)) % kVectorBytes == 0;
}

// Vectors that cover a row, the first beginning `shift` elements before it.
template <class Index>
FASTATTN_DEVICE Index vectors_of(Index columns, int shift, int width) {
  return ceil_div(columns + shift, width);
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

  FASTATTN_DEVICE float value(int i) const {
    if constexpr (std::is_same_v<T, bfloat16_t>) {  // the upper half of a float
      const uint32_t bits = i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u;
      float value;
      memcpy(&value, &bits, sizeof(value));
      return value;
    } else {
      return to_float(get(i));
    }
  }
};

// Reads elements first .. first + V - 1 of a row of `columns`; elements outside are `other`. `aligned`: that address is
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
    if constexpr (sizeof(T) == 4) {
      packed.set(i, values[i]);
    } else if (i % 2 == 0) {
      packed.words[i / 2] = pack<T>(values[i], values[i + 1]);
    }
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

// The maximum to subtract: 0 where no element is kept, as -inf - -inf would be NaN.
FASTATTN_DEVICE float finite_maximum(float x) { return x == negative_infinity() ? 0.0f : x; }

FASTATTN_DEVICE float not_a_number() { return negative_infinity() - negative_infinity(); }

}  // namespace fastattn
