// One small kernel for each thing that is done to tiles in shared memory: products of a warpgroup, their descriptors,
// and boxes of a tensor map. Part of device_kernels.cpp.
#pragma once

#include "device/copy.cuh"
#include "device/mbarrier.cuh"
#include "device/sync.cuh"
#include "device/tensor_map.h"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "emulator/tensor_map.h"
#include "emulator_test.h"

namespace {

using namespace fastattn;

template <class T>
constexpr CUtensorMapDataType kMapType = std::is_same_v<T, half_t>       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                         : std::is_same_v<T, bfloat16_t> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;

// A contiguous tensor of `sizes`, fastest first.
template <class T, size_t Rank>
CUtensorMap contiguous_map(const void* data, std::array<uint64_t, Rank> sizes, std::array<uint32_t, Rank> box,
                           CUtensorMapSwizzle swizzle) {
  std::array<uint64_t, Rank - 1> strides;
  uint64_t bytes = sizeof(T);
  for (size_t i = 0; i + 1 < Rank; ++i) strides[i] = bytes *= sizes[i];
  CUtensorMap map;
  const CUresult result =
      encode_tensor_map<Rank>(emulator::encode_tiled, &map, kMapType<T>, data, sizes, strides, box, swizzle);
  if (result != CUDA_SUCCESS) throw std::runtime_error("encode_tiled refuses");
  return map;
}

constexpr int kDepth = 128;  // values of K in the products

// out (64 x N) = A B, A being 64 x kDepth and B kDepth x N. An operand along K is stored as (64 or N, kDepth), one
// across K as (kDepth, 64 or N); panels of 64 of its fastest dimension follow each other in shared memory.
template <class T, int N, Operand a_layout, Operand b_layout, bool a_in_registers>
FASTATTN_KERNEL void product(FASTATTN_GRID_CONSTANT const CUtensorMap a, FASTATTN_GRID_CONSTANT const CUtensorMap b,
                             const T* a_rows, float* out) {
  constexpr bool a_along = a_layout == Operand::kAlongK, b_along = b_layout == Operand::kAlongK;
  constexpr int a_panel = (a_along ? 64 : kDepth) * 128;
  constexpr int a_panels = a_along ? kDepth / 64 : 1;
  constexpr int b_panel = (b_along ? N : kDepth) * 128;
  constexpr int b_panels = b_along ? kDepth / 64 : (N + 63) / 64;
  unsigned char* a_tile = align_shared<1024>(dynamic_shared_memory());
  unsigned char* b_tile = a_tile + a_panel * a_panels;
  auto* full = reinterpret_cast<Mbarrier*>(b_tile + b_panel * b_panels);
  const int thread = thread_index();
  if (thread == 0) {
    mbarrier_init(full, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(full, a_panel * a_panels + b_panel * b_panels);
    for (int i = 0; i < a_panels; ++i) tma_load_2d(a_tile + i * a_panel, &a, full, 64 * i, 0);
    for (int i = 0; i < b_panels; ++i) tma_load_2d(b_tile + i * b_panel, &b, full, 64 * i, 0);
  }
  block_sync();
  mbarrier_wait(full, 0);

  float acc[N / 2];
  uint32_t a_registers[kDepth / 16][4];
  if (a_in_registers) {
    for (int step = 0; step < kDepth / 16; ++step) {
      for (int r = 0; r < 4; ++r) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8;
        memcpy(&a_registers[step][r], a_rows + row * kDepth + 16 * step + r / 2 * 8 + thread % 4 * 2, 4);
      }
    }
  }
  const uint64_t a_descriptor = wgmma_descriptor(a_tile, a_panel);
  const uint64_t b_descriptor = wgmma_descriptor(b_tile, b_panel);
  wgmma_fence();
  for (int step = 0; step < kDepth / 16; ++step) {
    const uint64_t a_step =
        advance_descriptor(a_descriptor, a_along ? step / 4 * a_panel + step % 4 * 32 : step * 2048);
    const uint64_t b_step =
        advance_descriptor(b_descriptor, b_along ? step / 4 * b_panel + step % 4 * 32 : step * 2048);
    if constexpr (a_in_registers) {
      wgmma<T, b_layout>(acc, a_registers[step], b_step, step > 0);
    } else {
      wgmma<T, a_layout, b_layout>(acc, a_step, b_step, step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int e = 0; e < N / 2; ++e) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8;
    out[row * N + e / 4 * 8 + thread % 4 * 2 + e % 2] = acc[e];
  }
}

template <class T, int N, Operand a_layout, Operand b_layout, bool a_in_registers>
void launch_product(const void* a, const void* b, const void* a_rows, void* out) {
  constexpr bool a_along = a_layout == Operand::kAlongK, b_along = b_layout == Operand::kAlongK;
  const CUtensorMap a_map = contiguous_map<T, 2>(a, {a_along ? kDepth : 64, a_along ? 64 : kDepth},
                                                 {64, a_along ? 64 : kDepth}, CU_TENSOR_MAP_SWIZZLE_128B);
  const CUtensorMap b_map = contiguous_map<T, 2>(b, {b_along ? kDepth : N, b_along ? N : kDepth},
                                                 {64, b_along ? N : kDepth}, CU_TENSOR_MAP_SWIZZLE_128B);
  const emulator::Launch launch{.threads = 128, .shared_bytes = 160 * 1024, .max_shared_bytes = 160 * 1024};
  emulator::launch(emulator::options, launch, product<T, N, a_layout, b_layout, a_in_registers>, a_map, b_map,
                   static_cast<const T*>(a_rows), static_cast<float*>(out));
}

template <class T, int N>
void launch_product(bool a_across, bool b_across, bool a_in_registers, const void* a, const void* b, const void* a_rows,
                    void* out) {
  constexpr Operand kAlong = Operand::kAlongK, kAcross = Operand::kAcrossK;
  if (a_in_registers) {
    (b_across ? launch_product<T, N, kAlong, kAcross, true> : launch_product<T, N, kAlong, kAlong, true>)(a, b, a_rows,
                                                                                                          out);
  } else if (a_across) {
    (b_across ? launch_product<T, N, kAcross, kAcross, false>
              : launch_product<T, N, kAcross, kAlong, false>)(a, b, a_rows, out);
  } else {
    (b_across ? launch_product<T, N, kAlong, kAcross, false>
              : launch_product<T, N, kAlong, kAlong, false>)(a, b, a_rows, out);
  }
}

// Copies the box at (c0 .. c4) of `in` to shared memory, then to `image` as it lies there, and by TMA to
// the same coordinates of `out`.
FASTATTN_KERNEL void move_box(FASTATTN_GRID_CONSTANT const CUtensorMap in, FASTATTN_GRID_CONSTANT const CUtensorMap out,
                              int rank, const int* c, int bytes, uint32_t* image, bool add) {
  unsigned char* box = align_shared<1024>(dynamic_shared_memory());
  auto* full = reinterpret_cast<Mbarrier*>(box + bytes);
  if (thread_index() == 0) {
    mbarrier_init(full, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(full, bytes);
    if (rank == 2) tma_load_2d(box, &in, full, c[0], c[1]);
    if (rank == 3) tma_load_3d(box, &in, full, c[0], c[1], c[2]);
    if (rank == 4) tma_load_4d(box, &in, full, c[0], c[1], c[2], c[3]);
    if (rank == 5) tma_load_5d(box, &in, full, c[0], c[1], c[2], c[3], c[4]);
  }
  block_sync();
  while (!mbarrier_try_wait(full, 0)) {
  }
  for (int i = thread_index(); i < bytes / 4; i += block_threads()) {
    image[i] = ld_shared(reinterpret_cast<uint32_t*>(box) + i);
  }
  if (thread_index() != 0) return;
  if (rank == 2) (add ? tma_reduce_add_2d : tma_store_2d)(&out, box, c[0], c[1]);
  if (rank == 3) (add ? tma_reduce_add_3d : tma_store_3d)(&out, box, c[0], c[1], c[2]);
  if (rank == 4) (add ? tma_reduce_add_4d : tma_store_4d)(&out, box, c[0], c[1], c[2], c[3]);
  if (rank == 5) (add ? tma_reduce_add_5d : tma_store_5d)(&out, box, c[0], c[1], c[2], c[3], c[4]);
  bulk_commit();
  bulk_wait_read<0>();
}

template <size_t Rank>
void launch_move_box(const void* in, void* out, const int64_t* sizes, const int64_t* box, const int* at,
                     CUtensorMapSwizzle swizzle, void* image, bool add) {
  std::array<uint64_t, Rank> map_sizes;
  std::array<uint32_t, Rank> map_box;
  int bytes = 4;
  for (size_t i = 0; i < Rank; ++i) {
    map_sizes[i] = sizes[i];
    map_box[i] = box[i];
    bytes *= box[i];
  }
  const emulator::Launch launch{.threads = 64, .shared_bytes = size_t(bytes) + 1024 + 8};
  emulator::launch(emulator::options, launch, move_box, contiguous_map<float, Rank>(in, map_sizes, map_box, swizzle),
                   contiguous_map<float, Rank>(out, map_sizes, map_box, swizzle), int(Rank), at, bytes,
                   static_cast<uint32_t*>(image), add);
}

// The descriptors of a tile at a multiple of 1024, less its address: along K and across it, and their second k-steps.
FASTATTN_KERNEL void describe(uint64_t* out) {
  unsigned char* tile = align_shared<1024>(dynamic_shared_memory());
  if (thread_index() > 0) return;
  const uint64_t address = shared_address(tile) >> 4;
  out[0] = wgmma_descriptor(tile) - address;
  out[1] = wgmma_descriptor(tile, 8192) - address;
  out[2] = advance_descriptor(wgmma_descriptor(tile), 32) - address;
  out[3] = advance_descriptor(wgmma_descriptor(tile, 8192), 2048) - address;
}

}  // namespace

extern "C" const char* run_describe(uint64_t* out) {
  return emulator::guarded(
      [&] { emulator::launch(emulator::options, emulator::Launch{.shared_bytes = 2048}, describe, out); });
}

extern "C" const char* run_product(int64_t bfloat16, int64_t n, int64_t a_across, int64_t b_across,
                                   int64_t a_in_registers, const void* a, const void* b, const void* a_rows,
                                   void* out) {
  return emulator::guarded([&] {
    const auto launch = [&]<int N>() {
      if (bfloat16) {
        launch_product<bfloat16_t, N>(a_across, b_across, a_in_registers, a, b, a_rows, out);
      } else {
        launch_product<half_t, N>(a_across, b_across, a_in_registers, a, b, a_rows, out);
      }
    };
    if (n == 8) return launch.template operator()<8>();
    if (n == 80) return launch.template operator()<80>();
    if (n == 128) return launch.template operator()<128>();
    if (n == 256) return launch.template operator()<256>();
    throw std::runtime_error("this N is not instantiated");
  });
}

extern "C" const char* run_move_box(int64_t rank, const void* in, void* out, const int64_t* sizes, const int64_t* box,
                                    const int* at, int64_t swizzle, void* image, int64_t add) {
  return emulator::guarded([&] {
    const auto mode = static_cast<CUtensorMapSwizzle>(swizzle);
    if (rank == 2) launch_move_box<2>(in, out, sizes, box, at, mode, image, add);
    if (rank == 3) launch_move_box<3>(in, out, sizes, box, at, mode, image, add);
    if (rank == 4) launch_move_box<4>(in, out, sizes, box, at, mode, image, add);
    if (rank == 5) launch_move_box<5>(in, out, sizes, box, at, mode, image, add);
  });
}
