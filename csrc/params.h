// Parameters of the row kernels: plain structs of pointers, sizes and strides, independent of torch.
//
// Sizes and strides are 64-bit and count elements.
#pragma once

#include <cstdint>

#include "divisor.h"

namespace fastattn {

// How causality masks a softmax's entries (row, column) of the last two dims, as seen along a row.
enum class Causal : int32_t {
  kNone = 0,
  kColumnsAreKeys = 1,     // column j of row i stays where j <= i + shift
  kColumnsAreQueries = 2,  // column i of row j stays where j <= i + shift
};

// The layout of a tensor in memory as (outer, mid, inner, columns) rows. The column stride is 1.
struct RowStrides {
  int64_t outer;
  int64_t mid;
  int64_t inner;
};

// How a row number is split into outer, mid and inner indices.
enum class RowNumbers : int32_t {
  kInnerAlone = 0,  // it is the inner index
  k31Bits = 1,
  k63Bits = 2,
};

struct RowSizes {
  int64_t outer = 0;
  int64_t mid = 0;
  int64_t inner = 0;
  int64_t columns = 0;
  int64_t rows = 0;
  RowNumbers numbers = RowNumbers::kInnerAlone;
  Divisor by_inner;  // of a row's number
  Divisor by_mid;    // of that quotient

  RowSizes() = default;

  RowSizes(int64_t outer, int64_t mid, int64_t inner, int64_t columns)
      : outer(outer), mid(mid), inner(inner), columns(columns), rows(outer * mid * inner) {
    if (outer * mid > 1) {
      numbers = rows <= INT32_MAX ? RowNumbers::k31Bits : RowNumbers::k63Bits;
    }
    if (rows > 0) {
      by_inner = Divisor(inner, rows);
      by_mid = Divisor(mid, rows);
    }
  }
};

struct SoftmaxForward {
  const void* x;        // (outer, mid, inner, columns)
  const uint8_t* mask;  // (outer, mid, inner, columns), nonzero = keep; may be null
  void* y;              // (outer, mid, inner, columns)
  RowSizes sizes;
  RowStrides x_strides;
  RowStrides mask_strides;  // 0 where it is broadcast
  int64_t mask_column_stride;
  RowStrides y_strides;
  int64_t shift;
  float scale;
  Causal causal;
  bool log;
};

struct SoftmaxBackward {
  const void* y;   // (outer, mid, inner, columns), the forward's result
  const void* dy;  // (outer, mid, inner, columns), of y's dtype
  void* dx;        // (outer, mid, inner, columns)
  RowSizes sizes;
  RowStrides y_strides;
  RowStrides dy_strides;
  RowStrides dx_strides;
  float scale;
  bool log;
};

struct CrossEntropyForward {
  const void* logits;     // (rows, classes)
  const int64_t* target;  // (rows,)
  float* losses;          // (rows,)
  float* norms;           // (rows, 2): the maximum and the logarithm of the sum
  int64_t rows;
  int64_t classes;
  int64_t row_stride;
  int64_t ignore_index;
  float smoothing;
  const float* class_weight;  // (classes,); may be null
  const float* weight_mean;   // of class_weight, one element; null with it
  float z_loss;
};

struct CrossEntropyBackward {
  const void* logits;     // (rows, classes)
  const int64_t* target;  // (rows,)
  const float* dlosses;   // (rows,)
  const float* norms;     // (rows, 2)
  void* dlogits;          // (rows, classes); may be the logits
  int64_t rows;
  int64_t classes;
  int64_t row_stride;
  int64_t dlogits_row_stride;
  int64_t ignore_index;
  float smoothing;
  const float* class_weight;  // (classes,); may be null
  const float* weight_mean;   // of class_weight, one element; null with it
  float z_loss;
};

}  // namespace fastattn
