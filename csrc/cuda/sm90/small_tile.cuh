// Products of few tokens on int8 matrix units, for encoder layers at low latency. A panel of the weight is the matrix unit's A,
// 64 channels for each warpgroup, and tokens are its N: tiles go down to 16 tokens, so that 128 tokens are enough for all
// SMs. One more warp keeps the copy engine busy, as many steps of k ahead as shared memory has room.
#pragma once

#include <cstdint>

#include "cuda/sm90/sm90.cuh"

namespace qbert::cuda {

inline constexpr int kStepK = 128;  // a row of the widest swizzle
inline constexpr int kPanelChannels = 64;

// kWarpgroups warpgroups multiply. Two CTAs should fit on an SM: one waits with its weights while the other ends.
template <int kWarpgroups_, int kTokens_, int kStages_>
struct SmallTile {
    static constexpr int kWarpgroups = kWarpgroups_, kTokens = kTokens_, kStages = kStages_;
    static constexpr int kChannels = kWarpgroups * kPanelChannels;
    static constexpr int kProducerWarp = 4 * kWarpgroups;  // the warps before it multiply
    static constexpr int kThreads = 32 * (kProducerWarp + 1);

    struct Stage {
        int8_t weight[kChannels * kStepK];
        int8_t tokens[kTokens * kStepK];
    };
    static_assert(sizeof(Stage) % 1024 == 0);

    struct Pipeline {
        Stage stages[kStages];
        sm90::Mbarrier full[kStages], empty[kStages];
    };

    // By all threads of the block, which then sync.
    __device__ static void init(Pipeline& pipeline) {
        if (threadIdx.x != 0) return;
        for (int stage = 0; stage < kStages; ++stage) {
            sm90::mbarrier_init(pipeline.full[stage], 1);
            sm90::mbarrier_init(pipeline.empty[stage], kProducerWarp);
        }
        sm90::fence_mbarrier_init();
    }
};

// What a block multiplies: its first channel and token, and which steps of k.
struct Part {
    int channel, token;
    int first_step, steps;
};

// By one thread. No grid under way writes the weight (w8a8.h), so its first steps do not wait for the grid before. The next
// grid may start when that has ended and no sooner: it runs beside this one, never beside the one before.
template <class Tile>
__device__ void copy_steps(typename Tile::Pipeline& pipeline, const TensorMap& weight, const TensorMap& tokens,
                           const Part& part) {
    const auto copy_weight = [&](int step) {
        auto& stage = pipeline.stages[step % Tile::kStages];
        auto& full = pipeline.full[step % Tile::kStages];
        sm90::mbarrier_arrive_expect_tx(full, sizeof(stage));
        sm90::tma_load(stage.weight, weight, (part.first_step + step) * kStepK, part.channel, full);
    };
    const auto copy_tokens = [&](int step) {
        auto& stage = pipeline.stages[step % Tile::kStages];
        auto& full = pipeline.full[step % Tile::kStages];
        sm90::tma_load(stage.tokens, tokens, (part.first_step + step) * kStepK, part.token, full);
    };
    const int ahead = part.steps < Tile::kStages ? part.steps : Tile::kStages;
    for (int step = 0; step < ahead; ++step) copy_weight(step);
    pdl_wait();
    pdl_launch_dependents();
    for (int step = 0; step < ahead; ++step) copy_tokens(step);
    for (int step = ahead; step < part.steps; ++step) {
        sm90::mbarrier_wait(pipeline.empty[step % Tile::kStages], (step / Tile::kStages - 1) % 2);
        copy_weight(step);
        copy_tokens(step);
    }
}

// By the warps that multiply; `sums` as sm90::wgmma_s8 has them, of the warpgroup's 64 channels, zeros before.
template <class Tile>
__device__ void multiply_steps(typename Tile::Pipeline& pipeline, int warpgroup, int steps,
                               int32_t (&sums)[Tile::kTokens / 2]) {
    const uint32_t weight = sm90::shared_address(pipeline.stages[0].weight) + warpgroup * kPanelChannels * kStepK;
    const uint32_t tokens = sm90::shared_address(pipeline.stages[0].tokens);
    const auto release = [&](int step) {
        if (sm90::lane_index() == 0) sm90::mbarrier_arrive(pipeline.empty[step % Tile::kStages]);
    };
    sm90::warpgroup_fence_operand(sums);
    for (int step = 0; step < steps; ++step) {
        const uint32_t offset = step % Tile::kStages * sizeof(typename Tile::Stage);
        sm90::mbarrier_wait(pipeline.full[step % Tile::kStages], step / Tile::kStages % 2);
        sm90::warpgroup_arrive();
#pragma unroll
        for (int at = 0; at < kStepK; at += 32) {
            sm90::wgmma_s8<Tile::kTokens>(sums, sm90::smem_descriptor(weight + offset + at),
                                          sm90::smem_descriptor(tokens + offset + at), true);
        }
        sm90::warpgroup_commit();
        sm90::warpgroup_wait<1>();  // those of the step before
        if (step > 0) release(step - 1);
    }
    sm90::warpgroup_wait<0>();
    sm90::warpgroup_fence_operand(sums);
}

}  // namespace qbert::cuda
