// Products of packed weights with few tokens: every weight is read from memory once, expanded in registers and multiplied.
//
// Bound by the weights' bytes, so everything serves their stream. A CTA has one panel of 64 channels for each of its
// warpgroups and a share of the columns; its weights of a panel are one run of memory (fragments.h), which one warp copies as
// far ahead as shared memory allows: an H100 needs some 20 KB under way on each SM. The weights depend on no
// earlier grid, so their copies start while that still runs; the tokens' wait for it.
//
//     weights     shared memory -> registers, 16 bytes a load -> expanded in place: wgmma's A operand, 64 channels
//     tokens      a box of 128 bytes of each: wgmma's B operand, shared by the warpgroups
//     sums        y^T = W x^T in registers -> shared memory; the cluster's CTAs have a share of the columns each, and of the
//                 values: each adds its values up, in the order of the blocks, through distributed shared memory
//
// So there is one launch, no atomic operation, no workspace, and results depend on nothing but the cluster's size (on integers
// not even on that). Where channels are few, clusters make up for it: 768 x 768 is 12 panels, or 96 CTAs in clusters
// of 8.
//
// Half a block is expanded while the matrix units still multiply the other half, and the next block's words are read from
// shared memory before the last product is waited for; what remains is hidden by the other warpgroups of the SM. A
// second set of operand registers, to expand across blocks too, would cost as many warps as it gains.
//
// Instructions of the main loop for a weight (nvcc 13.0; compiled for sm_90a, not run), and what an H100's memory (3.35 TB/s,
// 14.5 bytes a cycle and SM) leaves time for. An SM issues 128 lanes a cycle; of prmt, logic, shifts and
// comparisons 64:
//
//                                 int8 tokens              16-bit tokens                        memory allows
//                                 int4    dict4   dict3    int8 (bf16)    int4   dict4   dict3    8     4     3 bits
//     all                         3.0     2.2     1.4      2.1 (3.4)      3.6    2.3     2.3      8.8   4.4   3.3
//     prmt, logic, shifts ...     1.7     1.6     0.8      0.9 (1.6)      1.4    1.0     1.4      4.4   2.2   1.6
//
// A Product says what is streamed and what becomes of it (lowbit_few.cuh, weight_only.cuh):
//
//     kCode, Operand      the codes; what they become: int8_t, sm90::Half, sm90::BFloat
//     kTableBytes         of shared memory that `fill_table` fills, by all consumers
//     Arguments           what a launch tells it
//     Product(arguments, table, row, block)    in registers, for a thread whose rows are `row` and `row` + 8, from `block` on
//     expand(words, step, a)                   the registers of a product
//     fetch_scales()      of the next block, after this one's last step
//     prefetch(arguments, first, channels)     what `finish` will read of these channels, to L2
//     finish(arguments, sums, token, channel)  four neighbouring channels' sums to their results
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/common/error.h"
#include "cuda/common/grid.h"
#include "cuda/sm90/arch.h"
#include "cuda/sm90/expand.cuh"
#include "cuda/sm90/sm90.cuh"
#include "cuda/sm90/stream.h"
#include "cuda/sm90/stream_finish.cuh"

namespace qbert::cuda {

// What all streams have.
struct Stream {
    TensorMap tokens;  // (t, k), boxes of the plan's tokens
    const unsigned char* weights;
    int t, n, blocks;  // blocks of 128 columns in k
    int cluster, stages;
    sm90::CacheHint hint;  // the weights in L2
};

template <class Product>
struct StreamParameters {
    Stream stream;
    typename Product::Arguments product;
};

inline constexpr int kProducerThreads = 32;

template <class Operand>
using SumOf = std::conditional_t<std::is_same_v<Operand, int8_t>, int32_t, float>;
template <class Operand>
inline constexpr int kTokenBytes = kBlockColumns * (std::is_same_v<Operand, int8_t> ? 1 : 2);
// Products of a block, of 32 columns of int8 or 16 columns of 16 bits: 32 bytes of a token.
template <class Operand>
inline constexpr int kProducts = kTokenBytes<Operand> / 32;

// The work of a CTA, and its ring of stages in shared memory.
template <class Product, int kTokens>
struct CtaWork {
    static constexpr int kTokensBytes = kTokens * kTokenBytes<typename Product::Operand>;
    static constexpr int kWeightBytes = block_bytes(Product::kCode);  // of a panel

    const Stream& stream;
    const int warpgroups = (static_cast<int>(blockDim.x) - kProducerThreads) / kWarpgroupThreads;
    const int rank = static_cast<int>(blockIdx.x) % stream.cluster;
    const int first_panel = static_cast<int>(blockIdx.x) / stream.cluster * warpgroups;
    const int panels = min(warpgroups, static_cast<int>(panels_of(stream.n)) - first_panel);
    const int first_token = static_cast<int>(blockIdx.y) * kTokens;
    const int first_block = static_cast<int>(int64_t{stream.blocks} * rank / stream.cluster);
    const int blocks = static_cast<int>(int64_t{stream.blocks} * (rank + 1) / stream.cluster) - first_block;

    unsigned char* const memory = sm90::shared_memory();
    unsigned char* const table = memory + kStreamTableAt;
    unsigned char* const stages = table + Product::kTableBytes;
    sm90::Mbarrier* const full = reinterpret_cast<sm90::Mbarrier*>(memory);
    sm90::Mbarrier* const empty = full + kMaxStages;

    __device__ explicit CtaWork(const Stream& given) : stream(given) {}
    __device__ unsigned char* tokens_of(int slot) const { return stages + slot * (kTokensBytes + warpgroups * kWeightBytes); }
    __device__ unsigned char* weights_of(int slot) const { return tokens_of(slot) + kTokensBytes; }
};

// Which stage of the ring comes next, and the parity of its barriers.
struct PipelineState {
    int slot = 0;
    unsigned parity = 0;
    __device__ void advance(int stages) {
        if (++slot == stages) slot = 0, parity ^= 1;
    }
};

template <class Product, int kTokens>
__device__ void copy_weights(const CtaWork<Product, kTokens>& work, int block, int slot) {
    using Of = CtaWork<Product, kTokens>;
    sm90::mbarrier_arrive_expect_tx(work.full[slot], Of::kTokensBytes + work.panels * Of::kWeightBytes);
    for (int panel = 0; panel < work.panels; ++panel) {
        const int64_t at = int64_t{work.first_panel + panel} * work.stream.blocks + work.first_block + block;
        sm90::bulk_copy(work.weights_of(slot) + panel * Of::kWeightBytes, work.stream.weights + at * Of::kWeightBytes,
                        Of::kWeightBytes, work.full[slot], work.stream.hint);
    }
}

template <class Product, int kTokens>
__device__ void copy_tokens(const CtaWork<Product, kTokens>& work, int block, int slot) {
    constexpr int kBoxes = kTokenBytes<typename Product::Operand> / 128;
    const int column = (work.first_block + block) * kBlockColumns;
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
        sm90::tma_load(work.tokens_of(slot) + box * kTokens * 128, work.stream.tokens, column + box * kBlockColumns / kBoxes,
                       work.first_token, work.full[slot]);
    }
}

// One thread keeps the ring full. What needs no earlier grid comes first.
template <class Product, int kTokens>
__device__ void produce(const CtaWork<Product, kTokens>& work, const typename Product::Arguments& arguments) {
    const int stages = work.stream.stages, ahead = min(stages, work.blocks);
    sm90::prefetch_tensor_map(work.stream.tokens);
    for (int block = 0; block < ahead; ++block) copy_weights(work, block, block);
    const int first = work.first_panel * kBlockRows;
    Product::prefetch(arguments, first, min(work.panels * kBlockRows, work.stream.n - first));
    pdl_wait();
    for (int block = 0; block < ahead; ++block) copy_tokens(work, block, block);
    PipelineState state;
    for (int block = ahead; block < work.blocks; ++block, state.advance(stages)) {
        sm90::mbarrier_wait(work.empty[state.slot], state.parity);
        copy_weights(work, block, state.slot);
        copy_tokens(work, block, state.slot);
    }
    pdl_launch_dependents();
}

// Begins one of a block's products.
template <class Operand, int kTokens, class Sum>
__device__ void multiply(Sum (&sums)[kTokens / 2], const uint32_t (&a)[4], uint64_t tokens, int product) {
    // Four products to a box of 128 bytes.
    const int further = product % 4 * 32 + product / 4 * kTokens * 128;
    if constexpr (std::is_same_v<Operand, int8_t>) {
        sm90::wgmma_s8<kTokens>(sums, a, sm90::descriptor_advance(tokens, further), true);
    } else {
        sm90::wgmma_float<Operand, kTokens>(sums, a, sm90::descriptor_advance(tokens, further), true);
    }
}

// Begins a block's products, in two batches: the second is expanded while the first multiplies.
template <class Product, int kTokens, class Sum>
__device__ void multiply_block(Product& product, const uint32_t (&words)[thread_words(Product::kCode)], uint64_t tokens,
                               uint32_t (&a)[kProducts<typename Product::Operand>][4], Sum (&sums)[kTokens / 2]) {
    using Operand = typename Product::Operand;
    constexpr int kHalf = kProducts<Operand> / 2;
#pragma unroll
    for (int first = 0; first < 2 * kHalf; first += kHalf) {
#pragma unroll
        for (int i = first; i < first + kHalf; ++i) product.expand(words, i, a[i]);
        sm90::warpgroup_arrive();
#pragma unroll
        for (int i = first; i < first + kHalf; ++i) multiply<Operand, kTokens>(sums, a[i], tokens, i);
        sm90::warpgroup_commit();
    }
}

// A warpgroup multiplies its panel.
template <class Product, int kTokens>
__device__ void consume(const CtaWork<Product, kTokens>& work, Product& product, int warpgroup,
                        SumOf<typename Product::Operand> (&sums)[kTokens / 2]) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    uint32_t a[kProducts<typename Product::Operand>][4];  // read until the products are waited for
    PipelineState state;
    int last = 0;
    for (int block = 0; block < work.blocks; ++block) {
        uint32_t words[thread_words(Product::kCode)];
        sm90::mbarrier_wait(work.full[state.slot], state.parity);
        const unsigned char* weights = work.weights_of(state.slot) + warpgroup * work.kWeightBytes;
#pragma unroll
        for (int piece = 0; 4 * piece < thread_words(Product::kCode); ++piece) {
            load_piece<Product::kCode>(weights, thread, piece, words);
        }
        if (block > 0) {
            sm90::warpgroup_wait<0>();
            if (thread % 32 == 0) sm90::mbarrier_arrive(work.empty[last]);
        }
        const uint64_t tokens = sm90::smem_descriptor(sm90::shared_address(work.tokens_of(state.slot)));
        multiply_block<Product, kTokens>(product, words, tokens, a, sums);
        product.fetch_scales();
        last = state.slot;
        state.advance(work.stream.stages);
    }
    sm90::warpgroup_wait<0>();
    sm90::warpgroup_fence_operand(sums);
}

// Sums (tokens, channels) in shared memory, where the stages were.
template <int kTokens, class Sum>
__device__ void store_sums(Sum* to, int pitch, int warpgroup, const Sum (&sums)[kTokens / 2]) {
    const int lane = sm90::lane_index(), warp = static_cast<int>(threadIdx.x) % kWarpgroupThreads / 32;
    Sum* corner = to + 2 * (lane % 4) * pitch + warpgroup * kBlockRows + 16 * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) corner[(8 * (i / 4) + i % 2) * pitch + 8 * (i / 2 % 2)] = sums[i];
}

// This block's share of the values, four channels at a time.
template <class Product, int kTokens, class Sum>
__device__ void finish(const CtaWork<Product, kTokens>& work, const typename Product::Arguments& arguments, Sum* sums) {
    const Stream& stream = work.stream;
    const int pitch = sums_pitch(work.warpgroups), quads = work.warpgroups * kBlockRows / kQuadChannels;
    const int tokens = min(kTokens, stream.t - work.first_token), threads = work.warpgroups * kWarpgroupThreads;
    for (int i = work.rank * threads + static_cast<int>(threadIdx.x); i < tokens * quads; i += stream.cluster * threads) {
        const int token = i / quads, quad = i % quads * kQuadChannels, channel = work.first_panel * kBlockRows + quad;
        if (channel >= stream.n) continue;
        Sum total[kQuadChannels] = {};
        for (int rank = 0; rank < stream.cluster; ++rank) {
            const Sum* block = stream.cluster > 1 ? sm90::in_cta(sums, static_cast<unsigned>(rank)) : sums;
            const auto four = *reinterpret_cast<const std::conditional_t<std::is_same_v<Sum, float>, float4, int4>*>(
                block + token * pitch + quad);
            total[0] += four.x, total[1] += four.y, total[2] += four.z, total[3] += four.w;
        }
        Product::finish(arguments, total, work.first_token + token, channel);
    }
}

template <class Product, int kTokens>
__global__ void __launch_bounds__(most_warpgroups(kTokens) * kWarpgroupThreads + kProducerThreads)
    stream_kernel(const __grid_constant__ StreamParameters<Product> p) {
    using Sum = SumOf<typename Product::Operand>;
    const CtaWork<Product, kTokens> work(p.stream);
    const int warpgroup = sm90::warp_index() * 32 / kWarpgroupThreads;
    const bool consumer = warpgroup < work.warpgroups;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stream.stages; ++i) {
            sm90::mbarrier_init(work.full[i], 1);
            sm90::mbarrier_init(work.empty[i], static_cast<unsigned>(work.panels) * kWarpgroupThreads / 32);
        }
        sm90::fence_mbarrier_init();
    }
    __syncthreads();

    Sum sums[kTokens / 2] = {};
    if (consumer) {
        if constexpr (Product::kTableBytes > 0) {
            const int threads = work.warpgroups * kWarpgroupThreads;
            Product::fill_table(p.product, work.table, static_cast<int>(threadIdx.x), threads);
            sm90::named_barrier_sync(1, static_cast<unsigned>(threads));
        }
        if (warpgroup < work.panels) {
            const int row = sm90::lane_index() / 4 + static_cast<int>(threadIdx.x) / 32 * 16 + work.first_panel * kBlockRows;
            Product product(p.product, work.table, row, work.first_block);
            consume(work, product, warpgroup, sums);
        }
    } else {
        if (sm90::elect_one()) produce(work, p.product);
        __syncwarp();
    }
    __syncthreads();  // every stage has been read

    Sum* const shared_sums = reinterpret_cast<Sum*>(work.stages);
    if (consumer) store_sums<kTokens>(shared_sums, sums_pitch(work.warpgroups), warpgroup, sums);
    p.stream.cluster > 1 ? sm90::cluster_sync() : __syncthreads();
    pdl_wait();  // also in threads that write, and read what the copies do not bring
    if (consumer) finish(work, p.product, shared_sums);
    if (p.stream.cluster > 1) sm90::cluster_arrive_relaxed(), sm90::cluster_wait();  // none leaves while others read its sums
}

// What all launches of a stream share.
template <class Product, int kTokens>
void launch_stream(const StreamPlan& plan, const StreamProblem& problem, const void* tokens, int64_t tokens_pitch,
                   const void* weights, const typename Product::Arguments& arguments, const Launch& launch, const char* what) {
    using Operand = typename Product::Operand;
    constexpr int kElementBytes = std::is_same_v<Operand, int8_t> ? 1 : 2;
    const StreamMemory memory = stream_memory(plan, problem, launch.device);
    const int64_t panels = panels_of(problem.n), blocks = blocks_of(problem.k), tiles = (problem.t + kTokens - 1) / kTokens;
    require(memory.stages > 0, what, ": the plan ", name_of(plan), " does not fit ", launch.device.shared_memory,
            " bytes of shared memory");
    require(tiles <= UINT16_MAX, what, " of ", problem.t, " tokens; allowed: 1 ... ", int64_t{UINT16_MAX} * kTokens);
    StreamParameters<Product> parameters{};
    Stream& stream = parameters.stream;
    stream.tokens = tensor_map(tokens, problem.t, problem.k, tokens_pitch, kElementBytes, kTokens);
    stream.weights = static_cast<const unsigned char*>(weights);
    stream.t = static_cast<int>(problem.t);
    stream.n = static_cast<int>(problem.n);
    stream.blocks = static_cast<int>(blocks);
    stream.cluster = plan.cluster;
    stream.stages = memory.stages;
    const bool stays = panels * blocks * problem.weight_bytes <= kH100.l2_kept;
    stream.hint = stays ? sm90::CacheHint::normal : sm90::CacheHint::evict_first;
    parameters.product = arguments;

    Grid grid{};
    grid.x = static_cast<unsigned>((panels + plan.warpgroups - 1) / plan.warpgroups * plan.cluster);
    grid.y = static_cast<unsigned>(tiles);
    grid.threads = static_cast<unsigned>(plan.warpgroups * kWarpgroupThreads + kProducerThreads);
    grid.shared_bytes = static_cast<unsigned>(memory.bytes);
    grid.cluster = static_cast<unsigned>(plan.cluster);
    grid.overlap = true;
    launch_grid<stream_kernel<Product, kTokens>>(grid, launch, parameters, what);
}

}  // namespace qbert::cuda
