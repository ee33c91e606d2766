// What the kernel for many tokens consists of: what a launch tells it, its shared memory, and what a thread of a consumer
// holds.
#pragma once

#include "cuda/sm90/arch.h"
#include "cuda/sm90/expand.cuh"
#include "cuda/sm90/lowbit_plan.h"
#include "cuda/sm90/sm90.cuh"
#include "cuda/sm90/tensor_map.h"

namespace qbert::cuda {


// Threads: the producer's warpgroup, of which one or two warps work, and the consumers'.
inline constexpr int kWarpgroupWarps = kWarpgroupThreads / 32, kConsumers = 2;
inline constexpr int kWarpgroupPanels = 2, kWarpgroupChannels = kWarpgroupPanels * kBlockRows;  // of a consumer at a time
inline constexpr int kManyThreads = (1 + kConsumers) * kWarpgroupThreads;
// Named barriers: a consumer's turn at the matrix units, and a consumer's own four warps.
inline constexpr unsigned kOrderBarrier = 1, kWarpgroupBarrier = kOrderBarrier + kConsumers;

// Group scales (n, groups) as a thread reads them: the word of four bytes where a block's 4, 2 or 1 scales of a row begin, and
// the next one if they go on there.
struct ManyGroupScales {
    const uint32_t* words;
    int skew, last;     // bytes of the first word that come before; the last word
    int groups;         // of a row
    uint64_t step;      // groups of a block, times 2**32, rounded up
    int of_block;       // 4, 2, 1
    uint32_t selector;  // of prmt: a scale for each of four steps
};

struct ManyParameters {
    TensorMap tokens;  // boxes of half a tile's tokens
    LowbitPlan plan;
    int clusters;
    int t, n, k, blocks;

    const unsigned char* codes;
    int panels;
    ManyGroupScales group_scales;
    const int8_t* codebook;
    const float* scale;
    int rows_of_scale;

    const float* s;
    Outliers outliers;
    const unsigned char* columns;
    const void* bias;
    FloatType bias_type;
    unsigned char* out;
    int64_t out_pitch;
    bool whole_pieces;  // rows of out start at multiples of 16 bytes
    Finish finish;
};

// A cluster's tiles are cluster_index() + i * p.clusters.
__device__ inline int cluster_index() { return static_cast<int>(blockIdx.x) / kClusterCtas; }
__device__ inline int cluster_tiles(const ManyParameters& p) {
    return (p.plan.tiles() - cluster_index() + p.clusters - 1) / p.clusters;
}

// A kernel's constants and its shared memory: stages of tokens and codes, what the consumers' results pass through, barriers.
template <Code kCode_, LowbitTileIndex kIndex, class Out_>
struct ManyMemory {
    using Out = Out_;
    static constexpr Code kCode = kCode_;
    static constexpr int kTokens = kLowbitTiles[kIndex].tokens;
    static constexpr bool kPingpong = kLowbitTiles[kIndex].pingpong;
    static constexpr int kTileChannels = kLowbitTiles[kIndex].channels, kStagePanels = kTileChannels / kBlockRows;
    // Registers of a thread once they have been shared out again: the sums of 128 tokens leave a producer just what it needs.
    static constexpr int kProducerRegisters = kTokens == 128 ? 24 : 40, kConsumerRegisters = kTokens == 128 ? 240 : 232;
    static constexpr int kUsers = kPingpong ? 1 : kConsumers;  // warpgroups of a block that a stage is for
    static_assert(kStagePanels == kUsers * kWarpgroupPanels);

    static constexpr int kTokenBytes = kTokens * kBlockColumns;
    static constexpr int kCodeBytes = block_bytes(kCode);
    static constexpr int kStageBytes = kTokenBytes + kStagePanels * kCodeBytes;
    static_assert(kStageBytes % 1024 == 0);  // swizzled tokens

    // A chunk of a tile's tokens. A token's row holds words of what one thread has: a float32, two 16-bit floats of rows g and
    // g + 8, or int8 of these rows of both panels. Four more words make the rows of the four tokens that a warp writes at once
    // start eight banks apart.
    static constexpr int kChunkTokens = kTokens < 128 / static_cast<int>(sizeof(Out)) ? kTokens : 128 / sizeof(Out);
    static constexpr int kRowWords = kWarpgroupChannels * static_cast<int>(sizeof(Out)) / 4 + 4;
    static constexpr int kChunkBytes = kChunkTokens * kRowWords * 4;

    static constexpr bool kHasScales = kCode == Code::int4;
    static constexpr int kScaleBytes = kHasScales ? kTileChannels * 4 : 0;  // of a stage: a word a row, see RowMeaning

    static constexpr int kBarriersMax = 1024;
    static constexpr int kStageBudget = kH100.cta_shared - kConsumers * kChunkBytes - kBarriersMax;
    static constexpr int kFitting = kStageBudget / (kStageBytes + kScaleBytes), kStages = kFitting < 8 ? kFitting : 8;
    static constexpr int kChunksAt = kStages * kStageBytes, kScalesAt = kChunksAt + kConsumers * kChunkBytes;
    static constexpr int kBarriersAt = kScalesAt + kStages * kScaleBytes, kBytes = kBarriersAt + kBarriersMax;

    unsigned char* base = sm90::shared_memory();

    __device__ unsigned char* tokens(int stage) const { return base + stage * kStageBytes; }
    __device__ unsigned char* codes(int stage, int panel) const {
        return tokens(stage) + kTokenBytes + panel * kCodeBytes;
    }
    __device__ uint32_t* chunk(int consumer) const {
        return reinterpret_cast<uint32_t*>(base + kChunksAt + consumer * kChunkBytes);
    }
    __device__ uint32_t* scales(int stage) const {
        return reinterpret_cast<uint32_t*>(base + kScalesAt + stage * kScaleBytes);
    }
    __device__ sm90::Mbarrier* barriers() const { return reinterpret_cast<sm90::Mbarrier*>(base + kBarriersAt); }
    __device__ sm90::Mbarrier& full(int stage) const { return barriers()[stage]; }
    __device__ sm90::Mbarrier& empty(int stage) const { return barriers()[kStages + stage]; }
};

// A stage of the ring and the parity of its round.
template <int kStages>
struct Ring {
    int stage;
    unsigned parity;

    __device__ explicit Ring(int position) : stage(position % kStages), parity(position / kStages % 2) {}
    __device__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    __device__ int before() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// A consumer's part of a tile, as a thread has it: which rows and tokens, and their sums.
template <class Memory>
struct ManyTile {
    static constexpr int kRows = 2 * kWarpgroupPanels;   // of a thread: g and g + 8 of each panel
    static constexpr int kSums = Memory::kTokens / 2;  // of a thread and panel

    const ManyParameters& p;
    const int warpgroup;
    int first_channel = 0, first_token = 0;
    int32_t sums[kWarpgroupPanels][kSums];

    // The compiler must see that the warpgroup is the same in all lanes: products in branches that it takes for divergent
    // wait for each other (C7520).
    __device__ ManyTile(const ManyParameters& p_, int warpgroup_) : p(p_), warpgroup(warpgroup_) {}

    __device__ void go_to(int tile) {
        const LowbitPlan::TileCoord coord = p.plan.coord(tile);
        const int channel_tile = coord.channel_pair * kClusterCtas + static_cast<int>(sm90::cluster_rank());
        first_channel = channel_tile * Memory::kTileChannels + first_panel() * kBlockRows;
        first_token = coord.token_tile * Memory::kTokens;
    }

    __device__ static unsigned thread() { return threadIdx.x % kWarpgroupThreads; }  // asked for anew: a register is dearer
    __device__ int first_panel() const { return Memory::kPingpong ? 0 : warpgroup * kWarpgroupPanels; }  // of a stage
    // Where wgmma's operand and accumulators are: rows 16 warp + g and 8 more, tokens 8 i + 2 c and the next.
    __device__ static int warp() { return static_cast<int>(thread() / 32); }
    __device__ static int g() { return static_cast<int>(thread() / 4 % 8); }
    __device__ static int c() { return static_cast<int>(thread() % 4); }

    // A thread's row 2 * panel + half of a panel: among the warpgroup's, its channel, and the same kept within the matrix.
    __device__ static int row_of_warpgroup(int row) { return row / 2 * kBlockRows + warp() * 16 + g() + row % 2 * 8; }
    __device__ int channel(int row) const { return first_channel + row_of_warpgroup(row); }
    __device__ int real_channel(int row) const { return channel(row) < p.n ? channel(row) : p.n - 1; }

    // Value j of four of a row: token 8 (j / 2) + 2 (c()) + j % 2 of the tile. Sums become floats where they lie.
    static constexpr int sum_of(int row, int j) { return j / 2 * 4 + row % 2 * 2 + j % 2; }
    __device__ float value(int row, int j) const { return __int_as_float(sums[row / 2][sum_of(row, j)]); }
    __device__ void set_value(int row, int j, float to) { sums[row / 2][sum_of(row, j)] = __float_as_int(to); }

    __device__ void fence_sums() {
#pragma unroll
        for (int i = 0; i < kWarpgroupPanels; ++i) sm90::warpgroup_fence_operand(sums[i]);
    }
};

}  // namespace qbert::cuda
