// Products of packed weights with few tokens: every weight is read from memory once, expanded in registers and multiplied.
//
// Bound by the weights' bytes, so everything serves their stream. A thread block has one strip of 64 channels for each of its
// warp groups and a share of the columns; its weights of a strip are one run of memory (fragments.h), which one warp copies as
// far ahead as shared memory allows: an H100 needs some 20 KB under way on each multiprocessor. The weights depend on no
// earlier grid, so their copies start while that still runs; the tokens' wait for it.
//
//     weights     shared memory -> registers, 16 bytes a load -> expanded in place: wgmma's A operand, 64 channels
//     tokens      a box of 128 bytes of each: wgmma's B operand, shared by the warp groups
//     sums        y^T = W x^T in registers -> shared memory; the cluster's blocks have a share of the columns each, and of the
//                 values: each adds its values up, in the order of the blocks, through distributed shared memory
//
// So there is one launch, no atomic operation, no workspace, and results depend on nothing but the cluster's size (on integers
// not even on that). Where channels are few, clusters make up for it: 768 x 768 is 12 strips, or 96 thread blocks in clusters
// of 8.
//
// Half a block is expanded while the matrix units still multiply the other half, and the next block's words are read from
// shared memory before the last product is waited for; what remains is hidden by the other warp groups of the multiprocessor. A
// second set of operand registers, to expand across blocks too, would cost as many warps as it gains.
//
// Instructions of the main loop for a weight (nvcc 13.0; compiled for sm_90a, not run), and what an H100's memory (3.35 TB/s,
// 14.5 bytes a cycle and multiprocessor) leaves time for. A multiprocessor issues 128 lanes a cycle; of prmt, logic, shifts and
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
    sm90::Keep keep;  // the weights in L2
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

// The work of a thread block, and its ring of stages in shared memory.
template <class Product, int kTokens>
struct Share {
    static constexpr int kTokensBytes = kTokens * kTokenBytes<typename Product::Operand>;
    static constexpr int kWeightBytes = block_bytes(Product::kCode);  // of a strip

    const Stream& stream;
    const int groups = (static_cast<int>(blockDim.x) - kProducerThreads) / kGroupThreads;
    const int rank = static_cast<int>(blockIdx.x) % stream.cluster;
    const int first_strip = static_cast<int>(blockIdx.x) / stream.cluster * groups;
    const int strips = min(groups, static_cast<int>(strips_of(stream.n)) - first_strip);
    const int first_token = static_cast<int>(blockIdx.y) * kTokens;
    const int first_block = static_cast<int>(int64_t{stream.blocks} * rank / stream.cluster);
    const int blocks = static_cast<int>(int64_t{stream.blocks} * (rank + 1) / stream.cluster) - first_block;

    unsigned char* const memory = sm90::shared_memory();
    unsigned char* const table = memory + kStreamTableAt;
    unsigned char* const stages = table + Product::kTableBytes;
    sm90::Barrier* const full = reinterpret_cast<sm90::Barrier*>(memory);
    sm90::Barrier* const empty = full + kMaxStages;

    __device__ explicit Share(const Stream& given) : stream(given) {}
    __device__ unsigned char* tokens_of(int slot) const { return stages + slot * (kTokensBytes + groups * kWeightBytes); }
    __device__ unsigned char* weights_of(int slot) const { return tokens_of(slot) + kTokensBytes; }
};

// Which stage of the ring comes next, and the parity of its barriers.
struct Turn {
    int slot = 0;
    unsigned parity = 0;
    __device__ void advance(int stages) {
        if (++slot == stages) slot = 0, parity ^= 1;
    }
};

template <class Product, int kTokens>
__device__ void copy_weights(const Share<Product, kTokens>& share, int block, int slot) {
    using Of = Share<Product, kTokens>;
    sm90::barrier_arrive_expect(share.full[slot], Of::kTokensBytes + share.strips * Of::kWeightBytes);
    for (int strip = 0; strip < share.strips; ++strip) {
        const int64_t at = int64_t{share.first_strip + strip} * share.stream.blocks + share.first_block + block;
        sm90::copy_bytes(share.weights_of(slot) + strip * Of::kWeightBytes, share.stream.weights + at * Of::kWeightBytes,
                         Of::kWeightBytes, share.full[slot], share.stream.keep);
    }
}

template <class Product, int kTokens>
__device__ void copy_tokens(const Share<Product, kTokens>& share, int block, int slot) {
    constexpr int kBoxes = kTokenBytes<typename Product::Operand> / 128;
    const int column = (share.first_block + block) * kBlockColumns;
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
        sm90::copy_box(share.tokens_of(slot) + box * kTokens * 128, share.stream.tokens, column + box * kBlockColumns / kBoxes,
                       share.first_token, share.full[slot]);
    }
}

// One thread keeps the ring full. What needs no earlier grid comes first.
template <class Product, int kTokens>
__device__ void produce(const Share<Product, kTokens>& share, const typename Product::Arguments& arguments) {
    const int stages = share.stream.stages, ahead = min(stages, share.blocks);
    sm90::prefetch_map(share.stream.tokens);
    for (int block = 0; block < ahead; ++block) copy_weights(share, block, block);
    const int first = share.first_strip * kBlockRows;
    Product::prefetch(arguments, first, min(share.strips * kBlockRows, share.stream.n - first));
    pdl_wait();
    for (int block = 0; block < ahead; ++block) copy_tokens(share, block, block);
    Turn turn;
    for (int block = ahead; block < share.blocks; ++block, turn.advance(stages)) {
        sm90::barrier_wait(share.empty[turn.slot], turn.parity);
        copy_weights(share, block, turn.slot);
        copy_tokens(share, block, turn.slot);
    }
    pdl_launch_dependents();
}

// Begins one of a block's products.
template <class Operand, int kTokens, class Sum>
__device__ void multiply(Sum (&sums)[kTokens / 2], const uint32_t (&a)[4], uint64_t tokens, int product) {
    // Four products to a box of 128 bytes.
    const int further = product % 4 * 32 + product / 4 * kTokens * 128;
    if constexpr (std::is_same_v<Operand, int8_t>) {
        sm90::multiply_s8<kTokens>(sums, a, sm90::operand_further(tokens, further), true);
    } else {
        sm90::multiply_float<Operand, kTokens>(sums, a, sm90::operand_further(tokens, further), true);
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
        sm90::products_begin();
#pragma unroll
        for (int i = first; i < first + kHalf; ++i) multiply<Operand, kTokens>(sums, a[i], tokens, i);
        sm90::products_commit();
    }
}

// A warp group multiplies its strip.
template <class Product, int kTokens>
__device__ void consume(const Share<Product, kTokens>& share, Product& product, int group,
                        SumOf<typename Product::Operand> (&sums)[kTokens / 2]) {
    const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
    uint32_t a[kProducts<typename Product::Operand>][4];  // read until the products are waited for
    Turn turn;
    int last = 0;
    for (int block = 0; block < share.blocks; ++block) {
        uint32_t words[thread_words(Product::kCode)];
        sm90::barrier_wait(share.full[turn.slot], turn.parity);
        const unsigned char* weights = share.weights_of(turn.slot) + group * share.kWeightBytes;
#pragma unroll
        for (int piece = 0; 4 * piece < thread_words(Product::kCode); ++piece) {
            load_piece<Product::kCode>(weights, thread, piece, words);
        }
        if (block > 0) {
            sm90::products_wait<0>();
            if (thread % 32 == 0) sm90::barrier_arrive(share.empty[last]);
        }
        const uint64_t tokens = sm90::swizzled_operand(sm90::shared_address(share.tokens_of(turn.slot)));
        multiply_block<Product, kTokens>(product, words, tokens, a, sums);
        product.fetch_scales();
        last = turn.slot;
        turn.advance(share.stream.stages);
    }
    sm90::products_wait<0>();
    sm90::keep_in_place(sums);
}

// Sums (tokens, channels) in shared memory, where the stages were.
template <int kTokens, class Sum>
__device__ void store_sums(Sum* to, int pitch, int group, const Sum (&sums)[kTokens / 2]) {
    const int lane = sm90::lane_index(), warp = static_cast<int>(threadIdx.x) % kGroupThreads / 32;
    Sum* corner = to + 2 * (lane % 4) * pitch + group * kBlockRows + 16 * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) corner[(8 * (i / 4) + i % 2) * pitch + 8 * (i / 2 % 2)] = sums[i];
}

// This block's share of the values, four channels at a time.
template <class Product, int kTokens, class Sum>
__device__ void finish(const Share<Product, kTokens>& share, const typename Product::Arguments& arguments, Sum* sums) {
    const Stream& stream = share.stream;
    const int pitch = sums_pitch(share.groups), quads = share.groups * kBlockRows / kQuadChannels;
    const int tokens = min(kTokens, stream.t - share.first_token), threads = share.groups * kGroupThreads;
    for (int i = share.rank * threads + static_cast<int>(threadIdx.x); i < tokens * quads; i += stream.cluster * threads) {
        const int token = i / quads, quad = i % quads * kQuadChannels, channel = share.first_strip * kBlockRows + quad;
        if (channel >= stream.n) continue;
        Sum total[kQuadChannels] = {};
        for (int rank = 0; rank < stream.cluster; ++rank) {
            const Sum* block = stream.cluster > 1 ? sm90::in_block(sums, static_cast<unsigned>(rank)) : sums;
            const auto four = *reinterpret_cast<const std::conditional_t<std::is_same_v<Sum, float>, float4, int4>*>(
                block + token * pitch + quad);
            total[0] += four.x, total[1] += four.y, total[2] += four.z, total[3] += four.w;
        }
        Product::finish(arguments, total, share.first_token + token, channel);
    }
}

template <class Product, int kTokens>
__global__ void __launch_bounds__(most_groups(kTokens) * kGroupThreads + kProducerThreads)
    stream_kernel(const __grid_constant__ StreamParameters<Product> p) {
    using Sum = SumOf<typename Product::Operand>;
    const Share<Product, kTokens> share(p.stream);
    const int group = sm90::warp_index() * 32 / kGroupThreads;
    const bool consumer = group < share.groups;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stream.stages; ++i) {
            sm90::barrier_init(share.full[i], 1);
            sm90::barrier_init(share.empty[i], static_cast<unsigned>(share.strips) * kGroupThreads / 32);
        }
        sm90::fence_barrier_init();
    }
    __syncthreads();

    Sum sums[kTokens / 2] = {};
    if (consumer) {
        if constexpr (Product::kTableBytes > 0) {
            const int threads = share.groups * kGroupThreads;
            Product::fill_table(p.product, share.table, static_cast<int>(threadIdx.x), threads);
            sm90::named_barrier_sync(1, static_cast<unsigned>(threads));
        }
        if (group < share.strips) {
            const int row = sm90::lane_index() / 4 + static_cast<int>(threadIdx.x) / 32 * 16 + share.first_strip * kBlockRows;
            Product product(p.product, share.table, row, share.first_block);
            consume(share, product, group, sums);
        }
    } else {
        if (sm90::elect_one()) produce(share, p.product);
        __syncwarp();
    }
    __syncthreads();  // every stage has been read

    Sum* const shared_sums = reinterpret_cast<Sum*>(share.stages);
    if (consumer) store_sums<kTokens>(shared_sums, sums_pitch(share.groups), group, sums);
    p.stream.cluster > 1 ? sm90::cluster_sync() : __syncthreads();
    pdl_wait();  // also in threads that write, and read what the copies do not bring
    if (consumer) finish(share, p.product, shared_sums);
    if (p.stream.cluster > 1) sm90::cluster_arrive_relaxed(), sm90::cluster_wait();  // none leaves while others read its sums
}

// What all launches of a stream share.
template <class Product, int kTokens>
void launch_stream(const StreamPlan& plan, const StreamProblem& problem, const void* tokens, int64_t tokens_pitch,
                   const void* weights, const typename Product::Arguments& arguments, const Launch& launch, const char* what) {
    using Operand = typename Product::Operand;
    constexpr int kElementBytes = std::is_same_v<Operand, int8_t> ? 1 : 2;
    const StreamMemory memory = stream_memory(plan, problem, launch.device);
    const int64_t strips = strips_of(problem.n), blocks = blocks_of(problem.k), tiles = (problem.t + kTokens - 1) / kTokens;
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
    stream.keep = strips * blocks * problem.weight_bytes > kH100.l2_kept ? sm90::Keep::first_out : sm90::Keep::normal;
    parameters.product = arguments;

    Grid grid{};
    grid.x = static_cast<unsigned>((strips + plan.groups - 1) / plan.groups * plan.cluster);
    grid.y = static_cast<unsigned>(tiles);
    grid.threads = static_cast<unsigned>(plan.groups * kGroupThreads + kProducerThreads);
    grid.shared_bytes = static_cast<unsigned>(memory.bytes);
    grid.cluster = static_cast<unsigned>(plan.cluster);
    grid.overlap = true;
    launch_grid<stream_kernel<Product, kTokens>>(grid, launch, parameters, what);
}

}  // namespace qbert::cuda
