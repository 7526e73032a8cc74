// The layout of a wgmma accumulator over threads, reductions along its rows, and its conversion to an A operand.
//
// Of a 64 x N accumulator each thread of the warpgroup holds N / 2 elements, in two rows: element i is at row
// fragment_row(thread) + 8 * fragment_half(i), column fragment_column(thread) + fragment_offset(i). The four threads of
// a quad share their rows.
#pragma once

#include "math.cuh"
#include "warp.cuh"

namespace fastattn {

// The first of the two rows of `thread`, its index 0 .. 127 in the warpgroup.
FASTATTN_DEVICE int fragment_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// The column of a thread's element 0.
FASTATTN_DEVICE int fragment_column(int thread) { return thread % 4 * 2; }

// Whether element i is in the second of a thread's rows, 8 below the first.
FASTATTN_HOST_DEVICE constexpr int fragment_half(int i) { return i / 2 % 2; }

// How many columns element i is to the right of element 0.
FASTATTN_HOST_DEVICE constexpr int fragment_offset(int i) { return i / 4 * 8 + i % 2; }

// The largest value of a row, given each thread's own.
FASTATTN_DEVICE float quad_max(float value) {
  value = maximum(value, shuffle_xor(value, 1));
  return maximum(value, shuffle_xor(value, 2));
}

// The sum of a row, given each thread's own; bitwise the same in all four threads of the quad.
FASTATTN_DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// A 64 x N accumulator, rounded to T, as the A operands of N / 16 steps of wgmma.
template <class T, int N>
FASTATTN_DEVICE void to_operand(const float (&accumulator)[N], uint32_t (&operand)[N / 8][4]) {
  static_assert(N % 8 == 0, "a step takes 16 columns, 8 elements of each thread");
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    operand[i / 8][i / 2 % 4] = pack<T>(accumulator[i], accumulator[i + 1]);
  }
}

}  // namespace fastattn
