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

// Forward. `windowed`: causality or a window masks parts of blocks, so that wide blocks waste products at the mask's
// edges.
//
//   64   a block of keys fits beside three warpgroups of queries; the softcap's tanh needs registers that three lack
//   128  176 keys are what 227 KB of shared memory hold beside 128 queries
//   256  80 keys, likewise
constexpr TileSize forward_tile(int head_dim, bool windowed, bool softcap) {
  if (head_dim == 64) return softcap ? TileSize{128, 128} : TileSize{192, 128};
  if (head_dim == 128) return windowed || softcap ? TileSize{128, 128} : TileSize{128, 176};
  return {128, 80};
}

// Blocks per cluster in forward calls whose queries see every key; 1 where no cluster kernel exists. With 128 queries
// per block at this head dim the main loop would otherwise need 32 bytes a cycle from the L2 cache.
constexpr int forward_cluster(int head_dim) { return head_dim == 128 ? 2 : 1; }

// Gradients of keys and values: `keys` of a block, 64 per warpgroup, which loops over blocks of `queries`. Registers
// decide: a thread holds keys * head_dim / 128 sums of each gradient, three blocks of keys * queries / 256 scores, and
// the cap's slopes beside. Above 128 it holds the sums of one gradient: of the 64 keys that both warpgroups share, or
// with a cap, whose slopes would have to be handed over too, one after the other.
constexpr TileSize key_gradients_tile(int head_dim, bool softcap) {
  if (head_dim == 64) return {64, 128};
  if (head_dim == 128) return {softcap ? 32 : 64, 128};
  return softcap ? TileSize{32, 128} : TileSize{64, 64};
}

// Gradient of queries: `queries` of a block, which loops over blocks of `keys`. Likewise; at 256 shared memory decides.
constexpr TileSize query_gradient_tile(int head_dim, bool softcap) {
  if (head_dim == 64) return {128, 128};
  if (head_dim == 128) return {128, softcap ? 64 : 128};
  return {128, softcap ? 32 : 48};
}

// Whether all gradients can come from one pass, with the tiles of key_gradients_tile. Above 128 the sums of both
// gradients do not fit the registers.
constexpr bool has_one_pass(int head_dim) { return head_dim <= 128; }

}  // namespace fastattn
