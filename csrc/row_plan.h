// How rows are distributed over threads: by a table, from the length of a row.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace fastattn {

// log2 of a power of two. Any other argument is not a constant expression, so no table can contain it; at run time it
// throws.
constexpr int exact_log2(int value) {
  int log2 = 0;
  while (log2 < 30 && (1 << log2) < value) {
    ++log2;
  }
  if (1 << log2 != value) {
    throw std::invalid_argument("a row's lanes, warps and blocks have to be powers of two");
  }
  return log2;
}

// One row belongs to some lanes of some warps of some blocks, and each thread holds `elements` of it in registers. A
// row that is not held is read twice, in steps. Kernels receive only the logarithms: they divide by shifts.
struct RowPlan {
  int64_t max_columns;
  int elements;     // a thread holds; 0: the row is not held
  int lanes_log2;   // 1 .. 32 lanes; below 32, neighbouring rows share a warp
  int warps_log2;   // 1 .. 32 warps
  int blocks_log2;  // over 1 block: a cluster, from compute capability 9.0 on
  int threads_log2;

  constexpr RowPlan(int64_t max_columns, int elements, int lanes, int warps, int blocks)
      : max_columns(max_columns),
        elements(elements),
        lanes_log2(exact_log2(lanes)),
        warps_log2(exact_log2(warps)),
        blocks_log2(exact_log2(blocks)),
        threads_log2(lanes_log2 + warps_log2 + blocks_log2) {}

  constexpr int lanes() const { return 1 << lanes_log2; }
  constexpr int warps() const { return 1 << warps_log2; }
  constexpr int blocks() const { return 1 << blocks_log2; }
  constexpr int block_threads() const { return lanes() * warps(); }  // that work on one row
};

constexpr int kRowThreads = 128;  // of a block whose rows need no more
constexpr int kMaxRowThreads = 1024;
constexpr int kMaxRowBlocks = 8;      // of a cluster: the most that every device with clusters runs
constexpr int kLongRowThreads = 512;  // of a row that is not held: more would spill
constexpr int kWarpElements = 8;      // held by a thread of a row within a warp
constexpr int64_t kAnyColumns = INT64_MAX;

// For a 16-bit input of which a thread holds up to 32 elements; more, or as many floats, would spill at 1024 threads.
// With 64 registers a thread, a multiprocessor takes two blocks of 512 threads and one of 1024. Two are better: one
// loads or stores while the other waits for its sums. So long rows take clusters of blocks of 512 threads, until a
// cluster has no more blocks; the row of 1024 threads is for devices without clusters.
constexpr RowPlan kNarrowPlans[] = {
    {8, 8, 1, 1, 1},         {16, 8, 2, 1, 1},        {32, 8, 4, 1, 1},
    {64, 8, 8, 1, 1},        {128, 8, 16, 1, 1},      {256, 8, 32, 1, 1},
    {512, 16, 32, 1, 1},     {1024, 16, 32, 2, 1},    {2048, 16, 32, 4, 1},
    {4096, 16, 32, 8, 1},    {8192, 16, 32, 16, 1},   {16384, 32, 32, 16, 1},
    {32768, 32, 32, 16, 2},  {32768, 32, 32, 32, 1},  {65536, 32, 32, 16, 4},
    {131072, 32, 32, 16, 8}, {262144, 32, 32, 32, 8}, {kAnyColumns, 0, 32, 16, 1},
};

// For floats, and for the backward, which holds the values of two tensors.
constexpr RowPlan kWidePlans[] = {
    {8, 8, 1, 1, 1},
    {16, 8, 2, 1, 1},
    {32, 8, 4, 1, 1},
    {64, 8, 8, 1, 1},
    {128, 8, 16, 1, 1},
    {256, 8, 32, 1, 1},
    {512, 16, 32, 1, 1},
    {1024, 16, 32, 2, 1},
    {2048, 16, 32, 4, 1},
    {4096, 16, 32, 8, 1},
    {8192, 16, 32, 16, 1},
    {16384, 16, 32, 16, 2},
    {16384, 16, 32, 32, 1},
    {32768, 16, 32, 16, 4},
    {65536, 16, 32, 16, 8},
    {131072, 16, 32, 32, 8},
    {kAnyColumns, 0, 32, 16, 1},
};

// Losses: a row is read in steps, by more threads the longer it is.
constexpr RowPlan kLossPlans[] = {
    {256, 0, 32, 1, 1},
    {1024, 0, 32, 4, 1},
    {kAnyColumns, 0, 32, 16, 1},
};

// What kernels rely on besides powers of two: a row within a warp is held kWarpElements to a thread and no other is,
// all other rows have whole warps, and rows that are held fit their threads.
template <int Rows>
constexpr bool fits_kernels(const RowPlan (&plans)[Rows]) {
  for (const RowPlan& plan : plans) {
    const bool within_warp = plan.elements == kWarpElements;
    const int64_t held = int64_t{plan.elements} << plan.threads_log2;
    if ((within_warp ? plan.warps() * plan.blocks() != 1 : plan.lanes() != 32) || plan.lanes() > 32 ||
        plan.block_threads() > (plan.elements == 0 ? kLongRowThreads : kMaxRowThreads) ||
        plan.blocks() > kMaxRowBlocks || (plan.elements != 0 && plan.max_columns > held)) {
      return false;
    }
  }
  return plans[Rows - 1].max_columns == kAnyColumns && plans[Rows - 1].blocks() == 1;
}
static_assert(fits_kernels(kNarrowPlans) && fits_kernels(kWidePlans) && fits_kernels(kLossPlans));

// The table of a softmax's forward, whose input has elements of so many bytes.
template <int Bytes>
constexpr auto& forward_plans() {
  if constexpr (Bytes == 2) {
    return kNarrowPlans;
  } else {
    return kWidePlans;
  }
}

// The first row of a table that takes `columns` (counting what alignment adds), without clusters where there are none.
template <int Rows>
constexpr RowPlan plan_for(const RowPlan (&plans)[Rows], int64_t columns, bool clusters) {
  for (const RowPlan& plan : plans) {
    if (columns <= plan.max_columns && (clusters || plan.blocks_log2 == 0)) {
      return plan;
    }
  }
  return plans[Rows - 1];
}

// Rows a block takes.
constexpr int rows_per_block(const RowPlan& plan) {
  return plan.block_threads() < kRowThreads ? kRowThreads / plan.block_threads() : 1;
}

}  // namespace fastattn
