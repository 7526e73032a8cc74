// Softmax over rows: scaled, masked, causal, or its logarithm.
//
//   y = exp(scale * x - max) / sum(exp(scale * x - max))        log: scale * x - max - log(sum)
//
// Arithmetic is in float, columns are counted by Index: 32 bits where a row is held. What is masked, and where x or
// scale * x is -inf, y is the constant 0, in log -inf, even in a row with NaN.
#pragma once

#include "rows.cuh"

namespace fastattn {

// The lowest `count` of V bits.
template <int V, class Index>
FASTATTN_DEVICE uint32_t bits_below(Index count) {
  const int bits = count <= 0 ? 0 : (count >= V ? V : static_cast<int>(count));
  return (1u << bits) - 1u;
}

// The range of columns of a row that causality keeps.
template <class Index>
struct KeptRange {
  Index begin;
  Index end;

  // Whether some of V elements from `first` on are kept.
  template <int V>
  FASTATTN_DEVICE bool meets(Index first) const {
    return first + V > begin && first < end;
  }

  // One bit per element from `first` on.
  template <int V>
  FASTATTN_DEVICE uint32_t bits(Index first) const {
    if (first >= begin && first + V <= end) {
      return bits_below<V>(V);
    }
    return bits_below<V>(end - first) & ~bits_below<V>(begin - first);
  }

  FASTATTN_DEVICE bool holds(Index column) const { return column >= begin && column < end; }
};

template <class Index>
FASTATTN_DEVICE KeptRange<Index> kept_range(const SoftmaxForward& p, int64_t inner, int64_t columns) {
  int64_t begin = 0;
  int64_t end = columns;
  if (p.causal == Causal::kColumnsAreKeys) {
    end = smaller(end, larger(inner + p.shift + 1, 0));
  }
  if (p.causal == Causal::kColumnsAreQueries) {
    begin = smaller(end, larger(inner - p.shift, 0));
  }
  return {static_cast<Index>(begin), static_cast<Index>(end)};
}

// One bit per element first .. first + V - 1: whether the mask keeps it. Nothing is read outside [begin, end).
template <int V, class Index>
FASTATTN_DEVICE uint32_t load_mask(const uint8_t* row, int64_t stride, Index first, const KeptRange<Index>& kept) {
  if (stride == 0) {
    return row[0] != 0 ? 0xffffffffu : 0u;
  }
  uint8_t bytes[V] = {};
  const uint8_t* const source = row + first * stride;
  if (stride == 1 && first >= kept.begin && first + V <= kept.end && reinterpret_cast<uintptr_t>(source) % V == 0) {
    if (V == 8) {
      *reinterpret_cast<uint64_t*>(bytes) = *reinterpret_cast<const uint64_t*>(source);
    } else {
      *reinterpret_cast<uint32_t*>(bytes) = *reinterpret_cast<const uint32_t*>(source);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (kept.holds(first + i)) {
        bytes[i] = row[(first + i) * stride];
      }
    }
  }
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    bits |= static_cast<uint32_t>(bytes[i] != 0) << i;
  }
  return bits;
}

// Where a row of a forward call lies, and how threads cut it into vectors.
template <class In, class Out, class Index>
struct RowView {
  using Position = Index;
  static constexpr int kV = kVector<In, Out>;

  const In* x;
  Out* y;
  Index columns;   // 0 where there is no such row
  int shift;       // the first vector begins this many elements before the row
  bool y_aligned;  // vectors of y lie at multiples of 16 bytes too

  FASTATTN_DEVICE RowView(const SoftmaxForward& p, int64_t row) {
    const RowStrides* const strides[] = {&p.x_strides, &p.y_strides};
    int64_t offsets[2];
    row_offsets(row, p.sizes, strides, offsets);
    begin(p, row, offsets[0], offsets[1]);
  }

  FASTATTN_DEVICE Index first_of(Index vector) const { return vector * kV - shift; }

  // The scores of a vector where nothing is masked and the scale is positive.
  FASTATTN_DEVICE void read_scores(const SoftmaxForward& p, Index first, float (&out)[kV]) const {
    const Packed<In, kV> raw = load_vector<true, kV>(x, first, columns, true, negative_infinity());
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      out[i] = raw.value(i) * p.scale;
    }
  }

 protected:
  RowView() = default;

  FASTATTN_DEVICE void begin(const SoftmaxForward& p, int64_t row, int64_t x_offset, int64_t y_offset) {
    x = opaque(static_cast<const In*>(p.x) + x_offset);
    y = opaque(static_cast<Out*>(p.y) + y_offset);
    columns = row < p.sizes.rows ? static_cast<Index>(p.sizes.columns) : 0;
    shift = misalignment<kV>(x);
    y_aligned = aligned_before(y, shift);
  }
};

// A row of a forward call of any kind and how this thread reads it.
template <class In, class Out, class Index>
struct ForwardRow : RowView<In, Out, Index> {
  static constexpr int kV = kVector<In, Out>;

  const uint8_t* mask;
  KeptRange<Index> kept;

  FASTATTN_DEVICE ForwardRow(const SoftmaxForward& p, int64_t row) {
    const RowStrides* const strides[] = {&p.x_strides, &p.y_strides, &p.mask_strides};
    int64_t offsets[3];
    const int64_t inner = row_offsets(row, p.sizes, strides, offsets);
    this->begin(p, row, offsets[0], offsets[1]);
    mask = p.mask == nullptr ? nullptr : p.mask + offsets[2];
    kept = kept_range<Index>(p, inner, this->columns);
  }

  FASTATTN_DEVICE Packed<In, kV> load(Index first) const {
    if (kept.template meets<kV>(first)) {
      return load_vector<true, kV>(this->x, first, this->columns, true, 0.0f);
    }
    return {};
  }

  // One bit per element from `first` on: whether it is kept.
  FASTATTN_DEVICE uint32_t keep(const SoftmaxForward& p, Index first) const {
    const uint32_t bits = kept.template bits<kV>(first);
    return mask != nullptr && bits != 0 ? bits & load_mask<kV>(mask, p.mask_column_stride, first, kept) : bits;
  }

  // scale * x, -inf where it is not kept or x is -inf, whatever the scale.
  FASTATTN_DEVICE void scores(const SoftmaxForward& p, const Packed<In, kV>& raw, uint32_t keep,
                              float (&out)[kV]) const {
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      const float value = (keep >> i & 1u) != 0 ? raw.value(i) : negative_infinity();
      out[i] = value != negative_infinity() ? value * p.scale : value;
    }
  }

  FASTATTN_DEVICE void read_scores(const SoftmaxForward& p, Index first, float (&out)[kV]) const {
    scores(p, load(first), keep(p, first), out);
  }
};

// Writes a row whose sum is NaN: NaN, except for the constant where a score is -inf. Only such a row is read again; in
// all others a power of 0 needs no record of whether its element was hidden.
template <class Row>
FASTATTN_DEVICE void store_undefined_row(const SoftmaxForward& p, const RowPlan& plan, typename Row::Position steps) {
  const RowThreads mine = row_threads(plan, opaque(uint64_t{block_index().x}));
  const Row row(p, mine.row);
  const float constant = p.log ? negative_infinity() : 0.0f;
#pragma unroll 1
  for (typename Row::Position i = 0; i < steps; ++i) {
    const typename Row::Position first = row.first_of(mine.thread + (i << mine.threads_log2));
    float values[Row::kV];
    row.read_scores(p, first, values);
#pragma unroll
    for (int j = 0; j < Row::kV; ++j) {
      values[j] = values[j] == negative_infinity() ? constant : not_a_number();
    }
    store_vector<Row::kV>(row.y, first, row.columns, row.y_aligned, values);
  }
}

// 1 / sum of powers, at least 1, to the precision of the result.
template <class Out>
FASTATTN_DEVICE float inverse_sum(float sum) {
  return sizeof(Out) == 2 ? reciprocal_approx(sum) : 1.0f / sum;
}

// One row, held by its threads: Elements of it in each.
template <class In, class Out, int Elements, int Threads>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(Threads, kRowBlocks<Threads>)
    softmax_forward_kernel(const FASTATTN_GRID_CONSTANT SoftmaxForward p, const FASTATTN_GRID_CONSTANT RowPlan plan) {
  constexpr int kV = kVector<In, Out>;
  constexpr int kVectors = Elements / kV;
  static_assert(Elements <= 32, "one bit each");
  const RowThreads mine = row_threads(plan);
  announce_block<kWithinWarp<Elements>>(mine);
  const ForwardRow<In, Out, int> row(p, mine.row);
  Packed<In, kV> raw[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    raw[i] = row.load(row.first_of(mine.thread + (i << mine.threads_log2)));
  }
  uint32_t keep = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    keep |= row.keep(p, row.first_of(mine.thread + (i << mine.threads_log2))) << i * kV;
  }
  float scores[kVectors][kV];
  float largest = negative_infinity();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    row.scores(p, raw[i], keep >> i * kV, scores[i]);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      largest = maximum(largest, scores[i][j]);
    }
  }
  largest = finite_maximum(reduce_row<Maximum, kWithinWarp<Elements>>(largest, mine, 0));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const float difference = scores[i][j] - largest;
      const float power = exponential(difference);
      sum += power;
      scores[i][j] = p.log ? difference : power;
    }
  }
  sum = reduce_row<Sum, kWithinWarp<Elements>>(sum, mine, 1);
  if (!is_finite(sum)) {
    store_undefined_row<ForwardRow<In, Out, int>>(p, plan, kVectors);
    return;
  }
  sum = sum == 0.0f ? 1.0f : sum;
  const float factor = p.log ? 1.0f : inverse_sum<Out>(sum);
  const float offset = p.log ? logf(sum) : 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      scores[i][j] = scores[i][j] * factor - offset;
    }
    store_vector<kV>(row.y, row.first_of(mine.thread + (i << mine.threads_log2)), row.columns, row.y_aligned,
                     scores[i]);
  }
}

// One row of any length: maximum and sum online, then the result, from the row's end, which was read last.
template <class In, class Out>
FASTATTN_KERNEL void FASTATTN_LAUNCH_BOUNDS(kLongRowThreads, 1)
    softmax_forward_long_kernel(const FASTATTN_GRID_CONSTANT SoftmaxForward p,
                                const FASTATTN_GRID_CONSTANT RowPlan plan) {
  constexpr int kV = kVector<In, Out>;
  const RowThreads mine = row_threads(plan);
  const ForwardRow<In, Out, int64_t> row(p, mine.row);
  const int64_t vectors = vectors_of(row.columns, row.shift, kV);
  float largest = negative_infinity();
  float sum = 0.0f;
  float scores[kV];
#pragma unroll 2
  for (int64_t vector = mine.thread; vector < vectors; vector += mine.threads()) {
    const int64_t first = row.first_of(vector);
    row.read_scores(p, first, scores);
    float new_largest = largest;
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      new_largest = maximum(new_largest, scores[j]);
    }
    const float reference = finite_maximum(new_largest);
    sum *= exponential(largest - reference);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      sum += exponential(scores[j] - reference);
    }
    largest = new_largest;
  }
  const float row_largest = finite_maximum(reduce_row<Maximum>(largest, mine, 0));
  sum = sum == 0.0f ? 0.0f : sum * exponential(finite_maximum(largest) - row_largest);  // 0 * inf is NaN
  sum = reduce_row<Sum>(sum, mine, 1);
  const int64_t steps = (vectors + mine.threads() - 1) >> mine.threads_log2;
  if (!is_finite(sum)) {
    store_undefined_row<ForwardRow<In, Out, int64_t>>(p, plan, steps);
    return;
  }
  sum = sum == 0.0f ? 1.0f : sum;
  const float factor = p.log ? 1.0f : inverse_sum<Out>(sum);
  const float offset = p.log ? logf(sum) : 0.0f;
  for (int64_t step = steps - 1; step >= 0; --step) {
    const int64_t first = row.first_of((step << mine.threads_log2) + mine.thread);
    row.read_scores(p, first, scores);
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const float difference = scores[j] - row_largest;
      scores[j] = (p.log ? difference : exponential(difference)) * factor - offset;
    }
    store_vector<kV>(row.y, first, row.columns, row.y_aligned, scores);
  }
}

}  // namespace fastattn
