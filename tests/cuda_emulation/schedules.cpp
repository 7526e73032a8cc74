// The costs of a call's tiles in the order in which the kernels take them, by the code of the host and the kernels.
#include <algorithm>
#include <functional>
#include <map>
#include <queue>
#include <vector>

#include "attention_runs.h"

using namespace fastattn;

namespace {

// The cost of a tile besides its loop, in blocks of the loop's operand.
constexpr double kPerTile = 1.5;

// kForwardEdgesBetween: as the forward, but blocks at the edges of a window come in their place among the others.
enum Pass { kForward, kKeyGradients, kQueryGradient, kOnePass, kForwardInClusters, kForwardEdgesBetween };

double cost_of(const BlockRange& blocks, int times = 1) { return kPerTile + (blocks.end - blocks.begin) * times; }

// In clusters the cost of each block: all of them load every key.
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
double one_pass_cost(const AttentionParams& params, const OnePassSchedule& schedule, int number) {
  const OnePassWork work = work_of_ticket<Shape>(params, schedule, number);
  return key_cost(params, {work.tile, work.blocks});
}

// The sums of dq of a block of queries: how many tiles of keys have added, and when the next one can see that.
struct Sums {
  int added = 0;
  double seen_at = 0.0;
};

// When a call in one pass ends, in blocks of the loop, on multiprocessors each of which draws a tile when it is done
// with one. From one tile's addition to a block of queries to the next one's it takes `handover`, of which a warp waits
// two thirds for its own sums to land before it takes the next.
template <class Shape>
double one_pass_end(const AttentionParams& params, int multiprocessors, double handover) {
  const OnePassSchedule schedule = one_pass_schedule<Shape>(params);
  const int group_size = params.num_heads / params.num_kv_heads;
  std::map<int64_t, std::vector<Sums>> sums_of;  // by head and sequence
  std::priority_queue<double, std::vector<double>, std::greater<>> idle(std::greater<>(),
                                                                        std::vector<double>(multiprocessors, 0.0));
  double end = 0.0;
  for (int ticket = 0; ticket < schedule.num_tiles; ++ticket) {
    const auto [tile, blocks, walk] = work_of_ticket<Shape>(params, schedule, ticket);
    if (tile.first_key >= tile.sequence.key_rows) continue;
    double now = idle.top() + kPerTile / 2;
    idle.pop();
    std::vector<double> landed;
    for (int member = 0; member < group_size; ++member) {
      const int head = tile.kv_head * group_size + member;
      std::vector<Sums>& sums = sums_of[int64_t{tile.sequence.index} * params.num_heads + head];
      sums.resize(ceil_div(tile.sequence.seen.num_queries, Shape::kBlockM));
      int block = walk.first;
      for (int left = blocks.end - blocks.begin; left > 0; --left, block = walk.after(block)) {
        Sums& sum = sums.at(block);
        if (sum.added != added_before<Shape>(tile, walk, block)) emulator::fail("waits for a tile that is drawn later");
        const size_t step = landed.size();
        const double free = step >= Shape::kDqTiles ? landed[step - Shape::kDqTiles] : 0.0;
        now += 1.0;
        // Where warpgroups take whole blocks dq is handed over a step later, but for the last.
        const double later = Shape::kDqByBlocks && (left > 1 || member + 1 < group_size) ? 1.0 : 0.0;
        const double written = std::max(now + later, free);
        now = written - later;
        const double added_at = std::max(written, sum.seen_at);
        landed.push_back(added_at + handover * 2 / 3);
        sum = {sum.added + 1, added_at + handover};
      }
    }
    now = std::max(now + kPerTile / 2, landed.empty() ? 0.0 : landed.back());
    idle.push(now);
    end = std::max(end, now);
  }
  return end;
}

template <int kHeadDim>
void costs_of(const AttentionParams& params, Pass pass, int64_t capacity, double* costs, int64_t* count) {
  const auto all = [&](const auto& schedule, auto cost) {
    if (schedule.num_tiles > capacity) emulator::fail("more tiles than there is room for");
    for (int number = 0; number < schedule.num_tiles; ++number) costs[number] = cost(params, schedule, number);
    *count = schedule.num_tiles;
  };
  if (pass == kForward || pass == kForwardInClusters || pass == kForwardEdgesBetween) {
    with_forward_shape<half_t, kHeadDim>(params, pass == kForwardInClusters, [&](auto shape) {
      using Shape = decltype(shape);
      TileSchedule schedule = forward_schedule<Shape>(params);
      if (pass == kForwardEdgesBetween) schedule.first_edge = schedule.last_edge = 0;
      all(schedule, forward_cost<Shape>);
    });
  } else if (pass == kQueryGradient) {
    using Shape = QueryGradientShapeFor<half_t, kHeadDim, false>;
    all(query_schedule<Shape>(params), query_gradient_cost<Shape>);
  } else if (pass == kKeyGradients) {
    using Shape = KeyGradientsShapeFor<half_t, kHeadDim, KeyGradients::kBoth, false>;
    all(key_schedule<Shape>(params), key_gradients_cost<Shape>);
  } else if constexpr (has_one_pass(kHeadDim)) {
    using Shape = FusedGradientsShapeFor<half_t, kHeadDim>;
    all(one_pass_schedule<Shape>(params), one_pass_cost<Shape>);
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

// When a call in one pass ends. `sizes` and lengths as for params_of.
extern "C" const char* one_pass_end(const int64_t* sizes, const int32_t* cu_seqlens_q, const int32_t* cu_seqlens_k,
                                    int64_t multiprocessors, double handover, double* end) {
  return emulator::guarded([&] {
    const int64_t strides[12] = {};
    const AttentionParams params = params_of(nullptr, nullptr, nullptr, nullptr, nullptr, strides, sizes, cu_seqlens_q,
                                             cu_seqlens_k, nullptr, 1.0, 0.0);
    const auto ends = [&](auto shape) {
      *end = one_pass_end<decltype(shape)>(params, static_cast<int>(multiprocessors), handover);
    };
    return params.head_dim == 64 ? ends(FusedGradientsShapeFor<half_t, 64>())
                                 : ends(FusedGradientsShapeFor<half_t, 128>());
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
