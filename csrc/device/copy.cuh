// Loads and stores: shared memory with hooks for the race checker, 16-byte accesses, cp.async and stmatrix.
#pragma once

#include "config.cuh"

namespace fastattn {

// Reads shared memory: this block's, or another's through map_shared. T has 2, 4, 8 or 16 bytes and that alignment.
template <class T>
FASTATTN_DEVICE T ld_shared(const T* source) {
#if defined(FASTATTN_EMULATION)
  emulator::track_shared_read(source, sizeof(T));
#endif
  return *source;
}

template <class T>
struct Identity {
  using Type = T;
};

// Writes shared memory, like ld_shared. T is deduced from the destination only.
template <class T>
FASTATTN_DEVICE void st_shared(T* destination, typename Identity<T>::Type value) {
#if defined(FASTATTN_EMULATION)
  emulator::track_shared_write(destination, sizeof(T));
#endif
  *destination = value;
}

// Loads 16 bytes of global memory that no thread writes while the kernel runs, without allocating a line in L1. The
// address is a multiple of 16.
FASTATTN_DEVICE uint4 ld_global_16(const void* source) {
#if defined(FASTATTN_EMULATION)
  return emulator::load_16(source);
#else
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source));
  return value;
#endif
}

// Stores 16 bytes to global memory without allocating a line in L1. The address is a multiple of 16.
FASTATTN_DEVICE void st_global_16(void* destination, uint4 value) {
#if defined(FASTATTN_EMULATION)
  emulator::store_16(destination, value);
#else
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(destination), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#endif
}

// Starts copying the first `bytes` of 16 bytes from global to shared memory; the others become zeros. Both addresses
// are multiples of 16.
FASTATTN_DEVICE void cp_async_16(void* destination, const void* source, int bytes = 16) {
#if defined(FASTATTN_EMULATION)
  emulator::cp_async_16(destination, source, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
               "r"(bytes)
               : "memory");
#endif
}

// Closes the group of this thread's cp_async_16 calls since the last commit.
FASTATTN_DEVICE void cp_async_commit() {
#if defined(FASTATTN_EMULATION)
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most Pending of this thread's groups are unfinished. Other threads see the bytes only after a barrier.
template <int Pending>
FASTATTN_DEVICE void cp_async_wait() {
#if defined(FASTATTN_EMULATION)
  emulator::cp_async_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Stores four 8x8 matrices of 16-bit values held in mma fragments: register i of lane l holds row l / 4, columns
// 2 (l % 4) and the next of matrix i; lane 8 i + r gives the address of row r of matrix i, a multiple of 16.
FASTATTN_DEVICE void stmatrix_x4(void* row, const uint32_t (&matrices)[4]) {
#if defined(FASTATTN_EMULATION)
  emulator::stmatrix(row, matrices, 4, false);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
#endif
}

// stmatrix_x4 with each matrix transposed: register i of lane l holds column l / 4, rows 2 (l % 4) and the next.
FASTATTN_DEVICE void stmatrix_x4_transposed(void* row, const uint32_t (&matrices)[4]) {
#if defined(FASTATTN_EMULATION)
  emulator::stmatrix(row, matrices, 4, true);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
#endif
}

// stmatrix_x4 with two matrices; lanes 0 .. 15 give the addresses.
FASTATTN_DEVICE void stmatrix_x2(void* row, const uint32_t (&matrices)[2]) {
#if defined(FASTATTN_EMULATION)
  emulator::stmatrix(row, matrices, 2, false);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)), "r"(matrices[0]),
               "r"(matrices[1])
               : "memory");
#endif
}

// stmatrix_x2 with each matrix transposed.
FASTATTN_DEVICE void stmatrix_x2_transposed(void* row, const uint32_t (&matrices)[2]) {
#if defined(FASTATTN_EMULATION)
  emulator::stmatrix(row, matrices, 2, true);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
               "r"(matrices[0]), "r"(matrices[1])
               : "memory");
#endif
}

}  // namespace fastattn
