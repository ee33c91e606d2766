// Codebook or int4 weights times int8 tokens on Hopper's matrix units, for many tokens: Y^T = W X^T, weights as wgmma's A
// operand from registers, expanded from 3 or 4 bits while the products of the block before run.
//
// A block is a producer warp and two consumer warpgroups. In pingpong each owns whole tiles of 128 channels x 128 (or 64)
// tokens, so that the end of one's tile (outliers, GELU, rounding) hides behind the other's products; in cooperation both share
// a tile of 256 channels, which halves what its tokens cost. Blocks are persistent; clusters of two, neighbours along the
// channels, share their tokens: each fetches half of them and sends it to both.
//
// In cycles of an SM, by arithmetic, for a step of 128 columns and 128 tokens, whose products take 512:
//
//     products        2 panels x 4 steps x 64 (64 x 128 x 32 at 4096 multiply-adds)                              512
//     expansion       instructions of a warp, two cycles each of a scheduler: dict3 84, int4 144, dict4 176      168 ... 352
//     shared memory   tokens read by the products 32 KB, written 16; codes written and read 6 ... 8 each:
//                     60 ... 64 KB at 128 bytes (in cooperation 52 ... 56)                                       480 ... 512
//     from L2         8 KB of tokens (16 without the pair) and 6 ... 8 of codes: 14 ... 16 KB, 28 ... 32 bytes a cycle,
//                     what all SMs together can have; without the pair it would be 44 ... 48
//
// So the matrix units need never wait, if expansion runs beside them: a batch of products is under way while the registers of
// the next are made (two sets of 32). Products of a step are issued in pairs with a quarter of the next block's expansion
// between them, so that this holds whether issuing a product waits for the one before or not.
//
// Tiles of 64 tokens are for problems with too few tiles of 128 to fill the GPU: a step is then as long as its expansion.
#pragma once

#include "cuda/common/error.h"
#include "cuda/common/grid.h"
#include "cuda/sm90/lowbit_many.h"
#include "cuda/sm90/lowbit_many_epilogue.cuh"
#include "cuda/sm90/lowbit_many_mainloop.cuh"

namespace qbert::cuda {

// A consumer's tiles: every second of the cluster's, or its half of all.
template <class Memory>
__device__ void consume(const ManyParameters& p, int warpgroup) {
    constexpr bool kPingpong = Memory::kPingpong;
    ManyTile<Memory> tile(p, warpgroup);
    const int tiles = cluster_tiles(p);
    for (int i = kPingpong ? warpgroup : 0; i < tiles; i += kPingpong ? kConsumers : 1) {
        tile.go_to(cluster_index() + i * p.clusters);
        ManyMainloop<Memory>(tile).multiply(i * p.blocks, kPingpong && i > 0, kPingpong && i + 1 < tiles);
        ManyEpilogue<Memory>(tile).finish();
    }
}

// Out: uint32_t, uint16_t or uint8_t, as wide as the results.
template <Code kCode, LowbitTileIndex kIndex, class Out>
__global__ void __launch_bounds__(kManyThreads, 1) lowbit_many_kernel(const __grid_constant__ ManyParameters p) {
    using Memory = ManyMemory<kCode, kIndex, Out>;
    static_assert(2 * Memory::kStages * sizeof(sm90::Mbarrier) <= Memory::kBarriersMax);
    const int warpgroup = sm90::warp_index() / kWarpgroupWarps;
    pdl_launch_dependents();
    if (threadIdx.x == 0) {
        const Memory memory{};
        for (int i = 0; i < Memory::kStages; ++i) {
            sm90::mbarrier_init(memory.full(i), 1 + Memory::kHasScales);  // the producer and its bytes, and the scales
            // The warps that use it, of both CTAs.
            sm90::mbarrier_init(memory.empty(i), kClusterCtas * Memory::kUsers * kWarpgroupWarps);
        }
        sm90::fence_mbarrier_init();
        sm90::prefetch_tensor_map(p.tokens);
    }
    sm90::cluster_sync();

    if (warpgroup == 0) {
        sm90::setmaxnreg_dec<Memory::kProducerRegisters>();
        if (sm90::warp_index() == 0 && sm90::elect_one()) Producer<Memory>(p).run();
        if constexpr (Memory::kHasScales) {
            if (sm90::warp_index() == 1) put_scales<Memory>(p);
        }
        __syncwarp();
    } else {
        sm90::setmaxnreg_inc<Memory::kConsumerRegisters>();
        pdl_wait();
        consume<Memory>(p, warpgroup - 1);
    }
    sm90::cluster_sync();  // shared memory that the other block still fills or signals must not go
}

// ---- host -------------------------------------------------------------------------------------------------------------

inline ManyGroupScales group_scales_of(const LowbitLinear& a) {
    if (a.code != Code::int4) return {};
    constexpr uint64_t kOne = uint64_t{1} << 32;
    const auto address = reinterpret_cast<uintptr_t>(a.group_scale), skew = address % 4;
    ManyGroupScales g{};
    g.words = reinterpret_cast<const uint32_t*>(address - skew);
    g.skew = static_cast<int>(skew);
    g.last = static_cast<int>((static_cast<int64_t>(skew) + a.n * a.groups - 1) / 4);
    g.groups = static_cast<int>(a.groups);
    const int64_t size = a.k / a.groups;
    g.of_block = a.groups == 1 || size >= kBlockColumns ? 1 : static_cast<int>(kBlockColumns / size);
    g.selector = g.of_block == 4 ? 0x3210 : g.of_block == 2 ? 0x1100 : 0x0000;
    const auto group_blocks = static_cast<uint64_t>(a.groups == 1 ? blocks_of(a.k) : size / kBlockColumns);
    g.step = g.of_block > 1 ? g.of_block * kOne : (kOne + group_blocks - 1) / group_blocks;
    return g;
}

inline ManyParameters many_parameters(const LowbitLinear& a, const LowbitTile& tile, int sm_count) {
    ManyParameters p{};
    p.tokens = tensor_map(a.q, a.t, a.k, a.q_pitch, 1, tile.tokens / kClusterCtas);
    p.plan = lowbit_plan(tile, a.t, a.n);
    p.clusters = lowbit_clusters(p.plan, sm_count);
    p.t = static_cast<int>(a.t);
    p.n = static_cast<int>(a.n);
    p.k = static_cast<int>(a.k);
    p.blocks = static_cast<int>(blocks_of(a.k));
    p.codes = a.codes;
    p.panels = static_cast<int>(panels_of(a.n));
    p.group_scales = group_scales_of(a);
    p.codebook = a.codebook;
    p.scale = a.scale;
    p.rows_of_scale = static_cast<int>(a.rows_of_scale());
    p.s = a.s;
    p.outliers = a.outliers;
    p.columns = reinterpret_cast<const unsigned char*>(a.columns);
    p.bias = a.bias;
    p.bias_type = a.bias_type;
    p.out = static_cast<unsigned char*>(a.out);
    p.out_pitch = a.out_pitch;
    p.whole_pieces = reinterpret_cast<uintptr_t>(a.out) % kAlignment == 0 && a.out_pitch * a.out_bytes() % kAlignment == 0;
    p.finish = a.finish;
    return p;
}

template <Code kCode, LowbitTileIndex kIndex, class Out>
void launch_many(const LowbitLinear& linear, const Launch& launch) {
    using Memory = ManyMemory<kCode, kIndex, Out>;
    static_assert(Memory::kStages >= 4 && Memory::kBytes <= kH100.cta_shared);
    const ManyParameters parameters = many_parameters(linear, kLowbitTiles[kIndex], launch.device.sm_count);
    Grid grid{};
    grid.x = static_cast<unsigned>(parameters.clusters * kClusterCtas);
    grid.y = 1;
    grid.threads = kManyThreads;
    grid.shared_bytes = Memory::kBytes;
    grid.cluster = kClusterCtas;
    grid.overlap = true;
    launch_grid<lowbit_many_kernel<kCode, kIndex, Out>>(grid, launch, parameters, "lowbit_linear for many tokens");
}

template <Code kCode, LowbitTileIndex kIndex>
void launch_tile(const LowbitLinear& linear, const Launch& launch) {
    const int bytes = linear.out_bytes();
    if (bytes == 4) return launch_many<kCode, kIndex, uint32_t>(linear, launch);
    if (bytes == 2) return launch_many<kCode, kIndex, uint16_t>(linear, launch);
    return launch_many<kCode, kIndex, uint8_t>(linear, launch);
}

template <Code kCode>
void launch_lowbit_code(const LowbitLinear& linear, LowbitTileIndex tile, const Launch& launch) {
    if (tile == kLowbit64x128) return launch_tile<kCode, kLowbit64x128>(linear, launch);
    if (tile == kLowbit128x128) return launch_tile<kCode, kLowbit128x128>(linear, launch);
    return launch_tile<kCode, kLowbit128x256>(linear, launch);
}

}  // namespace qbert::cuda
