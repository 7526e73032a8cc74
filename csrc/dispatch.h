// From run-time dtypes to compile-time kernels. Each axis exists because the inner loop changes with it; the product of
// the axes is what a build compiles, for each architecture:
//
//   softmax forward   (in, out) x held elements {8, 16, 32, none}; floats have no 32;
//     16-bit in and out also plain: without mask, causality or log                      4 + 4 + 4 + 4 + 3 + 2 x 4 = 27
//   softmax backward  (y, dx) x held elements {8, 16, none}                             5 x 3             = 15
//   cross-entropy     dtype x {forward, backward}                                       3 x 2             =  6
//   attention forward 16-bit dtype x head dim {64, 128, 256} x {plain, softcap}, and
//     at 128 other tiles for calls without causality or window (attention_tiles.h),
//     with clusters and without                                                         2 x (2 + 4 + 2)   = 16
//   attention backward 16-bit dtype x head dim {64, 128, 256} x ({plain, softcap} x {keys, queries} + rows),
//     at 256 with softcap two passes over keys; at 64 and 128 also all in one, its end  2 x (7 + 7 + 6)   = 40
//
// (in, out) is one of three dtypes, or a 16-bit input with a float result, as autocast wants: 5 pairs. Scale, mask,
// causality, log, lengths, alignment and the threads of a row are arguments: they change no instruction of the loop
// over elements, or are tested once per 16 bytes. But a 16-bit element with a 16-bit result moves 4 bytes, and with the
// tests for these options its instructions take longer than that at 4.8 TB/s (tests/csrc/row_instructions.py): so the
// plain call has kernels of its own there. A float result or input moves 6 or 8 bytes, a mask 1 more, a backward 6 and
// more: their kernels keep up with memory as they are.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <type_traits>

#include "attention_tiles.h"
#include "device/config.cuh"

namespace fastattn {

template <class T>
struct Type {
  using type = T;
};

// function(Type<T>) for the T of a dtype.
template <class Function>
auto dispatch_dtype(const char* name, at::ScalarType dtype, Function function) {
  switch (dtype) {
    case at::kHalf:
      return function(Type<half_t>());
    case at::kBFloat16:
      return function(Type<bfloat16_t>());
    case at::kFloat:
      return function(Type<float>());
    default:
      TORCH_CHECK_TYPE(false, name, ": got ", dtype, ", needs float16, bfloat16 or float32");
  }
}

// function(Type<Narrow>, Type<Wide>) for a dtype of the input and that of the result or gradient, which is the same or,
// where the input has 16 bits, float.
template <class Function>
auto dispatch_pair(at::ScalarType narrow, at::ScalarType wide, Function function) {
  return dispatch_dtype("dtype", narrow, [&](auto tag) {
    using Narrow = typename decltype(tag)::type;
    if (wide == at::kFloat) {
      return function(tag, Type<float>());
    }
    TORCH_CHECK_TYPE(wide == narrow, "dtype: got ", wide, " for ", narrow, ", needs the same or float32");
    return function(tag, Type<Narrow>());
  });
}

// function(Type<T>, the kernels' head dim as an integral constant) for a 16-bit dtype and a head dim.
template <class Function>
auto dispatch_attention(at::ScalarType dtype, int head_dim, Function function) {
  const auto with_dim = [&](auto tag) {
    switch (padded_head_dim(head_dim)) {
      case 64:
        return function(tag, std::integral_constant<int, 64>());
      case 128:
        return function(tag, std::integral_constant<int, 128>());
      default:
        return function(tag, std::integral_constant<int, 256>());
    }
  };
  return dtype == at::kHalf ? with_dim(Type<half_t>()) : with_dim(Type<bfloat16_t>());
}

}  // namespace fastattn
