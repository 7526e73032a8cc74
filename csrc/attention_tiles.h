// Tile sizes of the Hopper attention kernels, by head dim and by the options of the call.
#pragma once

namespace fastattn {

struct TileSize {
  int queries;
  int keys;
};

// Head dims that have kernels; other head dims use the next larger one.
constexpr int kHeadDims[] = {64, 128, 256};

constexpr int padded_head_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// Forward. `windowed`: causality or a window masks scores within tiles; with narrower blocks of keys fewer products are
// wasted on masked scores.
//
//   64   a block of keys fits beside three warpgroups of queries; the softcap's tanh needs registers that three lack
//   128  176 keys are what 227 KB of shared memory hold beside 128 queries
//   256  80 keys fill the shared memory in the same way
constexpr TileSize forward_tile(int head_dim, bool windowed, bool softcap) {
  if (head_dim == 64) return softcap ? TileSize{128, 128} : TileSize{192, 128};
  if (head_dim == 128) return windowed || softcap ? TileSize{128, 128} : TileSize{128, 176};
  return {128, 80};
}

// Blocks per cluster in forward calls whose queries see every key; 1 where no cluster kernel exists. With 128 queries
// per block at this head dim the main loop would otherwise need 32 bytes a cycle from the L2 cache.
constexpr int forward_cluster(int head_dim) { return head_dim == 128 ? 2 : 1; }

// The pass for dk and dv: a block of threads owns `keys` keys, 64 per warpgroup, and loops over blocks of `queries`
// queries. Registers set the sizes: a thread holds keys * head_dim / 128 accumulators of each gradient, three score
// tiles of keys * queries / 256 values each, and with a softcap its derivatives. Above head dim 128 the accumulators of
// one gradient fit: both warpgroups own the same 64 keys and hold one gradient each. With a softcap, whose derivatives
// would have to be passed between them too, two passes compute one gradient each.
constexpr TileSize key_gradients_tile(int head_dim, bool softcap) {
  if (head_dim == 64) return {64, 128};
  if (head_dim == 128) return {softcap ? 32 : 64, 128};
  return softcap ? TileSize{32, 128} : TileSize{64, 64};
}

// The pass for dq: a block of threads owns `queries` queries and loops over blocks of `keys` keys. Registers set the
// sizes; at head dim 256 shared memory does.
constexpr TileSize query_gradient_tile(int head_dim, bool softcap) {
  if (head_dim == 64) return {128, 128};
  if (head_dim == 128) return {128, softcap ? 64 : 128};
  return {128, softcap ? 32 : 48};
}

// Whether one pass can compute all gradients, with the tiles of key_gradients_tile. Above head dim 128 the accumulators
// of dk and dv do not fit the registers.
constexpr bool has_one_pass(int head_dim) { return head_dim <= 128; }

}  // namespace fastattn
