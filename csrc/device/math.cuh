// Approximate functions of the special-function unit, and conversions between float and the 16-bit types.
#pragma once

#include "config.cuh"
#if defined(FASTATTN_EMULATION)
#include <cmath>
#endif

namespace fastattn {

constexpr float kLog2E = 1.44269504088896340736f;  // log2(e)
constexpr float kLn2 = 0.69314718055994530942f;    // ln(2)

// 2**x to 2 ulp, subnormals flushed to 0; 0 at -inf.
FASTATTN_DEVICE float exp2_approx(float x) {
#if defined(FASTATTN_EMULATION)
  return emulator::flush(std::exp2(emulator::flush(x)));
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// log2(x), absolute error 2**-22 near 1, relative elsewhere; -inf at 0.
FASTATTN_DEVICE float log2_approx(float x) {
#if defined(FASTATTN_EMULATION)
  return std::log2(emulator::flush(x));
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x to 1 ulp.
FASTATTN_DEVICE float reciprocal_approx(float x) {
#if defined(FASTATTN_EMULATION)
  return emulator::flush(1.0f / emulator::flush(x));
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// tanh(x) to a relative error of 2**-11: enough for bfloat16, not for float.
FASTATTN_DEVICE float tanh_approx(float x) {
#if defined(FASTATTN_EMULATION)
  return emulator::tanh_approx(x);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The larger of two values, the other one where one is NaN.
FASTATTN_DEVICE float maximum(float a, float b) {
#if defined(FASTATTN_EMULATION)
  return std::fmax(a, b);
#else
  return fmaxf(a, b);
#endif
}

FASTATTN_DEVICE float negative_infinity() {
#if defined(FASTATTN_EMULATION)
  return -HUGE_VALF;
#else
  return __int_as_float(0xff800000);
#endif
}

// Whether x is neither infinite nor NaN.
FASTATTN_DEVICE bool is_finite(float x) {
#if defined(FASTATTN_EMULATION)
  return std::isfinite(x);
#else
  return fabsf(x) < -negative_infinity();
#endif
}

FASTATTN_DEVICE float to_float(float x) { return x; }

FASTATTN_DEVICE float to_float(half_t x) {
#if defined(FASTATTN_EMULATION)
  return x.to_float();
#else
  return __half2float(x);
#endif
}

FASTATTN_DEVICE float to_float(bfloat16_t x) {
#if defined(FASTATTN_EMULATION)
  return x.to_float();
#else
  return __bfloat162float(x);
#endif
}

// x rounded to the nearest T, ties to even. T is float, half_t or bfloat16_t.
template <class T>
FASTATTN_DEVICE T from_float(float x);

template <>
FASTATTN_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
FASTATTN_DEVICE half_t from_float<half_t>(float x) {
#if defined(FASTATTN_EMULATION)
  return half_t::from_float(x);
#else
  return __float2half_rn(x);
#endif
}

template <>
FASTATTN_DEVICE bfloat16_t from_float<bfloat16_t>(float x) {
#if defined(FASTATTN_EMULATION)
  return bfloat16_t::from_float(x);
#else
  return __float2bfloat16_rn(x);
#endif
}

// Two values rounded to T in one register, `low` in the lower half. T is half_t or bfloat16_t.
template <class T>
FASTATTN_DEVICE uint32_t pack(float low, float high);

template <>
FASTATTN_DEVICE uint32_t pack<half_t>(float low, float high) {
#if defined(FASTATTN_EMULATION)
  return half_t::from_float(low).bits | static_cast<uint32_t>(half_t::from_float(high).bits) << 16;
#else
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

template <>
FASTATTN_DEVICE uint32_t pack<bfloat16_t>(float low, float high) {
#if defined(FASTATTN_EMULATION)
  return bfloat16_t::from_float(low).bits | static_cast<uint32_t>(bfloat16_t::from_float(high).bits) << 16;
#else
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

// The two values of a packed register.
template <class T>
FASTATTN_DEVICE float2 unpack(uint32_t packed) {
  T values[2];
  static_assert(sizeof(values) == sizeof(packed));
  memcpy(values, &packed, sizeof(packed));
  return make_float2(to_float(values[0]), to_float(values[1]));
}

}  // namespace fastattn
