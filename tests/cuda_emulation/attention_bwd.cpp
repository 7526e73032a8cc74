// The passes of the Hopper backward as their launches would run them. HEAD_DIM and ELEMENT choose the instantiations.
#include "emulator/tensor_map.h"
#include "emulator_test.h"
#include "kernels/attention_bwd_launch.cuh"

using namespace fastattn;

namespace {

struct Done {
  bool operator!=(Done) const { return false; }
};

template <class Shape, class Kernel>
Done run_pass(const AttentionBackwardParams& params, Kernel kernel, const TileSchedule& schedule) {
  BackwardMaps maps;
  if (encode_backward_maps<Shape>(emulator::encode_tiled, params, &maps) != CUDA_SUCCESS) {
    emulator::fail("a tensor map was refused");
  }
  const emulator::Launch launch{.grid = {static_cast<unsigned>(schedule.num_tiles), 1, 1},
                                .threads = Shape::kThreads,
                                .shared_bytes = Shape::kSharedBytes};
  emulator::launch(emulator::options, launch, kernel, params, maps, schedule);
  return Done();
}

template <bool kSoftcap>
void run(const AttentionBackwardParams& params) {
  const emulator::Launch rows{.grid = {static_cast<unsigned>(row_pass_blocks(params.call)), 1, 1},
                              .threads = kRowPassThreads,
                              .shared_bytes = 0};
  emulator::launch(emulator::options, rows, attention_bwd_rows_kernel<ELEMENT, kRowThreads<HEAD_DIM>>, params);
  if constexpr (has_one_pass(HEAD_DIM)) {
    if (params.dq_sum != nullptr) {
      run_one_pass<Done, ELEMENT, HEAD_DIM>(
          params,
          [&](auto shape, const TileSchedule& schedule) {
            using Shape = decltype(shape);
            return run_pass<Shape>(params, attention_bwd_fused_kernel<Shape>, schedule);
          },
          [&](auto shape) {
            using Shape = decltype(shape);
            const emulator::Launch launch{.grid = {static_cast<unsigned>(finish_blocks<Shape>(params.call)), 1, 1},
                                          .threads = 2 * kWarpgroupThreads,
                                          .shared_bytes = kFinishSharedBytes<Shape>};
            emulator::launch(emulator::options, launch, attention_bwd_finish_kernel<Shape>, params);
            return Done();
          });
      return;
    }
  }
  run_gradient_passes<Done, ELEMENT, HEAD_DIM, kSoftcap>(
      params,
      [&](auto shape, const TileSchedule& schedule) {
        using Shape = decltype(shape);
        return run_pass<Shape>(params, attention_bwd_dkdv_kernel<Shape>, schedule);
      },
      [&](auto shape, const TileSchedule& schedule) {
        using Shape = decltype(shape);
        return run_pass<Shape>(params, attention_bwd_dq_kernel<Shape>, schedule);
      });
}

}  // namespace

// Rows per head of lse_log2 and delta.
extern "C" const char* padded_rows(int64_t* rows, const int32_t* cu_seqlens_q, int64_t batch, int64_t seqlen_q) {
  return emulator::guarded([&] {
    AttentionParams p = {};
    p.cu_seqlens_q = cu_seqlens_q;
    p.batch = static_cast<int>(batch);
    p.seqlen_q = static_cast<int>(seqlen_q);
    p.total_q = seqlen_q;
    *rows = int64_t{query_row_blocks(p)} * kRowBlock;
  });
}

// `strides`: (batch, head, row) of q, k, v, out, dout, dq, dk, dv. `sizes`: batch, num_heads, num_kv_heads, seqlen_q,
// seqlen_k, total_q, total_k, head_dim, top_left, window_left, window_right. Null for absent tensors.
extern "C" const char* attention_backward(const void* q, const void* k, const void* v, void* out, const void* dout,
                                          float* lse, const float* dlse, void* dq, void* dk, void* dv, float* lse_log2,
                                          float* delta, float* dq_sum, uint32_t* dq_turns, const int64_t* strides,
                                          const int64_t* sizes, const int32_t* cu_seqlens_q,
                                          const int32_t* cu_seqlens_k, const int32_t* key_lengths, double scale,
                                          double softcap) {
  return emulator::guarded([&] {
    const auto stride = [&](int i) { return Strides{strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]}; };
    const auto size = [&](int i) { return static_cast<int>(sizes[i]); };
    AttentionBackwardParams params = {};
    AttentionParams& p = params.call;
    p.q = q;
    p.k = k;
    p.v = v;
    p.out = out;
    p.lse = lse;
    p.q_strides = stride(0);
    p.k_strides = stride(1);
    p.v_strides = stride(2);
    p.out_strides = stride(3);
    p.batch = size(0);
    p.num_heads = size(1);
    p.num_kv_heads = size(2);
    p.seqlen_q = size(3);
    p.seqlen_k = size(4);
    p.total_q = sizes[5];
    p.total_k = sizes[6];
    p.head_dim = size(7);
    p.top_left = sizes[8] != 0;
    p.window_left = size(9);
    p.window_right = size(10);
    p.lse_strides = {p.num_heads * p.total_q, p.total_q, 1};
    p.cu_seqlens_q = cu_seqlens_q;
    p.cu_seqlens_k = cu_seqlens_k;
    p.key_lengths = key_lengths;
    p.scale = static_cast<float>(scale);
    p.softcap = static_cast<float>(softcap);
    params.dout = dout;
    params.dlse = dlse;
    params.dq = dq;
    params.dk = dk;
    params.dv = dv;
    params.dout_strides = stride(4);
    params.dq_strides = stride(5);
    params.dk_strides = stride(6);
    params.dv_strides = stride(7);
    params.lse_log2 = lse_log2;
    params.delta = delta;
    params.dq_sum = dq_sum;
    params.dq_turns = dq_turns;
    if (softcap != 0.0) {
      run<true>(params);
    } else {
      run<false>(params);
    }
  });
}
