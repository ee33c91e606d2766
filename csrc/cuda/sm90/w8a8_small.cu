// W8A8 linears of few tokens: tiles of 64 channels, and k shared out to the CTAs of a cluster where there are few of them.
#include "cuda/common/error.h"
#include "cuda/common/finish.cuh"
#include "cuda/common/grid.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/small_tile.cuh"
#include "cuda/sm90/tensor_map.h"

namespace qbert::cuda {
namespace {

constexpr int kFinishColumns = 4;                                  // neighbours of a token that a thread finishes
constexpr int kRowThreads = kPanelChannels / kFinishColumns;       // threads that finish a token
constexpr int kRowsAtOnce = 128 / kRowThreads;                     // tokens that the warpgroup finishes at once
constexpr int kSumPitch = kPanelChannels + 4;                      // two tokens lie eight banks apart: no conflicts

struct SmallLinear {
    TensorMap weight, tokens;
    W8a8Linear linear;
    int split;  // CTAs of a cluster, which share k
};

template <int kTokens>
struct Small : SmallTile<1, kTokens, kTokens == 64 ? 5 : kTokens == 32 ? 7 : 8> {
    struct Shared {
        typename Small::Pipeline pipeline;
        alignas(16) int32_t sums[kTokens * kSumPitch];  // [block that summed][token][channel], of the tokens finished here
    };
};

// Sends each token's sums to the CTA of the cluster that finishes it.
template <int kTokens>
__device__ void scatter_sums(int32_t* sums, const int32_t (&mine)[kTokens / 2], int split) {
    const int each = kTokens / split, bits = __ffs(each) - 1;  // a power of 2: no divisions
    const int first = static_cast<int>(sm90::cluster_rank()) * each * kSumPitch;
    const int lane = sm90::lane_index(), channel = 16 * sm90::warp_index() + lane / 4;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = 8 * j + 2 * (lane % 4) + e;
            int32_t* to = sm90::in_cta(sums, token >> bits) + first + (token & (each - 1)) * kSumPitch + channel;
            to[0] = mine[4 * j + e];
            to[8] = mine[4 * j + 2 + e];
        }
    }
}

// Four neighbours of a token; those beyond the last channel are left out.
__device__ void store(const W8a8Linear& a, int64_t token, int channel, float (&y)[kFinishColumns]) {
    const int64_t at = token * a.out_pitch + channel;
    const Finish& finish = a.finish;
    if (finish.activation == Activation::gelu) {
#pragma unroll
        for (float& each : y) each = gelu(each);
    }
    unsigned words[kFinishColumns];
    if (a.requantize) {
        words[0] = 0;
#pragma unroll
        for (int i = 0; i < kFinishColumns; ++i) {
            words[0] |= (static_cast<unsigned>(round_to_int8(y[i], finish)) & 0xffu) << 8 * i;
        }
    } else if (finish.float_type == FloatType::f32) {
#pragma unroll
        for (int i = 0; i < kFinishColumns; ++i) words[i] = __float_as_uint(y[i]);
    } else {
        words[0] = round_to_16_bits(y[0], y[1], finish.float_type);
        words[1] = round_to_16_bits(y[2], y[3], finish.float_type);
    }
    const auto bytes = static_cast<int>(a.out_bytes());
    unsigned char* to = static_cast<unsigned char*>(a.out) + at * bytes;
    if (channel + kFinishColumns <= a.n) {
        if (bytes == 4) *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
        if (bytes == 2) *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
        if (bytes == 1) *reinterpret_cast<unsigned*>(to) = words[0];
        return;
    }
#pragma unroll
    for (int i = 0; i < kFinishColumns; ++i) {
        if (channel + i >= a.n) return;
        if (bytes == 4) reinterpret_cast<unsigned*>(to)[i] = words[i];
        if (bytes == 2) reinterpret_cast<unsigned short*>(to)[i] = static_cast<unsigned short>(words[i / 2] >> i % 2 * 16);
        if (bytes == 1) to[i] = static_cast<unsigned char>(words[0] >> i * 8);
    }
}

// By the warps that multiply. What the end needs is on its way before the products are waited for.
template <int kTokens>
__device__ void multiply_and_finish(typename Small<kTokens>::Shared& shared, const SmallLinear& p, const Part& part) {
    const W8a8Linear& a = p.linear;
    const int each = kTokens / p.split, row = static_cast<int>(threadIdx.x) / kRowThreads;
    const int64_t first = part.token + static_cast<int>(sm90::cluster_rank()) * each;
    const int column = static_cast<int>(threadIdx.x) % kRowThreads * kFinishColumns, channel = part.channel + column;
    float scale[kFinishColumns] = {}, s[kTokens / kRowsAtOnce] = {};
    unsigned bias[kFinishColumns] = {};  // bits: 0 where there is none
    pdl_wait();
#pragma unroll
    for (int i = 0; i < kFinishColumns; ++i) {
        if (channel + i >= a.n) continue;
        scale[i] = a.scale[channel + i];
        if (a.bias != nullptr) bias[i] = load_bits(a.bias, a.bias_type, channel + i);
    }
#pragma unroll
    for (int i = 0; i < kTokens / kRowsAtOnce; ++i) {
        const int mine = i * kRowsAtOnce + row;
        if (mine < each && first + mine < a.t) s[i] = a.s[first + mine];
    }

    int32_t sums[kTokens / 2] = {};
    multiply_steps<Small<kTokens>>(shared.pipeline, 0, part.steps, sums);
    sm90::cluster_wait();  // all blocks have begun: their memory is there
    scatter_sums<kTokens>(shared.sums, sums, p.split);
    sm90::cluster_sync();

#pragma unroll
    for (int i = 0; i < kTokens / kRowsAtOnce; ++i) {
        const int mine = i * kRowsAtOnce + row;
        if (mine >= each || first + mine >= a.t || channel >= a.n) continue;
        int4 total = {};
        for (int block = 0; block < p.split; ++block) {
            const int4 from = *reinterpret_cast<const int4*>(&shared.sums[(block * each + mine) * kSumPitch + column]);
            total = {total.x + from.x, total.y + from.y, total.z + from.z, total.w + from.w};
        }
        const int values[kFinishColumns] = {total.x, total.y, total.z, total.w};
        float y[kFinishColumns];
#pragma unroll
        for (int c = 0; c < kFinishColumns; ++c) {
            y[c] = scale_and_add(__fmul_rn(__int2float_rn(values[c]), scale[c]), s[i], float_of(bias[c], a.bias_type));
        }
        store(a, first + mine, channel, y);
    }
}

template <int kTokens>
__global__ void __launch_bounds__(Small<kTokens>::kThreads) w8a8_small_kernel(const __grid_constant__ SmallLinear p) {
    auto& shared = *reinterpret_cast<typename Small<kTokens>::Shared*>(sm90::shared_memory());
    const int steps = (static_cast<int>(p.linear.k) + kStepK - 1) / kStepK, rank = static_cast<int>(sm90::cluster_rank());
    const int first_step = steps * rank / p.split;
    const Part part{static_cast<int>(blockIdx.x) / p.split * kPanelChannels, static_cast<int>(blockIdx.y) * kTokens, first_step,
                    steps * (rank + 1) / p.split - first_step};
    Small<kTokens>::init(shared.pipeline);
    sm90::cluster_arrive_relaxed();
    __syncthreads();
    if (sm90::warp_index() < Small<kTokens>::kProducerWarp) return multiply_and_finish<kTokens>(shared, p, part);

    if (sm90::elect_one()) copy_steps<Small<kTokens>>(shared.pipeline, p.weight, p.tokens, part);
    __syncwarp();
    sm90::cluster_wait();
    sm90::cluster_sync();
}

template <int kTokens>
void launch_tokens(const W8a8Linear& a, const Tile& tile, const Launch& launch) {
    constexpr int64_t kMaxRows = 65535;  // of a grid
    require(a.t <= kMaxRows * kTokens, "t is ", a.t, "; allowed with tile ", tile.name, ": 1 ... ", kMaxRows * kTokens);
    SmallLinear parameters{};
    parameters.weight = tensor_map(a.weight, a.n, a.k, a.weight_pitch, 1, kPanelChannels);
    parameters.tokens = tensor_map(a.q, a.t, a.k, a.q_pitch, 1, kTokens);
    parameters.linear = a;
    parameters.split = tile.cluster;
    Grid grid{};
    grid.x = static_cast<unsigned>((a.n + kPanelChannels - 1) / kPanelChannels * tile.cluster);
    grid.y = static_cast<unsigned>((a.t + kTokens - 1) / kTokens);
    grid.threads = Small<kTokens>::kThreads;
    grid.shared_bytes = sizeof(typename Small<kTokens>::Shared);
    grid.cluster = static_cast<unsigned>(tile.cluster);
    grid.overlap = true;
    launch_grid<w8a8_small_kernel<kTokens>>(grid, launch, parameters, description_of(tile, a).text);
}

}  // namespace

void launch_w8a8_small(const W8a8Linear& linear, const Tile& tile, const Launch& launch) {
    if (tile.t == 64) return launch_tokens<64>(linear, tile, launch);
    if (tile.t == 32) return launch_tokens<32>(linear, tile, launch);
    launch_tokens<16>(linear, tile, launch);
}

}  // namespace qbert::cuda
