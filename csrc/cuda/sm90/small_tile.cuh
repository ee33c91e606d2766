// Products of few tokens on int8 matrix units, for encoder layers at low latency. A strip of the weight is the matrix unit's A,
// 64 channels for each warp group, and tokens are its N: tiles go down to 16 tokens, so that 128 tokens are enough for all
// multiprocessors. One more warp keeps the copy engine busy, as many steps of k ahead as shared memory has room.
#pragma once

#include <cstdint>

#include "cuda/sm90/sm90.cuh"

namespace qbert::cuda {

inline constexpr int kStepK = 128;  // a row of the widest swizzle
inline constexpr int kStripChannels = 64;

// kGroups warp groups multiply. Two blocks should fit on a multiprocessor: one waits with its weights while the other ends.
template <int kGroups_, int kTokens_, int kStages_>
struct SmallTile {
    static constexpr int kGroups = kGroups_, kTokens = kTokens_, kStages = kStages_;
    static constexpr int kChannels = kGroups * kStripChannels;
    static constexpr int kProducerWarp = 4 * kGroups;  // the warps before it multiply
    static constexpr int kThreads = 32 * (kProducerWarp + 1);

    struct Stage {
        int8_t weight[kChannels * kStepK];
        int8_t tokens[kTokens * kStepK];
    };
    static_assert(sizeof(Stage) % 1024 == 0);

    struct Pipeline {
        Stage stages[kStages];
        sm90::Barrier full[kStages], empty[kStages];
    };

    // By all threads of the block, which then sync.
    __device__ static void init(Pipeline& pipeline) {
        if (threadIdx.x != 0) return;
        for (int stage = 0; stage < kStages; ++stage) {
            sm90::barrier_init(pipeline.full[stage], 1);
            sm90::barrier_init(pipeline.empty[stage], kProducerWarp);
        }
        sm90::fence_barrier_init();
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
        sm90::barrier_arrive_expect(full, sizeof(stage));
        sm90::copy_box(stage.weight, weight, (part.first_step + step) * kStepK, part.channel, full);
    };
    const auto copy_tokens = [&](int step) {
        auto& stage = pipeline.stages[step % Tile::kStages];
        auto& full = pipeline.full[step % Tile::kStages];
        sm90::copy_box(stage.tokens, tokens, (part.first_step + step) * kStepK, part.token, full);
    };
    const int ahead = part.steps < Tile::kStages ? part.steps : Tile::kStages;
    for (int step = 0; step < ahead; ++step) copy_weight(step);
    pdl_wait();
    pdl_launch_dependents();
    for (int step = 0; step < ahead; ++step) copy_tokens(step);
    for (int step = ahead; step < part.steps; ++step) {
        sm90::barrier_wait(pipeline.empty[step % Tile::kStages], (step / Tile::kStages - 1) % 2);
        copy_weight(step);
        copy_tokens(step);
    }
}

// By the warps that multiply; `sums` as sm90::multiply_s8 has them, of the group's 64 channels, zeros before.
template <class Tile>
__device__ void multiply_steps(typename Tile::Pipeline& pipeline, int group, int steps, int32_t (&sums)[Tile::kTokens / 2]) {
    const uint32_t weight = sm90::shared_address(pipeline.stages[0].weight) + group * kStripChannels * kStepK;
    const uint32_t tokens = sm90::shared_address(pipeline.stages[0].tokens);
    const auto release = [&](int step) {
        if (sm90::lane_index() == 0) sm90::barrier_arrive(pipeline.empty[step % Tile::kStages]);
    };
    sm90::keep_in_place(sums);
    for (int step = 0; step < steps; ++step) {
        const uint32_t offset = step % Tile::kStages * sizeof(typename Tile::Stage);
        sm90::barrier_wait(pipeline.full[step % Tile::kStages], step / Tile::kStages % 2);
        sm90::products_begin();
#pragma unroll
        for (int at = 0; at < kStepK; at += 32) {
            sm90::multiply_s8<Tile::kTokens>(sums, sm90::swizzled_operand(weight + offset + at),
                                             sm90::swizzled_operand(tokens + offset + at), true);
        }
        sm90::products_commit();
        sm90::products_wait<1>();  // those of the step before
        if (step > 0) release(step - 1);
    }
    sm90::products_wait<0>();
    sm90::keep_in_place(sums);
}

}  // namespace qbert::cuda
