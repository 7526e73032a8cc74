// What the tiles of a call cost, in the order in which the kernels take them: the host's and the kernels' own code.
#include <algorithm>

#include "attention_runs.h"

using namespace fastattn;

namespace {

// In blocks of the loop's operand: what a tile costs beside them.
constexpr double kPerTile = 1.5;

enum Pass { kForward, kKeyGradients, kQueryGradient, kOnePass, kForwardInClusters };

double cost_of(const BlockRange& blocks, int times = 1) { return kPerTile + (blocks.end - blocks.begin) * times; }

// In clusters that of each block, all of which load every key.
template <class Shape>
double forward_cost(const AttentionParams& params, const TileSchedule& schedule, int number) {
  const QueryTile tile = forward_tile_at<Shape>(params, schedule, number);
  if (Shape::kCluster == 1 && tile.first_query >= tile.sequence.seen.num_queries) return 0.0;
  return cost_of(forward_key_blocks<Shape>(tile.sequence.seen, tile.first_query));
}

template <class Shape>
double query_gradient_cost(const AttentionParams& params, const TileSchedule& schedule, int number) {
  const auto [tile, blocks] = query_work<Shape>(params, schedule, number);
  return tile.first_query < tile.sequence.seen.num_queries ? cost_of(blocks) : 0.0;
}

double key_cost(const AttentionParams& params, const KeyWork& work) {
  if (work.tile.first_key >= work.tile.sequence.key_rows) return 0.0;
  return cost_of(work.blocks, params.num_heads / params.num_kv_heads);
}

template <class Shape>
double key_gradients_cost(const AttentionParams& params, const TileSchedule& schedule, int number) {
  return key_cost(params, key_work<Shape>(params, schedule, number));
}

template <class Shape>
double one_pass_cost(const AttentionParams& params, const TileSchedule& schedule, int number) {
  return key_cost(params, work_of_ticket<Shape>(params, schedule, number));
}

template <int kHeadDim>
void costs_of(const AttentionParams& params, Pass pass, int64_t capacity, double* costs, int64_t* count) {
  const auto all = [&](const TileSchedule& schedule, auto cost) {
    if (schedule.num_tiles > capacity) emulator::fail("more tiles than there is room for");
    for (int number = 0; number < schedule.num_tiles; ++number) costs[number] = cost(params, schedule, number);
    *count = schedule.num_tiles;
  };
  if (pass == kForward || pass == kForwardInClusters) {
    with_forward_shape<half_t, kHeadDim>(params, pass == kForwardInClusters, [&](auto shape) {
      using Shape = decltype(shape);
      all(forward_schedule<Shape>(params), forward_cost<Shape>);
    });
  } else if (pass == kQueryGradient) {
    using Shape = QueryGradientShapeFor<half_t, kHeadDim, false>;
    all(query_schedule<Shape>(params), query_gradient_cost<Shape>);
  } else if (pass == kKeyGradients) {
    using Shape = KeyGradientsShapeFor<half_t, kHeadDim, KeyGradients::kBoth, false>;
    all(key_schedule<Shape>(params), key_gradients_cost<Shape>);
  } else if constexpr (has_one_pass(kHeadDim)) {
    using Shape = FusedGradientsShapeFor<half_t, kHeadDim>;
    all(key_schedule<Shape>(params), one_pass_cost<Shape>);
  }
}

}  // namespace

// `costs`: of each tile by its number, of a pass of a call without softcap; in clusters a number is one of each block.
// `sizes` and lengths as for params_of.
extern "C" const char* tile_costs(int64_t pass, const int64_t* sizes, const int32_t* cu_seqlens_q,
                                  const int32_t* cu_seqlens_k, int64_t capacity, double* costs, int64_t* count) {
  return emulator::guarded([&] {
    const int64_t strides[12] = {};
    const AttentionParams params = params_of(nullptr, nullptr, nullptr, nullptr, nullptr, strides, sizes, cu_seqlens_q,
                                             cu_seqlens_k, nullptr, 1.0, 0.0);
    *count = 0;
    switch (params.head_dim) {
      case 64:
        return costs_of<64>(params, static_cast<Pass>(pass), capacity, costs, count);
      case 128:
        return costs_of<128>(params, static_cast<Pass>(pass), capacity, costs, count);
      default:
        return costs_of<256>(params, static_cast<Pass>(pass), capacity, costs, count);
    }
  });
}

// Key heads whose tiles come together in the passes over keys of a backward without softcap: `heads[0]` in the one for
// dk and dv, `heads[1]` in the one for all gradients, 0 where the head dim has none.
extern "C" const char* key_sections(const int64_t* sizes, int64_t* heads) {
  return emulator::guarded([&] {
    const int64_t strides[12] = {};
    const AttentionParams params =
        params_of(nullptr, nullptr, nullptr, nullptr, nullptr, strides, sizes, nullptr, nullptr, nullptr, 1.0, 0.0);
    const auto sections = [&](auto head_dim) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      heads[0] = key_schedule<KeyGradientsShapeFor<half_t, kHeadDim, KeyGradients::kBoth, false>>(params)
                     .batch_heads_per_section;
      heads[1] = 0;
      if constexpr (has_one_pass(kHeadDim)) {
        heads[1] = key_schedule<FusedGradientsShapeFor<half_t, kHeadDim>>(params).batch_heads_per_section;
      }
    };
    if (params.head_dim <= 64) return sections(std::integral_constant<int, 64>());
    if (params.head_dim <= 128) return sections(std::integral_constant<int, 128>());
    sections(std::integral_constant<int, 256>());
  });
}

// A full call at head dim 128. `runs[i]`: whether it runs in clusters on multiprocessors[i], which hold resident[i] of
// them. `tiles`: number by number the (sequence, key head, query head, first query) of each block of the cluster.
extern "C" const char* clusters_of(const int64_t* sizes, int64_t devices, const int64_t* multiprocessors,
                                   const int64_t* resident, int64_t* runs, int64_t capacity, int64_t* tiles,
                                   int64_t* count) {
  return emulator::guarded([&] {
    using Shape = ClusterShapeFor<half_t, 128>;
    const int64_t strides[12] = {};
    AttentionParams params =
        params_of(nullptr, nullptr, nullptr, nullptr, nullptr, strides, sizes, nullptr, nullptr, nullptr, 1.0, 0.0);
    params.clusters = true;
    for (int64_t i = 0; i < devices; ++i) {
      runs[i] =
          runs_in_clusters<half_t, 128>(params, static_cast<int>(multiprocessors[i]), static_cast<int>(resident[i]));
    }
    const TileSchedule schedule = forward_schedule<Shape>(params);
    *count = int64_t{schedule.num_tiles} * Shape::kCluster;
    if (*count > capacity) emulator::fail("more tiles than there is room for");
    for (int64_t i = 0; i < *count; ++i) {
      const QueryTile tile = forward_tile_at<Shape>(params, schedule, static_cast<int>(i / Shape::kCluster),
                                                    static_cast<int>(i % Shape::kCluster));
      const int64_t row[4] = {tile.sequence.index, tile.head / (params.num_heads / params.num_kv_heads), tile.head,
                              tile.first_query};
      std::copy(row, row + 4, tiles + 4 * i);
    }
  });
}
