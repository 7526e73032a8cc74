// The passes of the Hopper backward, run as their launches run them. HEAD_DIM and ELEMENT choose the instantiations.
#include "attention_runs.h"
#include "emulator/tensor_map.h"

using namespace fastattn;

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

// Batch heads per section of a dense call's pass over keys, and of its one-pass backward.
extern "C" const char* key_sections(int64_t* batch_heads, int64_t batch, int64_t heads, int64_t kv_heads,
                                    int64_t seqlen_q, int64_t seqlen_k) {
  return emulator::guarded([&] {
    AttentionParams p = {};
    p.batch = static_cast<int>(batch);
    p.num_heads = static_cast<int>(heads);
    p.num_kv_heads = static_cast<int>(kv_heads);
    p.total_q = seqlen_q;
    p.total_k = seqlen_k;
    p.head_dim = HEAD_DIM;
    p.window_right = kUnbounded;
    const auto sections = [&](auto head_dim) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      if constexpr (has_one_pass(kHeadDim)) {
        using TwoPasses = KeyGradientsShapeFor<ELEMENT, kHeadDim, KeyGradients::kBoth, false>;
        batch_heads[0] = key_schedule<TwoPasses>(p).batch_heads_per_section;
        batch_heads[1] = one_pass_schedule<FusedGradientsShapeFor<ELEMENT, kHeadDim>>(p).early.batch_heads_per_section;
      }
    };
    sections(std::integral_constant<int, HEAD_DIM>());
  });
}

// Arguments as for params_of; the strides continue with dout, dq, dk, dv.
extern "C" const char* attention_backward(const void* q, const void* k, const void* v, void* out, const void* dout,
                                          float* lse, const float* dlse, void* dq, void* dk, void* dv, float* lse_log2,
                                          float* delta, float* dq_sum, uint32_t* dq_semaphore, uint32_t* ticket,
                                          const int64_t* strides, const int64_t* sizes, const int32_t* cu_seqlens_q,
                                          const int32_t* cu_seqlens_k, const int32_t* key_lengths, double scale,
                                          double softcap) {
  return emulator::guarded([&] {
    AttentionBackwardParams params = {};
    params.call = params_of(q, k, v, out, lse, strides, sizes, cu_seqlens_q, cu_seqlens_k, key_lengths, scale, softcap);
    params.dout = dout;
    params.dlse = dlse;
    params.dq = dq;
    params.dk = dk;
    params.dv = dv;
    params.dout_strides = strides_at(strides, 4);
    params.dq_strides = strides_at(strides, 5);
    params.dk_strides = strides_at(strides, 6);
    params.dv_strides = strides_at(strides, 7);
    params.lse_log2 = lse_log2;
    params.delta = delta;
    params.dq_sum = dq_sum;
    params.dq_semaphore = dq_semaphore;
    params.ticket = ticket;
    expect_success(emulate_backward<ELEMENT, HEAD_DIM>(params, emulator::encode_tiled));
  });
}
