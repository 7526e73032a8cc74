// Host side: tensor maps of heads, as load_tile reads them.
#pragma once

#include <type_traits>

#include "../attention_params.h"
#include "tensor_map.h"

namespace fastattn {

template <class Element>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<Element, half_t> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// Describes 16-bit `data` of logical shape (batch, heads, rows, head_dim) for boxes of 64 columns by box_rows rows
// under the 128-byte swizzle. The stride of each dimension longer than 1 is a multiple of 8 elements.
inline CUresult encode_head_map(TensorMapEncoder encode, CUtensorMap* map, CUtensorMapDataType type, const void* data,
                                const Strides& strides, int64_t batch, int64_t heads, int64_t rows, int64_t head_dim,
                                int box_rows) {
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  const auto bytes = [&](int64_t stride, int64_t n) { return size(2 * (n > 1 ? stride : head_dim)); };
  return encode_tensor_map<4>(encode, map, type, data, {size(head_dim), size(rows), size(heads), size(batch)},
                              {bytes(strides.row, rows), bytes(strides.head, heads), bytes(strides.batch, batch)},
                              {64, static_cast<uint32_t>(box_rows), 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace fastattn
