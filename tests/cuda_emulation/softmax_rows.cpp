// Two parts of the row kernels called directly: a softmax of rows of any strides, and the division of row numbers.
#include "emulator_test.h"
#include "kernels/softmax_select.cuh"

using namespace fastattn;

// y, contiguous, = the softmax of x: rows (outer, mid, inner) of columns, with x's strides of the first two; inner rows
// follow one another.
extern "C" const char* run_softmax(const void* x, void* y, int64_t outer, int64_t mid, int64_t inner, int64_t columns,
                                   int64_t outer_stride, int64_t mid_stride, int64_t clusters, double scale) {
  return emulator::guarded([&] {
    SoftmaxForward params = {};
    params.x = x;
    params.y = y;
    params.sizes = RowSizes(outer, mid, inner, columns);
    params.x_strides = {outer_stride, mid_stride, columns};
    params.y_strides = {mid * inner * columns, inner * columns, columns};
    params.scale = static_cast<float>(scale);
    select_softmax_forward<half_t, half_t>(
        params, clusters != 0, [](auto kernel, const auto& arguments, const RowPlan& plan, int64_t rows) {
          const int64_t rows_here = rows_per_block(plan);
          const int64_t blocks = ceil_div(rows, rows_here) * plan.blocks();
          emulator::Launch launch{.grid = {static_cast<unsigned>(blocks), 1, 1},
                                  .threads = static_cast<int>(plan.block_threads() * rows_here),
                                  .shared_bytes = kRowSharedBytes,
                                  .cluster = plan.blocks()};
          emulator::launch(emulator::options, launch, kernel, arguments, plan);
          return 0;
        });
  });
}

// quotients[i] = numerators[i] / divisors[i], as kernels divide numbers up to largest[i].
extern "C" const char* run_quotients(const int64_t* numerators, const int64_t* divisors, const int64_t* largest,
                                     int64_t* quotients, int64_t count) {
  return emulator::guarded([&] {
    for (int64_t i = 0; i < count; ++i) {
      const Divisor by(divisors[i], largest[i]);
      quotients[i] = largest[i] <= INT32_MAX ? static_cast<int64_t>(quotient(static_cast<uint32_t>(numerators[i]), by))
                                             : static_cast<int64_t>(quotient(static_cast<uint64_t>(numerators[i]), by));
    }
  });
}

// The threads of a row, by a plan that the caller gives.
extern "C" const char* run_plan(int64_t lanes, int64_t warps, int64_t blocks, int64_t* threads) {
  return emulator::guarded([&] {
    const RowPlan plan(kAnyColumns, 16, static_cast<int>(lanes), static_cast<int>(warps), static_cast<int>(blocks));
    *threads = int64_t{1} << plan.threads_log2;
  });
}
