// Common parts of the two backward passes: scores from products, and stores of gradient accumulators.
#pragma once

#include "../device/online_softmax.cuh"
#include "../device/panel.cuh"
#include "../device/pipeline.cuh"
#include "../device/registers.cuh"
#include "attention_sequence.cuh"

namespace fastattn {

// One tensor map per operand, with boxes of the rows of the pass's tiles.
struct BackwardMaps {
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap dout;
};

// Fetches the maps ahead of the first copy. One thread calls it.
FASTATTN_DEVICE void prefetch_maps(const BackwardMaps& maps) {
  for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.dout}) tma_prefetch_map(map);
}

// L2 eviction policies: of tiles that one block reads, and of tiles that every block of a head reads.
constexpr CachePolicy kReadOnce = CachePolicy::kEvictFirst;
constexpr CachePolicy kReadAgain = CachePolicy::kEvictLast;

// Scale factors from products x' = q.k to scores: `log2` gives log2(e) * score, of score = scale * x' or softcap *
// tanh(scale * x' / softcap). Gradients are multiplied by `scale` when they are stored.
struct ScoreScale {
  float log2;
  float inside;  // the factor of x' inside the tanh

  FASTATTN_DEVICE explicit ScoreScale(const AttentionParams& call)
      : log2((call.softcap > 0.0f ? call.softcap : call.scale) * kLog2E),
        inside(call.softcap > 0.0f ? call.scale / call.softcap : 0.0f) {}

  // Replaces products by their tanh; slope = 1 - tanh**2.
  template <bool kSoftcap, int N, int Slopes>
  FASTATTN_DEVICE void cap(float (&scores)[N], float (&slope)[Slopes]) const {
    if constexpr (kSoftcap) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        scores[i] = tanh_exact(scores[i] * inside);
        slope[i] = 1.0f - scores[i] * scores[i];
      }
    }
  }

  template <bool kSoftcap, int N, int Slopes>
  FASTATTN_DEVICE void uncap(float (&dscores)[N], const float (&slope)[Slopes]) const {
    if constexpr (kSoftcap) {
#pragma unroll
      for (int i = 0; i < N; ++i) dscores[i] *= slope[i];
    }
  }
};

// Waits for all threads of one of two consumer warpgroups. Barriers with constant numbers: with one computed at run
// time the compiler reserves all sixteen.
FASTATTN_DEVICE void warpgroup_sync(int consumer) {
  if (consumer == 0) {
    named_barrier_sync(1, kWarpgroupThreads);
  } else {
    named_barrier_sync(2, kWarpgroupThreads);
  }
}

// Releases a stage: one arrival per warp, once all its lanes have read the stage.
template <int kStages>
FASTATTN_DEVICE void release_stage(Pipeline<kStages>& pipeline, PipelineState<kStages> state) {
  warp_sync();
  if (lane_index() == 0) pipeline.release(state);
}

template <int N>
FASTATTN_DEVICE void copy_registers(float (&to)[N], const float (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = from[i];
}

// The offset of one head of one sequence.
template <class T>
FASTATTN_DEVICE T* head_of(T* tensor, const Strides& strides, int batch, int head, int first_row) {
  return tensor + batch * strides.batch + head * strides.head + first_row * strides.row;
}

// The destination of a warp's 16 rows of a gradient, and which of these rows exist.
struct GradientRows {
  int first;     // index of the first row in its sequence
  int end;       // rows from here on have a gradient of zero
  int stored;    // rows from here on do not exist
  int head_dim;  // number of columns stored
};

// Stores a warp's 16 rows of scale * accumulator to `gradient`, one head of one sequence, staged through the rows from
// `tile_row` on of a tile of kRows, which no other warp uses any more.
template <class T, int kRows, int Accumulators>
FASTATTN_DEVICE void store_gradient(unsigned char* tile, int tile_row, float (&accumulator)[Accumulators], float scale,
                                    T* gradient, int64_t row_stride, const GradientRows& rows) {
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < Accumulators; ++i) {
    const int row = rows.first + lane / 4 + 8 * fragment_half(i);
    accumulator[i] = row < rows.end ? accumulator[i] * scale : 0.0f;
  }
  store_fragment<T, kRows>(tile, tile_row, accumulator);
  warp_sync();
  constexpr int kChunks = Accumulators / 4;  // of 8 columns
#pragma unroll 4
  for (int chunk = lane; chunk < 16 * kChunks; chunk += kWarpThreads) {
    const int row = chunk / kChunks;
    const int column = chunk % kChunks * 8;
    const void* source = tile + tile_offset<kRows>(tile_row + row, column);
    const uint4 values = ld_shared(static_cast<const uint4*>(source));
    if (rows.first + row < rows.stored && column < rows.head_dim) {
      st_global_16(gradient + (rows.first + row) * row_stride + column, values);
    }
  }
}

}  // namespace fastattn
