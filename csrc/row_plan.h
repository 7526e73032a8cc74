// How rows are shared out among threads: by a table, from the length of a row.
#pragma once

#include <cstdint>

namespace fastattn {

// One row belongs to `lanes` lanes of `warps` warps of `blocks` blocks, each thread holding `elements` of it; a row
// that is not held is read twice, in steps.
struct RowPlan {
  int64_t max_columns;
  int elements;  // a thread holds; 0: the row is not held
  int lanes;     // 1 .. 32, a power of two; below 32, neighbouring rows share a warp
  int warps;     // 1 .. 32
  int blocks;    // over 1: a cluster, from compute capability 9.0 on
};

constexpr int kRowThreads = 128;  // of a block whose rows need no more
constexpr int kMaxRowThreads = 1024;
constexpr int kLongRowThreads = 512;  // of a row that is not held: more would spill
constexpr int64_t kAnyColumns = INT64_MAX;

// For a 16-bit input of which a thread holds up to 32 elements; more, or as many floats, would spill at 1024 threads.
constexpr RowPlan kNarrowPlans[] = {
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
    {16384, 32, 32, 16, 1},
    {32768, 32, 32, 32, 1},
    {65536, 32, 32, 32, 2},
    {131072, 32, 32, 32, 4},
    {262144, 32, 32, 32, 8},
    {kAnyColumns, 0, 32, 16, 1},
};

// For floats, and for the backward, which holds the values of two tensors.
constexpr RowPlan kWidePlans[] = {
    {8, 8, 1, 1, 1},        {16, 8, 2, 1, 1},       {32, 8, 4, 1, 1},        {64, 8, 8, 1, 1},
    {128, 8, 16, 1, 1},     {256, 8, 32, 1, 1},     {512, 16, 32, 1, 1},     {1024, 16, 32, 2, 1},
    {2048, 16, 32, 4, 1},   {4096, 16, 32, 8, 1},   {8192, 16, 32, 16, 1},   {16384, 16, 32, 32, 1},
    {32768, 16, 32, 32, 2}, {65536, 16, 32, 32, 4}, {131072, 16, 32, 32, 8}, {kAnyColumns, 0, 32, 16, 1},
};

// Losses: a row is read in steps, by more threads the longer it is.
constexpr RowPlan kLossPlans[] = {
    {256, 0, 32, 1, 1},
    {1024, 0, 32, 4, 1},
    {kAnyColumns, 0, 32, 16, 1},
};

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
    if (columns <= plan.max_columns && (clusters || plan.blocks == 1)) {
      return plan;
    }
  }
  return plans[Rows - 1];
}

// Rows a block takes.
constexpr int rows_per_block(const RowPlan& plan) {
  const int threads = plan.lanes * plan.warps;
  return threads < kRowThreads ? kRowThreads / threads : 1;
}

}  // namespace fastattn
