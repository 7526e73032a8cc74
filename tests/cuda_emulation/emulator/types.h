// Numbers, randomness and failures.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace emulator {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

// A rule of the execution model was broken, or no thread can run.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct alignas(2) Half {
  uint16_t bits;
  float to_float() const { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
  static Half from_float(float x) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))}; }
};

struct alignas(2) Bfloat16 {
  uint16_t bits;
  float to_float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
  static Bfloat16 from_float(float x) {
    const uint32_t word = std::bit_cast<uint32_t>(x);
    if (std::isnan(x)) return {0x7fff};
    return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
  }
};

// Subnormals become zeros, as in the .ftz instructions.
inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

// tanh rounded to the 11 bits that tanh.approx promises.
inline float tanh_approx(float x) {
  const uint32_t word = std::bit_cast<uint32_t>(std::tanh(x));
  return std::bit_cast<float>((word + 0x1000) & ~0x1fffu);
}

// splitmix64.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  uint64_t below(uint64_t bound) { return next() % bound; }
};

}  // namespace emulator
