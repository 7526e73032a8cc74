// The emulator's encoding of a tensor map.
#pragma once

#include <cstdint>

namespace emulator {

enum class Swizzle : uint8_t { kNone, k32, k64, k128 };

// What encode_tiled writes into the driver's opaque 128 bytes.
struct TensorMap {
  static constexpr uint32_t kMark = 0x746d6170;
  uint32_t mark;
  uint8_t rank;
  uint8_t element_bytes;
  bool is_float;
  Swizzle swizzle;
  unsigned char* data;
  uint64_t sizes[5];    // elements, fastest first
  uint64_t strides[4];  // bytes, of dimensions 1 and up
  uint16_t box[5];      // elements

  uint32_t box_bytes() const {
    uint32_t bytes = element_bytes;
    for (int i = 0; i < rank; ++i) bytes *= box[i];
    return bytes;
  }
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace emulator
