// The tiles of the Hopper attention kernels, by head dim and by what the call needs, as data.
#pragma once

namespace fastattn {

struct TileSize {
  int queries;
  int keys;
};

// Head dims with kernels of their own; the others use the next one.
constexpr int kHeadDims[] = {64, 128, 256};

constexpr int padded_head_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// Forward. `windowed`: causality or a window cuts blocks short, so that wide ones waste products at their edges.
//
//   64   a block's keys fit beside three warpgroups of queries; the cap's tanh takes registers that three do not have
//   128  176 keys are what 227 KB of shared memory hold beside 128 queries
//   256  80 keys, likewise
constexpr TileSize forward_tile(int head_dim, bool windowed, bool softcap) {
  if (head_dim == 64) return softcap ? TileSize{128, 128} : TileSize{192, 128};
  if (head_dim == 128) return windowed || softcap ? TileSize{128, 128} : TileSize{128, 176};
  return {128, 80};
}

}  // namespace fastattn
