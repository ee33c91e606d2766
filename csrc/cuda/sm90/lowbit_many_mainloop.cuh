// The main loop of the kernel for many tokens: the producer's copies, and the consumers' products beside the expansion of the
// codes that come next.
#pragma once

#include "cuda/sm90/lowbit_many_tile.cuh"

namespace qbert::cuda {

// ---- producer ---------------------------------------------------------------------------------------------------------

template <class Memory>
class Producer {
  public:
    __device__ explicit Producer(const ManyParameters& p_) : p(p_) {}

    // Weights do not wait for the grid before, which may still make the tokens: a ring of them is under way when it ends.
    __device__ void run() {
        go_to_first();
        for (int stage = 0; stage < Memory::kStages && has_more(); ++stage) fetch_codes(stage), next();
        pdl_wait();
        go_to_first();
        bool has_codes = true;
        for (Ring<Memory::kStages> ring(0); has_more(); next()) {
            if (!has_codes) {
                sm90::mbarrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
                fetch_codes(ring.stage);
            }
            fetch_tokens(ring.stage);
            ring.advance();
            has_codes = has_codes && ring.stage != 0;
        }
    }

  private:
    __device__ void go_to_first() { go_to(cluster_index()); }
    __device__ bool has_more() const { return tile < p.plan.tiles(); }
    __device__ void next() {
        if (++block == p.blocks) go_to(tile + p.clusters);
    }
    __device__ void go_to(int to) {
        const LowbitPlan::TileCoord coord = p.plan.coord(to);
        tile = to;
        block = 0;
        panel = (coord.channel_pair * kClusterCtas + rank()) * Memory::kStagePanels;
        token = coord.token_tile * Memory::kTokens + rank() * kHalf;
    }
    __device__ void fetch_codes(int stage) const {
        sm90::Mbarrier& full = memory.full(stage);
        sm90::mbarrier_arrive_expect_tx(full, Memory::kStageBytes);
#pragma unroll 1
        for (int i = 0; i < Memory::kStagePanels; ++i) {
            const int real = panel + i < p.panels ? panel + i : p.panels - 1;  // beyond the last: any, it is not stored
            sm90::bulk_copy(memory.codes(stage, i), p.codes + int64_t{real * p.blocks + block} * Memory::kCodeBytes,
                             Memory::kCodeBytes, full);
        }
    }
    __device__ void fetch_tokens(int stage) const {
        sm90::tma_load_multicast(memory.tokens(stage) + rank() * kHalf * kBlockColumns, p.tokens, block * kBlockColumns, token,
                                 memory.full(stage), (1 << kClusterCtas) - 1);
    }
    __device__ static int rank() { return static_cast<int>(sm90::cluster_rank()); }

    static constexpr int kHalf = Memory::kTokens / kClusterCtas;  // tokens that this block fetches for both
    const ManyParameters& p;
    const Memory memory{};
    int tile, block, panel, token;  // what comes next
};

// ---- group scales ----------------------------------------------------------------------------------------------------

// A row's group scales of a block, a byte for each step. Those of padding beyond the last group may be any: its codes are 0.
__device__ inline uint32_t load_scales(const ManyGroupScales& g, int row, int block) {
    const int at = g.skew + row * g.groups + static_cast<int>(static_cast<uint64_t>(block) * g.step >> 32);
    const uint32_t low = g.words[at / 4];
    const bool goes_on = at % 4 + g.of_block > 4 && at / 4 < g.last;
    const uint32_t high = goes_on ? g.words[at / 4 + 1] : 0;
    return sm90::prmt(static_cast<uint32_t>((uint64_t{high} << 32 | low) >> at % 4 * 8), 0, g.selector);
}

// A warp beside the producer puts them into the stages: no copy could take them, which are as narrow as a byte a row, and the
// consumers have neither instructions nor registers for their addresses.
template <class Memory>
__device__ void put_scales(const ManyParameters& p) {
    const Memory memory{};
    const int lane = sm90::lane_index(), rank = static_cast<int>(sm90::cluster_rank());
    Ring<Memory::kStages> ring(0);
    for (int i = 0; i < cluster_tiles(p); ++i) {
        const LowbitPlan::TileCoord coord = p.plan.coord(cluster_index() + i * p.clusters);
        const int first = (coord.channel_pair * kClusterCtas + rank) * Memory::kTileChannels;
        for (int block = 0; block < p.blocks; ++block, ring.advance()) {
            sm90::mbarrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
#pragma unroll 2
            for (int row = lane; row < Memory::kTileChannels; row += 32) {
                const int channel = first + row < p.n ? first + row : p.n - 1;
                memory.scales(ring.stage)[row] = load_scales(p.group_scales, channel, block);
            }
            __syncwarp();
            if (lane == 0) sm90::mbarrier_arrive(memory.full(ring.stage));
        }
    }
}

// ---- products ---------------------------------------------------------------------------------------------------------

template <class Memory>
class ManyMainloop {
    static constexpr Code kCode = Memory::kCode;
    static constexpr int kTokens = Memory::kTokens, kRows = ManyTile<Memory>::kRows, kSums = ManyTile<Memory>::kSums;
    using Operand = uint32_t[kWarpgroupPanels][kSteps][kStepRegisters];

  public:
    __device__ explicit ManyMainloop(ManyTile<Memory>& tile_) : p(tile_.p), tile(tile_) {}

    // A warpgroup's turn comes when the other's last block has arrived: the products of that one last as long as this one's
    // first expansion. Not before, as a wait for a stage could then mean the round before the last.
    __device__ void multiply(int position, bool wait_for_turn, bool pass_turn) {
        Ring<Memory::kStages> at(position);
        Meanings meaning;
        Operand even, odd;  // of blocks of these numbers
        if constexpr (!Memory::kHasScales) load_codebooks(meaning);
#pragma unroll
        for (int i = 0; i < kWarpgroupPanels; ++i) {
#pragma unroll
            for (int j = 0; j < kSums; ++j) tile.sums[i][j] = 0;
        }
        if (wait_for_turn) sm90::named_barrier_sync(kOrderBarrier + tile.warpgroup, kConsumers * kWarpgroupThreads);
        expand_first(at, even, meaning);
        tile.fence_sums();
        int block = 0;
        for (; block + 2 < p.blocks; block += 2) {
            multiply_and_expand(at, block == 0, even, odd, meaning);
            multiply_and_expand(at, false, odd, even, meaning);
        }
        const bool one_more = block + 2 == p.blocks;
        if (one_more) multiply_and_expand(at, block == 0, even, odd, meaning);
        if (pass_turn) sm90::named_barrier_arrive(kOrderBarrier + 1 - tile.warpgroup, kConsumers * kWarpgroupThreads);
        if (one_more) {
            multiply_last(at, odd);
        } else {
            multiply_last(at, even);
        }
        if (p.blocks > 1) {
            sm90::warpgroup_wait<1>();
            release(at.before());
        }
        sm90::warpgroup_wait<0>();
        release(at.stage);
        tile.fence_sums();
    }

  private:
    // What the codes of the thread's rows mean: for a tile, of int4 for a block.
    using Meanings = RowMeaning<kCode>[kRows];

    __device__ void load_codebooks(Meanings& to) const {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            to[row] = load_codebook<kCode>(p.codebook, tile.real_channel(row) / p.rows_of_scale);
        }
    }
    __device__ void load_block_scales(int stage, Meanings& to) const {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            to[row].scales = memory.scales(stage)[tile.first_panel() * kBlockRows + tile.row_of_warpgroup(row)];
        }
    }

    // A step of the next block's operand, from shared memory; steps come in order, and loads a piece at a time.
    __device__ void expand(int stage, int step, uint32_t (&words)[kWarpgroupPanels][thread_words(kCode)],
                           Meanings& meaning, Operand& to) const {
        if constexpr (Memory::kHasScales) {
            if (step == 0) load_block_scales(stage, meaning);
        }
#pragma unroll
        for (int i = 0; i < kWarpgroupPanels; ++i) {
            const unsigned char* codes = memory.codes(stage, tile.first_panel() + i);
            if (step % 2 == 0) load_piece<kCode>(codes, static_cast<int>(tile.thread()), step / 2, words[i]);
            expand_step<kCode>(words[i], meaning[2 * i], meaning[2 * i + 1], step, to[i][step]);
            sm90::warpgroup_fence_operand(to[i][step]);  // now, not just before the product that reads it
        }
    }

    __device__ void multiply_step(int stage, int step, const Operand& operand) {
        const uint64_t tokens = sm90::smem_descriptor(sm90::shared_address(memory.tokens(stage)) + step * kStepColumns);
#pragma unroll
        for (int i = 0; i < kWarpgroupPanels; ++i) sm90::wgmma_s8<kTokens>(tile.sums[i], operand[i][step], tokens, true);
    }

    // What the other block's producer fills too is released in both.
    __device__ void release(int stage) const {
        __syncwarp();
        if (tile.thread() % 32 < kClusterCtas) sm90::mbarrier_arrive_cluster(memory.empty(stage), tile.thread() % 32);
    }

    // Products of one block while the next block's operand is made.
    __device__ void multiply_and_expand(Ring<Memory::kStages>& at, bool first, const Operand& operand, Operand& next,
                                        Meanings& meaning) {
        Ring<Memory::kStages> after = at;
        after.advance();
        uint32_t words[kWarpgroupPanels][thread_words(kCode)];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            sm90::warpgroup_arrive();
            multiply_step(at.stage, step, operand);
            if (step == 0) {
                sm90::warpgroup_commit();
                sm90::warpgroup_wait<1>();  // the block before is done with: its operand's registers and its stage
                if (!first) release(at.before());
                sm90::mbarrier_wait(memory.full(after.stage), after.parity);
            }
            expand(after.stage, step, words, meaning, next);
        }
        sm90::warpgroup_commit();
        at = after;
    }

    __device__ void multiply_last(const Ring<Memory::kStages>& at, const Operand& operand) {
        sm90::warpgroup_arrive();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) multiply_step(at.stage, step, operand);
        sm90::warpgroup_commit();
    }

    __device__ void expand_first(const Ring<Memory::kStages>& at, Operand& to, Meanings& meaning) const {
        sm90::mbarrier_wait(memory.full(at.stage), at.parity);
        uint32_t words[kWarpgroupPanels][thread_words(kCode)];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) expand(at.stage, step, words, meaning, to);
    }

    const ManyParameters& p;
    const Memory memory{};
    ManyTile<Memory>& tile;
};

}  // namespace qbert::cuda
