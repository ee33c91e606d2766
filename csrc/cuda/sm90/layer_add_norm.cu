// w8a8_linear and add_layer_norm_quantize as one launch. A cluster of blocks has all channels of a tile of tokens, 128 each.
// When they have multiplied, blocks send each other rows through their shared memories, so that each has some of the tokens
// whole, and ends them as the kernel for rows alone does: a warp a row.
#include "cuda/common/finish.cuh"
#include "cuda/common/grid.h"
#include "cuda/common/rows_kernel.cuh"
#include "cuda/sm90/layer.h"
#include "cuda/sm90/small_tile.cuh"
#include "cuda/sm90/tensor_map.h"

namespace qbert::cuda {
namespace {

constexpr int kRowSteps = kMaxAddNormColumns / kRowStepColumns;
constexpr int kRowPadding = 4;  // floats: tokens that a warp sends at once lie in different banks

struct AddNorm {
    TensorMap weight, tokens;
    W8a8Linear linear;
    AddLayerNormQuantize norm;
};

// 90 and 80 KB of stages, 8 KB of gamma and beta, 9 and 18 KB of rows.
template <int kTokens>
struct AddNormBlock : SmallTile<kAddNormChannels / kPanelChannels, kTokens, kTokens == 16 ? 5 : 4> {
    struct Shared {
        typename AddNormBlock::Pipeline pipeline;
        sm90::Mbarrier norm;  // hears of gamma and beta
        alignas(16) float gamma[kMaxAddNormColumns], beta[kMaxAddNormColumns];  // of any type

        // What this block ends: token i of the tile is row i / blocks of block i % blocks.
        __device__ float* rows() { return reinterpret_cast<float*>(this + 1); }
    };
    static_assert(sizeof(Shared) % 16 == 0);
};
constexpr int row_pitch(int64_t n) { return static_cast<int>(n) + kRowPadding; }
template <int kTokens>
unsigned shared_bytes(int64_t n) {
    const int64_t blocks = n / kAddNormChannels, rows = (kTokens + blocks - 1) / blocks;
    return static_cast<unsigned>(sizeof(typename AddNormBlock<kTokens>::Shared) + rows * row_pitch(n) * sizeof(float));
}

// As it is read again from memory by those who are given a y of that type.
__device__ float rounded(float y, FloatType type) {
    if (type == FloatType::f32) return y;
    return type == FloatType::bf16 ? __bfloat162float(__float2bfloat16_rn(y)) : __half2float(__float2half_rn(y));
}

// What a lane knows of its sums: those of two channels and a quarter of the tokens.
template <int kTokens>
struct Scales {
    float scale[2], s[kTokens / 4];
    unsigned bias[2];  // bits: 0 where there is none
};

template <int kTokens>
__device__ void send_rows(float* rows, const int32_t (&sums)[kTokens / 2], const Scales<kTokens>& with, int channel,
                          const AddNorm& p) {
    const int n = static_cast<int>(p.linear.n), blocks = n / kAddNormChannels;
    const float bias[2] = {float_of(with.bias[0], p.linear.bias_type), float_of(with.bias[1], p.linear.bias_type)};
#pragma unroll
    for (int j = 0; j < kTokens / 4; ++j) {
        const int token = j / 2 * 8 + sm90::lane_index() % 4 * 2 + j % 2;
        float* to = sm90::in_cta(rows, static_cast<unsigned>(token % blocks)) + token / blocks * row_pitch(n) + channel;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float value = __fmul_rn(__int2float_rn(sums[j / 2 * 4 + 2 * i + j % 2]), with.scale[i]);
            to[8 * i] = rounded(scale_and_add(value, with.s[j], bias[i]), p.norm.residual.type);
        }
    }
}

// By the warps that multiply. What the end needs is on its way before the products are waited for.
template <int kTokens, int kResidualBytes>
__device__ void multiply_and_finish(typename AddNormBlock<kTokens>::Shared& shared, const AddNorm& p, const Part& part) {
    const W8a8Linear& a = p.linear;
    const int n = static_cast<int>(a.n), warp = sm90::warp_index(), lane = sm90::lane_index();
    const int channel = part.channel + 16 * warp + lane / 4;  // and the eighth after it
    Scales<kTokens> with{};
    pdl_wait();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        with.scale[i] = a.scale[channel + 8 * i];
        if (a.bias != nullptr) with.bias[i] = load_bits(a.bias, a.bias_type, channel + 8 * i);
    }
#pragma unroll
    for (int j = 0; j < kTokens / 4; ++j) {
        const int64_t token = part.token + j / 2 * 8 + lane % 4 * 2 + j % 2;
        if (token < a.t) with.s[j] = a.s[token];
    }
    const int mine = warp * (n / kAddNormChannels) + static_cast<int>(sm90::cluster_rank());
    const int64_t token = int64_t{part.token} + mine;
    const bool ends_row = mine < kTokens && token < a.t;
    Neighbours<kResidualBytes> residual[kRowSteps] = {};
    if (ends_row) load_row(p.norm.residual, token, n, residual);

    int32_t sums[kTokens / 2] = {};
    multiply_steps<AddNormBlock<kTokens>>(shared.pipeline, warp / 4, part.steps, sums);
    sm90::cluster_wait();  // all blocks have begun: their memory is there
    send_rows<kTokens>(shared.rows(), sums, with, channel, p);
    sm90::cluster_arrive();
    sm90::mbarrier_wait(shared.norm, 0);
    sm90::cluster_wait();
    if (!ends_row) return;

    float x[kRowSteps][kLaneColumns] = {};
#pragma unroll
    for (int step = 0; step < kRowSteps; ++step) {
        if (row_column(step) >= n) continue;
        const auto from = reinterpret_cast<const float4*>(shared.rows() + warp * row_pitch(n) + row_column(step));
        const float4 low = from[0], high = from[1];
        const float values[kLaneColumns] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) x[step][i] = values[i];
    }
    AddLayerNormQuantize norm = p.norm;
    norm.gamma.data = shared.gamma;
    norm.beta.data = shared.beta;
    finish_row(norm, token, x, residual);
}

// By one thread: so that no row waits for them when it is ended.
template <class Shared>
__device__ void copy_gamma_and_beta(Shared& shared, const AddLayerNormQuantize& norm) {
    const auto gamma_bytes = static_cast<unsigned>(norm.k * bytes_of(norm.gamma.type));
    const auto beta_bytes = static_cast<unsigned>(norm.k * bytes_of(norm.beta.type));
    sm90::mbarrier_arrive_expect_tx(shared.norm, gamma_bytes + beta_bytes);
    sm90::bulk_copy(shared.gamma, norm.gamma.data, gamma_bytes, shared.norm);
    sm90::bulk_copy(shared.beta, norm.beta.data, beta_bytes, shared.norm);
}

template <int kTokens, int kResidualBytes>
__global__ void __launch_bounds__(AddNormBlock<kTokens>::kThreads)
    w8a8_linear_add_norm_kernel(const __grid_constant__ AddNorm p) {
    using Block = AddNormBlock<kTokens>;
    auto& shared = *reinterpret_cast<typename Block::Shared*>(sm90::shared_memory());
    const int blocks = static_cast<int>(p.linear.n) / kAddNormChannels, rank = static_cast<int>(sm90::cluster_rank());
    const Part part{rank * kAddNormChannels, static_cast<int>(blockIdx.x) / blocks * kTokens, 0,
                    (static_cast<int>(p.linear.k) + kStepK - 1) / kStepK};
    if (threadIdx.x == 0) sm90::mbarrier_init(shared.norm, 1);
    Block::init(shared.pipeline);
    sm90::cluster_arrive_relaxed();
    __syncthreads();
    if (sm90::warp_index() < Block::kProducerWarp) return multiply_and_finish<kTokens, kResidualBytes>(shared, p, part);

    if (sm90::elect_one()) {
        copy_steps<Block>(shared.pipeline, p.weight, p.tokens, part);
        copy_gamma_and_beta(shared, p.norm);
    }
    __syncwarp();
    sm90::cluster_wait();
    sm90::cluster_sync();
}

template <int kTokens>
void launch_tokens(const W8a8LinearAddNorm& a, const Launch& launch) {
    const W8a8Linear& linear = a.linear;
    AddNorm parameters{};
    parameters.weight = tensor_map(linear.weight, linear.n, linear.k, linear.weight_pitch, 1, kAddNormChannels);
    parameters.tokens = tensor_map(linear.q, linear.t, linear.k, linear.q_pitch, 1, kTokens);
    parameters.linear = linear;
    parameters.norm = a.norm;
    Grid grid{};
    grid.cluster = static_cast<unsigned>(linear.n / kAddNormChannels);
    grid.x = static_cast<unsigned>((linear.t + kTokens - 1) / kTokens) * grid.cluster;
    grid.y = 1;
    grid.threads = AddNormBlock<kTokens>::kThreads;
    grid.shared_bytes = shared_bytes<kTokens>(linear.n);
    grid.overlap = true;
    if (a.norm.residual.type == FloatType::f32) {
        launch_grid<w8a8_linear_add_norm_kernel<kTokens, 4>>(grid, launch, parameters, "w8a8_linear_add_norm");
    } else {
        launch_grid<w8a8_linear_add_norm_kernel<kTokens, 2>>(grid, launch, parameters, "w8a8_linear_add_norm");
    }
}

}  // namespace

void launch_w8a8_linear_add_norm(const W8a8LinearAddNorm& a, AddNormTileIndex tile, const Launch& launch) {
    if (tile == kAddNorm16) return launch_tokens<16>(a, launch);
    launch_tokens<32>(a, launch);
}

}  // namespace qbert::cuda
