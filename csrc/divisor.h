// Division by a number that a launch knows and a kernel does not: a multiplication and a shift.
#pragma once

#include <cstdint>

namespace fastattn {

// With l = ceil(log2(divisor)) and N bits of numerator, multiplier = ceil(2^(N + l) / divisor) has N + 1 bits, and
// multiplier * divisor = 2^(N + l) + e with e < divisor <= 2^l. So numerator * multiplier / 2^(N + l) is above
// numerator / divisor by numerator * e / (divisor * 2^(N + l)) < 1 / divisor: its floor is the quotient.
// N is 31 where the numerators have 31 bits, which takes one 32-bit multiplication, and 63 otherwise.
struct Divisor {
  int64_t divisor = 1;
  uint64_t multiplier = uint64_t{1} << 31;
  int32_t shift = 0;

  Divisor() = default;

  // divisor >= 1; divides 0 .. largest.
  Divisor(int64_t divisor, int64_t largest) : divisor(divisor) {
    while ((uint64_t{1} << shift) < static_cast<uint64_t>(divisor)) {
      ++shift;
    }
    const int bits = largest <= INT32_MAX ? 31 : 63;
    const unsigned __int128 power = static_cast<unsigned __int128>(1) << (bits + shift);
    multiplier = static_cast<uint64_t>((power + static_cast<uint64_t>(divisor) - 1) / static_cast<uint64_t>(divisor));
  }
};

}  // namespace fastattn
