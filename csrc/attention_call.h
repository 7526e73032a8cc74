// From tensors and options to the parameters of an attention call, for forward and backward alike.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <cmath>

#include "attention_params.h"
#include "attention_tiles.h"
#include "check.h"
#include "device/tensor_map.h"
#include "runtime.h"

namespace fastattn {

// Options of a call. A window side of -1 is unbounded.
struct AttentionOptions {
  bool top_left;
  int64_t window_left;
  int64_t window_right;
  double softcap;
  double scale;
};

// Strides of (B, H, S, D), or of (T, H, D), whose sequence is the first dimension.
inline Strides head_strides(const at::Tensor& tensor) {
  if (tensor.dim() == 3) return {0, tensor.stride(1), tensor.stride(0)};
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// TMA requirements on a tensor: 16-bit floats, column stride 1, the address and all other strides of dimensions over 1
// positive multiples of 16 bytes, lengths within bounds.
inline void check_heads(const char* name, const at::Tensor& tensor, const at::Tensor& query) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16, name, ": got ",
                   tensor.scalar_type(), ", needs float16 or bfloat16");
  check_dtype(name, tensor, query.scalar_type());
  check_same_device(name, tensor, query);
  TORCH_CHECK_VALUE(tensor.dim() == query.dim(), name, ": got shape ", tensor.sizes(), ", needs ", query.dim(),
                    " dimensions");
  TORCH_CHECK_VALUE(tensor.stride(-1) == 1, name, ": got strides ", tensor.strides(), ", needs adjacent columns");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
                    ": needs data at a multiple of 16 bytes");
  for (int64_t dim = 0; dim < tensor.dim() - 1; ++dim) {
    const bool strided = tensor.size(dim) > 1;
    TORCH_CHECK_VALUE(!strided || (tensor.stride(dim) > 0 && tensor.stride(dim) % 8 == 0), name, ": got strides ",
                      tensor.strides(), ", needs positive multiples of 8");
    TORCH_CHECK_VALUE(tensor.size(dim) < kUnbounded, name, ": got shape ", tensor.sizes(), ", needs lengths below ",
                      kUnbounded);
  }
}

inline void check_int32(const char* name, const at::Tensor& tensor, const at::Tensor& query, int64_t length) {
  check_dtype(name, tensor, at::kInt);
  check_same_device(name, tensor, query);
  check_shape(name, tensor, {length});
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": needs to be contiguous");
}

inline int window_side(const char* name, int64_t keys) {
  TORCH_CHECK_VALUE(keys >= -1, name, ": got ", keys, ", needs -1 or more");
  return keys < 0 || keys > kUnbounded ? kUnbounded : static_cast<int>(keys);
}

// Parameters common to dense and packed calls. `heads` is the dimension of the heads.
inline AttentionParams checked_call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                    int64_t heads, const AttentionOptions& options) {
  check_cuda("query", query);
  check_heads("query", query, query);
  check_heads("key", key, query);
  check_heads("value", value, query);
  const int64_t head_dim = query.size(-1);
  const int64_t num_heads = query.size(heads);
  const int64_t num_kv_heads = key.size(heads);
  TORCH_CHECK_VALUE(0 < head_dim && head_dim <= 256 && head_dim % 8 == 0, "query: got head dim ", head_dim,
                    ", needs a multiple of 8 up to 256");
  TORCH_CHECK_VALUE(key.size(-1) == head_dim, "key: got head dim ", key.size(-1), ", needs the query's, ", head_dim);
  check_shape("value", value, key.sizes());
  TORCH_CHECK_VALUE(num_kv_heads > 0 ? num_heads % num_kv_heads == 0 : num_heads == 0, "key: got ", num_kv_heads,
                    " heads, needs a divisor of the query's ", num_heads);
  TORCH_CHECK_VALUE(std::isfinite(options.scale) && options.scale > 0, "scale: got ", options.scale,
                    ", needs a positive number");
  TORCH_CHECK_VALUE(std::isfinite(options.softcap) && options.softcap >= 0, "softcap: got ", options.softcap,
                    ", needs 0 or a positive number");
  AttentionParams params = {};
  params.q = query.const_data_ptr();
  params.k = key.const_data_ptr();
  params.v = value.const_data_ptr();
  params.q_strides = head_strides(query);
  params.k_strides = head_strides(key);
  params.v_strides = head_strides(value);
  params.num_heads = static_cast<int>(num_heads);
  params.num_kv_heads = static_cast<int>(num_kv_heads);
  params.head_dim = static_cast<int>(head_dim);
  params.top_left = options.top_left;
  params.window_left = window_side("window_left", options.window_left);
  params.window_right = window_side("window_right", options.window_right);
  params.scale = static_cast<float>(options.scale);
  params.softcap = static_cast<float>(options.softcap);
  return params;
}

// q (B, H, Sq, D), k and v (B, Hkv, Sk, D), key_lengths (B,) int32.
inline AttentionParams dense_call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                  const std::optional<at::Tensor>& key_lengths, const AttentionOptions& options) {
  TORCH_CHECK_VALUE(query.dim() == 4, "query: got shape ", query.sizes(), ", needs (B, H, Sq, D)");
  AttentionParams params = checked_call(query, key, value, 1, options);
  TORCH_CHECK_VALUE(key.size(0) == query.size(0), "key: got batch ", key.size(0), ", needs ", query.size(0));
  params.batch = static_cast<int>(query.size(0));
  params.seqlen_q = static_cast<int>(query.size(2));
  params.seqlen_k = static_cast<int>(key.size(2));
  params.total_q = query.size(2);
  params.total_k = key.size(2);
  if (key_lengths.has_value()) {
    check_int32("key_lengths", *key_lengths, query, query.size(0));
    params.key_lengths = key_lengths->const_data_ptr<int32_t>();
  }
  return params;
}

// q (T, H, D), k and v (Tk, Hkv, D), cu_seqlens (B + 1,) int32, ascending from 0.
inline AttentionParams packed_call(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                   const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                                   const AttentionOptions& options) {
  TORCH_CHECK_VALUE(query.dim() == 3, "query: got shape ", query.sizes(), ", needs (T, H, D)");
  AttentionParams params = checked_call(query, key, value, 1, options);
  TORCH_CHECK_VALUE(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) > 0, "cu_seqlens_q: got shape ",
                    cu_seqlens_q.sizes(), ", needs (B + 1,)");
  check_int32("cu_seqlens_q", cu_seqlens_q, query, cu_seqlens_q.size(0));
  check_int32("cu_seqlens_k", cu_seqlens_k, query, cu_seqlens_q.size(0));
  params.batch = static_cast<int>(cu_seqlens_q.size(0) - 1);
  params.total_q = query.size(0);
  params.total_k = key.size(0);
  params.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
  params.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
  return params;
}

// The number of multiprocessors of the current device, which must be a Hopper GPU.
inline int hopper_multiprocessors() {
  DeviceProperties device = {};
  check_launch("cudaDeviceGetAttribute", device_properties(&device));
  TORCH_CHECK_NOT_IMPLEMENTED(device.major == 9 && device.minor == 0,
                              "the attention kernels need compute capability 9.0, this GPU has ", device.major, ".",
                              device.minor);
  return device.multiprocessors;
}

// Whether a forward call uses dynamic tile scheduling (an atomic counter): its tiles differ in length and each block
// processes several.
inline bool wants_tile_counter(const AttentionParams& p, int multiprocessors) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const bool windowed = p.window_left < kUnbounded || p.window_right < kUnbounded;
  if (!packed && !windowed && p.key_lengths == nullptr) return false;
  const int64_t rows = forward_tile(padded_head_dim(p.head_dim), windowed, p.softcap != 0.0f).queries;
  const int64_t query_blocks = ceil_div(p.total_q, rows);
  return query_blocks * p.num_heads * (packed ? 1 : p.batch) > multiprocessors;
}

// The driver's cuTensorMapEncodeTiled, looked up once.
inline TensorMapEncoder tensor_map_encoder() {
  static const TensorMapEncoder encoder = [] {
    void* function = nullptr;
    check_launch("cudaGetDriverEntryPoint", driver_function("cuTensorMapEncodeTiled", &function));
    TORCH_CHECK(function != nullptr, "the CUDA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
    return reinterpret_cast<TensorMapEncoder>(function);
  }();
  return encoder;
}

}  // namespace fastattn
