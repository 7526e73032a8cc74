// The Hopper forward, run as its launch runs it. HEAD_DIM and ELEMENT choose the instantiations.
#include "attention_runs.h"
#include "emulator/tensor_map.h"

using namespace fastattn;

// Arguments as for params_of; `tile_counter`: 0, or null; `clusters`: whether a full call runs in them; `blocks`: those
// of the persistent grid.
extern "C" const char* attention_forward(const void* q, const void* k, const void* v, void* out, float* lse,
                                         const int64_t* strides, const int64_t* sizes, const int32_t* cu_seqlens_q,
                                         const int32_t* cu_seqlens_k, const int32_t* key_lengths, double scale,
                                         double softcap, uint32_t* tile_counter, int64_t clusters, int64_t blocks) {
  return emulator::guarded([&] {
    AttentionParams params =
        params_of(q, k, v, out, lse, strides, sizes, cu_seqlens_q, cu_seqlens_k, key_lengths, scale, softcap);
    params.tile_counter = tile_counter;
    expect_success(emulate_forward<ELEMENT, HEAD_DIM>(params, emulator::encode_tiled, clusters != 0, blocks));
  });
}
