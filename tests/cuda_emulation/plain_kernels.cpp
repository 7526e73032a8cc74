// Small kernels of ordinary code: block and warp reductions over shared memory.
#include "device/copy.cuh"
#include "device/math.cuh"
#include "device/sync.cuh"
#include "device/warp.cuh"
#include "emulator_test.h"

using namespace fastattn;

// The mistakes that run_row_sum can make.
enum Mistake { kNone, kWithoutSync, kDivergentSync, kDivergentShuffle };

// y[row] = sum of x[row, :columns]. One block per row.
FASTATTN_KERNEL void row_sum(const float* x, float* y, int columns, Mistake mistake) {
  auto* partial = reinterpret_cast<float*>(dynamic_shared_memory());
  float sum = 0;
  for (int i = thread_index(); i < columns; i += block_threads()) sum += x[block_index().x * columns + i];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  if (lane_index() == 0) st_shared(&partial[thread_index() / 32], sum);
  if (mistake != kWithoutSync) block_sync();
  if (thread_index() == 0) {
    float total = 0;
    for (int i = 0; i < block_threads() / 32; ++i) total += ld_shared(&partial[i]);
    y[block_index().x] = total;
  }
  if (mistake == kDivergentSync && thread_index() < 32) block_sync();
  if (mistake == kDivergentShuffle) {
    if (lane_index() < 16) {
      y[0] += shuffle_xor(sum, 1);
    } else {
      y[0] += shuffle_down(sum, 1);
    }
  }
}

extern "C" const char* run_row_sum(const float* x, float* y, int64_t rows, int64_t columns, int64_t threads,
                                   int64_t mistake) {
  return emulator::guarded([&] {
    const emulator::Launch launch{
        .grid = {unsigned(rows), 1, 1}, .threads = int(threads), .shared_bytes = sizeof(float) * 32};
    emulator::launch(emulator::options, launch, row_sum, x, y, int(columns), Mistake(mistake));
  });
}
