// The emulator's cuTensorMapEncodeTiled, with the driver's checks.
#pragma once

#include <cuda.h>

#include <cstring>

#include "encoded_map.h"

namespace emulator {

inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                             CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  TensorMap encoded = {};
  encoded.mark = TensorMap::kMark;
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      encoded.element_bytes = 4;
      encoded.is_float = true;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      encoded.element_bytes = 2;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  if (rank < 1 || rank > 5 || reinterpret_cast<uintptr_t>(data) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  encoded.rank = rank;
  encoded.data = static_cast<unsigned char*>(data);
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      encoded.swizzle = Swizzle::kNone;
      break;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      encoded.swizzle = Swizzle::k32;
      break;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      encoded.swizzle = Swizzle::k64;
      break;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      encoded.swizzle = Swizzle::k128;
      break;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32 || box[i] < 1 || box[i] > 256 || element_strides[i] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    encoded.sizes[i] = sizes[i];
    encoded.box[i] = box[i];
    if (i == 0) continue;
    if (strides[i - 1] % 16 != 0 || strides[i - 1] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
    encoded.strides[i - 1] = strides[i - 1];
  }
  const uint32_t row_bytes = box[0] * encoded.element_bytes;
  const bool swizzles = encoded.swizzle != Swizzle::kNone;
  if (row_bytes % 16 != 0 || (swizzles && row_bytes > 16u << static_cast<int>(encoded.swizzle))) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &encoded, sizeof(encoded));
  return CUDA_SUCCESS;
}

}  // namespace emulator
