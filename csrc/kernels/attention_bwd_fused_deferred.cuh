// The loop of a pass for all gradients in which each warpgroup takes dq of every other block of queries.
//
// dq of a block waits for ds of both warpgroups. So its product is not issued in the block's own step but in the next
// one, by which the other warpgroup has written its part: neither stops for the other, and the softmax of one falls
// into the products of the other.
#pragma once

#include <type_traits>

#include "attention_bwd_fused_common.cuh"

namespace fastattn {

// The sums over all queries for the 64 keys of warpgroup kConsumer, and what all keys of the tile add to dq of the
// steps whose parity is kConsumer.
template <int kConsumer, class Shape, int Accumulators>
FASTATTN_DEVICE void accumulate_by_blocks(const AttentionBackwardParams& params, const KeyTile& tile,
                                          const BlockRange& blocks, const BlockWalk& walk,
                                          const KeyGradientsShared<Shape>& shared, float (&dk)[Accumulators],
                                          float (&dv)[Accumulators]) {
  using T = typename Shape::Element;
  constexpr int kBlockM = Shape::kBlockM;
  constexpr int kConsumerThreads = Shape::kConsumers * kWarpgroupThreads;
  constexpr int kFirstRow = kConsumer * 64;
  constexpr std::bool_constant<true> own;     // a step whose dq is this warpgroup's
  constexpr std::bool_constant<false> other;  // and one with the product for dq of the step before
  const ScoreScale score_scale(params.call);
  auto& queries = shared.barriers->queries;
  int steps_left = (blocks.end - blocks.begin) * (params.call.num_heads / params.call.num_kv_heads);

  // Only products write these: anything else that did would have to wait for those still in flight.
  float scores[kBlockM / 2];
  float dp[kBlockM / 2];
  float dq[Shape::kDqColumns / 2];
  uint32_t p_operand[kBlockM / 16][4];
  uint32_t ds_operand[kBlockM / 16][4];
  typename Pipeline<Shape::kStages>::State state;
  KeyOperands<Shape> operands = {shared.keys, shared.values, kFirstRow};
  int step = 0;
  int block = walk.first;
  const auto start_scores = [&](int stage) {
    wgmma_fence();
    operands.multiply_keys(scores, shared.queries(stage));
    wgmma_commit();
  };
  const auto start_dp = [&](int stage) {
    wgmma_fence();
    operands.multiply_values(dp, shared.dout(stage));
    wgmma_commit();
  };
  const auto await_ds = [&] { named_barrier_sync(kDsWritten + kConsumer, kConsumerThreads); };
  const auto start_dq = [&](int of_step) {
    wgmma_fence();
    multiply_columns<T, kBlockM, Shape::kBlockN>(dq, ds_tile(shared, of_step), shared.keys, 0);
    wgmma_commit();
  };
  const auto hand_over = [&] { hand_over_dq<Shape>(shared, dq, kConsumer, 0); };

  // A step's products for dv and dk and, with `has_dq`, for dq of the step before; dk and dq are in flight afterwards.
  //
  // Tiles of ds are used again after four steps. A warpgroup waits for ds of its step before it writes that of the
  // next, so when the other one gets there it has read its own of the step before that.
  const auto sum_gradients = [&](auto whose, auto has_dq) {
    wgmma_wait<1>();
    pin_registers(scores);
    float p[kBlockM / 2];
    float slope[1];
    probabilities<Shape>(score_scale, tile, blocks, kFirstRow, block, shared.lse_log2(state.stage), scores, p, slope);
    to_operand<T>(p, p_operand);
    pin_registers(p_operand);
    wgmma_fence();
    multiply_add<T, kBlockM>(dv, p_operand, shared.dout(state.stage));
    wgmma_commit();

    wgmma_wait<1>();
    pin_registers(dp);
    float ds[kBlockM / 2];
    score_gradients<Shape>(score_scale, shared.delta(state.stage), p, dp, slope, ds);
    to_operand<T>(ds, ds_operand);
    pin_registers(ds_operand);
    if constexpr (decltype(has_dq)::value) await_ds();
    store_transposed<kBlockM>(ds_tile(shared, step), kFirstRow + warp_index() % 4 * 16, ds_operand);
    fence_proxy_async();
    if constexpr (!decltype(whose)::value) named_barrier_arrive(kDsWritten + 1 - kConsumer, kConsumerThreads);
    wgmma_fence();
    multiply_add<T, kBlockM>(dk, ds_operand, shared.queries(state.stage));
    wgmma_commit();
    if constexpr (decltype(has_dq)::value) start_dq(step - 1);
  };
  // Starts the next step's products for scores and dp, and ends those of this one.
  const auto start_next = [&](auto has_dq) {
    auto next = state;
    next.advance();
    queries.wait_full(next);
    start_scores(next.stage);
    wgmma_wait<1>();
    release_stage(queries, state);
    start_dp(next.stage);
    if constexpr (decltype(has_dq)::value) hand_over();
    state = next;
    ++step;
    block = walk.after(block);
  };

  const auto run = [&] {
    start_scores(state.stage);
    start_dp(state.stage);
    if constexpr (kConsumer == 1) {
      sum_gradients(other, std::false_type());
      if (--steps_left == 0) return wgmma_wait<0>();
      start_next(std::false_type());
    }
    for (;;) {
      sum_gradients(own, std::false_type());
      if (--steps_left == 0) {
        wgmma_wait<0>();
        await_ds();
        start_dq(step);
        wgmma_wait<0>();
        return hand_over();
      }
      start_next(std::false_type());
      sum_gradients(other, std::true_type());
      if (--steps_left == 0) {
        wgmma_wait<0>();
        return hand_over();
      }
      start_next(std::true_type());
    }
  };

  mbarrier_wait(&shared.barriers->keys, 0);
  if (steps_left == 0) return;
  operands.load();
  queries.wait_full(state);
  run();
  pin_registers(dv);
  pin_registers(dk);
  named_barrier_sync(kKeysRead, kConsumerThreads);  // the other warpgroup's products for dq read this one's keys too
}

}  // namespace fastattn
