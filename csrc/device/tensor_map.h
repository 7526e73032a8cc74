// Host side of the copy engine: describes a tensor and the box one copy moves.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

namespace fastattn {

// cuTensorMapEncodeTiled of the driver, or the stand-in of the emulation. A pointer, so that nothing links libcuda.
using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);

// Encodes a tensor of Rank dimensions, fastest first: `sizes` in elements, `strides` in bytes for all but the fastest
// (multiples of 16), `box` in elements. Elements outside read as zeros. Returns the driver's answer.
template <size_t Rank>
CUresult encode_tensor_map(TensorMapEncoder encode, CUtensorMap* map, CUtensorMapDataType type, const void* data,
                           const std::array<uint64_t, Rank>& sizes, const std::array<uint64_t, Rank - 1>& strides,
                           const std::array<uint32_t, Rank>& box, CUtensorMapSwizzle swizzle) {
  std::array<uint32_t, Rank> every_element;
  every_element.fill(1);
  return encode(map, type, Rank, const_cast<void*>(data), sizes.data(), strides.data(), box.data(),
                every_element.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace fastattn
