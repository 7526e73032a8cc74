// Host side of TMA: describes a tensor and the box that one copy moves.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>
#include <memory>

namespace fastattn {

// cuTensorMapEncodeTiled of the driver, or the stand-in of the emulation. A pointer, so that nothing links libcuda.
using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);

// The arguments of an encoding: two equal descriptions have equal maps.
struct TensorMapDescription {
  std::array<uint64_t, 19> words = {};

  bool operator==(const TensorMapDescription& other) const { return words == other.words; }

  uint64_t hash() const {
    uint64_t state = 0;
    for (const uint64_t word : words) {
      state = (state ^ word) * 0x9e3779b97f4a7c15;
      state ^= state >> 29;
    }
    return state;
  }
};

// A direct-mapped cache, by the description's hash, of the tensor maps a thread encoded last: models reuse the same
// tensors, and the driver's encoding costs more than a lookup.
class TensorMapCache {
 public:
  static constexpr int kPlaces = 256;

  // Sets `map`, by encode(map) on a cache miss; returns the result of encode.
  template <class Encode>
  CUresult find(const TensorMapDescription& description, CUtensorMap* map, Encode encode) {
    Place& place = (*places_)[description.hash() % kPlaces];
    if (place.used && place.description == description) {
      *map = place.map;
      return CUDA_SUCCESS;
    }
    const CUresult result = encode(map);
    if (result == CUDA_SUCCESS) place = {true, description, *map};
    return result;
  }

 private:
  struct Place {
    bool used = false;
    TensorMapDescription description;
    CUtensorMap map = {};
  };
  std::unique_ptr<std::array<Place, kPlaces>> places_ = std::make_unique<std::array<Place, kPlaces>>();
};

// Encodes a tensor of Rank dimensions, fastest first: `sizes` in elements, `strides` in bytes for all but the fastest
// (multiples of 16), `box` in elements. Elements outside read as zeros. Returns the driver's answer.
template <size_t Rank>
CUresult encode_tensor_map(TensorMapEncoder encode, CUtensorMap* map, CUtensorMapDataType type, const void* data,
                           const std::array<uint64_t, Rank>& sizes, const std::array<uint64_t, Rank - 1>& strides,
                           const std::array<uint32_t, Rank>& box, CUtensorMapSwizzle swizzle) {
  static_assert(1 <= Rank && Rank <= 5);
  TensorMapDescription description;
  size_t count = 0;
  const auto add = [&](uint64_t word) { description.words[count++] = word; };
  add(reinterpret_cast<uintptr_t>(encode));
  add(reinterpret_cast<uintptr_t>(data));
  add(Rank << 16 | static_cast<uint64_t>(type) << 8 | static_cast<uint64_t>(swizzle));
  for (const uint64_t size : sizes) add(size);
  for (const uint64_t stride : strides) add(stride);
  for (const uint32_t length : box) add(length);
  static thread_local TensorMapCache cache;
  return cache.find(description, map, [&](CUtensorMap* fresh) {
    std::array<uint32_t, Rank> every_element;
    every_element.fill(1);
    return encode(fresh, type, Rank, const_cast<void*>(data), sizes.data(), strides.data(), box.data(),
                  every_element.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  });
}

}  // namespace fastattn
