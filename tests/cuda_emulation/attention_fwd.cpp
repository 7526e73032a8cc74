// The Hopper forward as its launch would run it. HEAD_DIM and ELEMENT choose the instantiations.
#include "emulator/tensor_map.h"
#include "emulator_test.h"
#include "kernels/attention_fwd_launch.cuh"

using namespace fastattn;

// `strides`: (batch, head, row) of q, k, v, out. `sizes`: batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, total_q,
// total_k, head_dim, top_left, window_left, window_right. Null for absent tensors.
extern "C" const char* attention_forward(const void* q, const void* k, const void* v, void* out, float* lse,
                                         const int64_t* strides, const int64_t* sizes, const int32_t* cu_seqlens_q,
                                         const int32_t* cu_seqlens_k, const int32_t* key_lengths, double scale,
                                         double softcap, int64_t blocks) {
  return emulator::guarded([&] {
    const auto stride = [&](int i) { return Strides{strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]}; };
    const auto size = [&](int i) { return static_cast<int>(sizes[i]); };
    AttentionParams p = {};
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
    with_forward_shape<ELEMENT, HEAD_DIM>(p, [&](auto shape) {
      using Shape = decltype(shape);
      ForwardMaps maps;
      if (encode_forward_maps<Shape>(emulator::encode_tiled, p, &maps) != CUDA_SUCCESS) {
        emulator::fail("a tensor map was refused");
      }
      const TileSchedule schedule = forward_schedule<Shape>(p);
      const emulator::Launch launch{.grid = {static_cast<unsigned>(blocks), 1, 1},
                                    .threads = Shape::kThreads,
                                    .shared_bytes = Shape::kSharedBytes};
      emulator::launch(emulator::options, launch, attention_fwd_sm90<Shape>, maps, p, schedule);
    });
  });
}
