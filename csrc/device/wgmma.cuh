// Hopper tensor cores: D (64 x N) += A (64 x 16) B (16 x N) by a warpgroup, asynchronously.
//
// All 128 threads call each function together. The order is fence, multiplies, commit, wait; between a multiply and the
// wait that covers it, nothing may touch its accumulators, its A registers or the shared memory it reads.
//
// Accumulators: element e of thread t (t = thread_index() % 128) is row 16 (t / 32) + (t % 32) / 4 + 8 (e / 2 % 2),
// column 8 (e / 4) + 2 (t % 4) + e % 2. A in registers: register r holds the pair of columns 8 (r / 2) + 2 (t % 4) and
// the next in row 16 (t / 32) + (t % 32) / 4 + 8 (r % 2). So accumulators 8 k .. 8 k + 7 of one product, packed in
// pairs, are the A registers of k-step k of the next.
#pragma once

#include "config.cuh"
#if !defined(FASTATTN_EMULATION)
#include "wgmma_instructions.cuh"
#endif

namespace fastattn {

// The layout of a 16-bit operand in shared memory: always 64-element rows of 128 bytes under the 128-byte swizzle, in
// panels that begin at multiples of 1024: kAlongK has rows of 64 values of K, one row per row of A or column of B;
// kAcrossK has rows of 64 values of M or N, one row per value of K (the transposed operand).
enum class Operand { kAlongK, kAcrossK };

// The descriptor of an operand at `tile`. For kAlongK, `panel_bytes` is unused. For kAcrossK it is the distance between
// the panels of successive 64 values of M or N. Groups of eight rows follow each other at 1024 bytes.
FASTATTN_DEVICE uint64_t wgmma_descriptor(const void* tile, uint32_t panel_bytes = 16) {
  constexpr uint64_t kGroupOfEightRows = 1024;
  constexpr uint64_t kSwizzle128 = 1;
  const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
  return address | static_cast<uint64_t>((panel_bytes & 0x3ffff) >> 4) << 16 | (kGroupOfEightRows >> 4) << 32 |
         kSwizzle128 << 62;
}

// The descriptor moved by `bytes`, a multiple of 16. A step of 16 along K is 32 bytes for kAlongK (a next panel of 64
// after four), 2048 for kAcrossK.
FASTATTN_DEVICE uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Starts acc = A B + (accumulate ? acc : 0) with both operands in shared memory. T is half_t or bfloat16_t.
template <class T, Operand a_layout = Operand::kAlongK, Operand b_layout = Operand::kAlongK, int Accumulators>
FASTATTN_DEVICE void wgmma(float (&acc)[Accumulators], uint64_t a, uint64_t b, bool accumulate) {
  constexpr int N = 2 * Accumulators;
  static_assert(8 <= N && N <= 256 && N % 8 == 0, "N is a multiple of 8 in 8 .. 256");
#if defined(FASTATTN_EMULATION)
  emulator::wgmma<T>(acc, N, a, nullptr, b, accumulate, a_layout == Operand::kAcrossK, b_layout == Operand::kAcrossK);
#else
  Wgmma<T, N, a_layout == Operand::kAcrossK, b_layout == Operand::kAcrossK>::issue(acc, a, b, accumulate);
#endif
}

// The same with A in registers.
template <class T, Operand b_layout = Operand::kAlongK, int Accumulators>
FASTATTN_DEVICE void wgmma(float (&acc)[Accumulators], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  constexpr int N = 2 * Accumulators;
  static_assert(8 <= N && N <= 256 && N % 8 == 0, "N is a multiple of 8 in 8 .. 256");
#if defined(FASTATTN_EMULATION)
  emulator::wgmma<T>(acc, N, 0, a, b, accumulate, false, b_layout == Operand::kAcrossK);
#else
  Wgmma<T, N, false, b_layout == Operand::kAcrossK>::issue(acc, a, b, accumulate);
#endif
}

// Orders earlier register accesses before the multiplies that follow. Needed before the first multiply and whenever
// accumulators or A registers were touched since.
FASTATTN_DEVICE void wgmma_fence() {
#if defined(FASTATTN_EMULATION)
  emulator::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the group of the multiplies since the last commit.
FASTATTN_DEVICE void wgmma_commit() {
#if defined(FASTATTN_EMULATION)
  emulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most Pending groups, the last ones, are unfinished.
template <int Pending>
FASTATTN_DEVICE void wgmma_wait() {
  static_assert(0 <= Pending && Pending <= 7);
#if defined(FASTATTN_EMULATION)
  emulator::wgmma_wait(Pending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}

// Keeps the compiler from moving accesses to these registers across this point: beside wgmma_fence for what a multiply
// reads, beside wgmma_wait for what it wrote.
template <int Count>
FASTATTN_DEVICE void pin_registers(float (&registers)[Count]) {
#if !defined(FASTATTN_EMULATION)
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
#endif
}

template <int Steps>
FASTATTN_DEVICE void pin_registers(uint32_t (&operand)[Steps][4]) {
#if !defined(FASTATTN_EMULATION)
#pragma unroll
  for (int i = 0; i < 4 * Steps; ++i) asm volatile("" : "+r"(operand[i / 4][i % 4])::"memory");
#endif
}

// Returns the value with its origin hidden from the compiler: what is computed from it is computed at its use, not
// ahead of a loop that needs the registers.
FASTATTN_DEVICE int recomputed(int value) {
#if !defined(FASTATTN_EMULATION)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Byte offset of (row, column) of 16-bit elements within a panel of 64-element rows under the 128-byte swizzle; the
// panel begins at a multiple of 1024.
FASTATTN_HOST_DEVICE uint32_t swizzled_offset(uint32_t row, uint32_t column) {
  const uint32_t offset = row * 128 + column * 2;
  return offset ^ ((offset >> 7 & 7) << 4);
}

}  // namespace fastattn
