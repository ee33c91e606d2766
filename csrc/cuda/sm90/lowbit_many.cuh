// Dictionary or int4 weights times int8 tokens on Hopper's matrix units, for many tokens: Y^T = W X^T, weights as wgmma's A
// operand from registers, expanded from 3 or 4 bits while the products of the block before run.
//
// A block is a producer warp and two consumer warp groups. In pingpong each owns whole tiles of 128 channels x 128 (or 64)
// tokens, so that the end of one's tile (outliers, GELU, rounding) hides behind the other's products; in cooperation both share
// a tile of 256 channels, which halves what its tokens cost. Blocks are persistent; clusters of two, neighbours along the
// channels, share their tokens: each fetches half of them and sends it to both.
//
// In cycles of a multiprocessor, by arithmetic, for a step of 128 columns and 128 tokens, whose products take 512:
//
//     products        2 strips x 4 steps x 64 (64 x 128 x 32 at 4096 multiply-adds)                              512
//     expansion       instructions of a warp, two cycles each of a scheduler: dict3 84, int4 144, dict4 176      168 ... 352
//     shared memory   tokens read by the products 32 KB, written 16; codes written and read 6 ... 8 each:
//                     60 ... 64 KB at 128 bytes (in cooperation 52 ... 56)                                       480 ... 512
//     from L2         8 KB of tokens (16 without the pair) and 6 ... 8 of codes: 14 ... 16 KB, 28 ... 32 bytes a cycle,
//                     what all multiprocessors together can have; without the pair it would be 44 ... 48
//
// So the matrix units need never wait, if expansion runs beside them: a batch of products is under way while the registers of
// the next are made (two sets of 32). Products of a step are issued in pairs with a quarter of the next block's expansion
// between them, so that this holds whether issuing a product waits for the one before or not.
//
// Tiles of 64 tokens are for problems with too few tiles of 128 to fill the GPU: a step is then as long as its expansion.
#pragma once

#include <utility>

#include "cuda/common/error.h"
#include "cuda/common/finish.cuh"
#include "cuda/common/grid.h"
#include "cuda/sm90/arch.h"
#include "cuda/sm90/expand.cuh"
#include "cuda/sm90/lowbit_many.h"
#include "cuda/sm90/lowbit_plan.h"
#include "cuda/sm90/sm90.cuh"
#include "cuda/sm90/tensor_map.h"

namespace qbert::cuda {

// Threads: the producer's warp group, of which one or two warps work, and the consumers'.
inline constexpr int kGroupWarps = kGroupThreads / 32, kConsumers = 2;
inline constexpr int kGroupStrips = 2, kGroupChannels = kGroupStrips * kBlockRows;  // of a consumer at a time
inline constexpr int kManyThreads = (1 + kConsumers) * kGroupThreads;
// Named barriers: a consumer's turn at the matrix units, and a consumer's own four warps.
inline constexpr unsigned kTurnBarrier = 1, kGroupBarrier = kTurnBarrier + kConsumers;

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
    int strips;
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
__device__ inline int cluster_index() { return static_cast<int>(blockIdx.x) / kPair; }
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
    static constexpr int kTileChannels = kLowbitTiles[kIndex].channels, kStageStrips = kTileChannels / kBlockRows;
    // Registers of a thread once they have been shared out again: the sums of 128 tokens leave a producer just what it needs.
    static constexpr int kProducerRegisters = kTokens == 128 ? 24 : 40, kConsumerRegisters = kTokens == 128 ? 240 : 232;
    static constexpr int kUsers = kPingpong ? 1 : kConsumers;  // warp groups of a block that a stage is for
    static_assert(kStageStrips == kUsers * kGroupStrips);

    static constexpr int kTokenBytes = kTokens * kBlockColumns;
    static constexpr int kCodeBytes = block_bytes(kCode);
    static constexpr int kStageBytes = kTokenBytes + kStageStrips * kCodeBytes;
    static_assert(kStageBytes % 1024 == 0);  // swizzled tokens

    // A chunk of a tile's tokens. A token's row holds words of what one thread has: a float32, two 16-bit floats of rows g and
    // g + 8, or int8 of these rows of both strips. Four more words make the rows of the four tokens that a warp writes at once
    // start eight banks apart.
    static constexpr int kChunkTokens = kTokens < 128 / static_cast<int>(sizeof(Out)) ? kTokens : 128 / sizeof(Out);
    static constexpr int kRowWords = kGroupChannels * static_cast<int>(sizeof(Out)) / 4 + 4;
    static constexpr int kChunkBytes = kChunkTokens * kRowWords * 4;

    static constexpr bool kHasScales = kCode == Code::int4;
    static constexpr int kScaleBytes = kHasScales ? kTileChannels * 4 : 0;  // of a stage: a word a row, see RowMeaning

    static constexpr int kBarriersMax = 1024;
    static constexpr int kRoom = kH100.cta_shared - kConsumers * kChunkBytes - kBarriersMax;
    static constexpr int kFitting = kRoom / (kStageBytes + kScaleBytes), kStages = kFitting < 8 ? kFitting : 8;
    static constexpr int kChunksAt = kStages * kStageBytes, kScalesAt = kChunksAt + kConsumers * kChunkBytes;
    static constexpr int kBarriersAt = kScalesAt + kStages * kScaleBytes, kBytes = kBarriersAt + kBarriersMax;

    unsigned char* base = sm90::shared_memory();

    __device__ unsigned char* tokens(int stage) const { return base + stage * kStageBytes; }
    __device__ unsigned char* codes(int stage, int strip) const {
        return tokens(stage) + kTokenBytes + strip * kCodeBytes;
    }
    __device__ uint32_t* chunk(int consumer) const {
        return reinterpret_cast<uint32_t*>(base + kChunksAt + consumer * kChunkBytes);
    }
    __device__ uint32_t* scales(int stage) const {
        return reinterpret_cast<uint32_t*>(base + kScalesAt + stage * kScaleBytes);
    }
    __device__ sm90::Barrier* barriers() const { return reinterpret_cast<sm90::Barrier*>(base + kBarriersAt); }
    __device__ sm90::Barrier& full(int stage) const { return barriers()[stage]; }
    __device__ sm90::Barrier& empty(int stage) const { return barriers()[kStages + stage]; }
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
                sm90::barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
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
        const LowbitPlan::Place place = p.plan.place(to);
        tile = to;
        block = 0;
        strip = (place.channel_pair * kPair + rank()) * Memory::kStageStrips;
        token = place.token_tile * Memory::kTokens + rank() * kHalf;
    }
    __device__ void fetch_codes(int stage) const {
        sm90::Barrier& full = memory.full(stage);
        sm90::barrier_arrive_expect(full, Memory::kStageBytes);
#pragma unroll 1
        for (int i = 0; i < Memory::kStageStrips; ++i) {
            const int real = strip + i < p.strips ? strip + i : p.strips - 1;  // beyond the last: any, it is not stored
            sm90::copy_bytes(memory.codes(stage, i), p.codes + int64_t{real * p.blocks + block} * Memory::kCodeBytes,
                             Memory::kCodeBytes, full);
        }
    }
    __device__ void fetch_tokens(int stage) const {
        sm90::copy_box_to_blocks(memory.tokens(stage) + rank() * kHalf * kBlockColumns, p.tokens, block * kBlockColumns, token,
                                 memory.full(stage), (1 << kPair) - 1);
    }
    __device__ static int rank() { return static_cast<int>(sm90::cluster_rank()); }

    static constexpr int kHalf = Memory::kTokens / kPair;  // tokens that this block fetches for both
    const ManyParameters& p;
    const Memory memory{};
    int tile, block, strip, token;  // what comes next
};

// ---- group scales ----------------------------------------------------------------------------------------------------

// A row's group scales of a block, a byte for each step. Those of padding beyond the last group may be any: its codes are 0.
__device__ inline uint32_t load_scales(const ManyGroupScales& g, int row, int block) {
    const int at = g.skew + row * g.groups + static_cast<int>(static_cast<uint64_t>(block) * g.step >> 32);
    const uint32_t low = g.words[at / 4];
    const bool goes_on = at % 4 + g.of_block > 4 && at / 4 < g.last;
    const uint32_t high = goes_on ? g.words[at / 4 + 1] : 0;
    return sm90::permute_bytes(static_cast<uint32_t>((uint64_t{high} << 32 | low) >> at % 4 * 8), 0, g.selector);
}

// A warp beside the producer puts them into the stages: no copy could take them, which are as narrow as a byte a row, and the
// consumers have neither instructions nor registers for their addresses.
template <class Memory>
__device__ void put_scales(const ManyParameters& p) {
    const Memory memory{};
    const int lane = sm90::lane_index(), rank = static_cast<int>(sm90::cluster_rank());
    Ring<Memory::kStages> ring(0);
    for (int i = 0; i < cluster_tiles(p); ++i) {
        const LowbitPlan::Place place = p.plan.place(cluster_index() + i * p.clusters);
        const int first = (place.channel_pair * kPair + rank) * Memory::kTileChannels;
        for (int block = 0; block < p.blocks; ++block, ring.advance()) {
            sm90::barrier_wait(memory.empty(ring.stage), ring.parity ^ 1);
#pragma unroll 2
            for (int row = lane; row < Memory::kTileChannels; row += 32) {
                const int channel = first + row < p.n ? first + row : p.n - 1;
                memory.scales(ring.stage)[row] = load_scales(p.group_scales, channel, block);
            }
            __syncwarp();
            if (lane == 0) sm90::barrier_arrive(memory.full(ring.stage));
        }
    }
}

// ---- consumers --------------------------------------------------------------------------------------------------------

// The float of byte i of a word of int8, each with 128 added: 2**23 with a byte as its last bits. Conversions are slower.
__device__ inline float byte_as_float(uint32_t biased, int i) {
    return __fadd_rn(__uint_as_float(sm90::permute_bytes(biased, 0x4b000000u, 0x7440u + i)), -8388736.0f);
}

template <class Memory>
class Consumer {
    using Out = typename Memory::Out;
    static constexpr Code kCode = Memory::kCode;
    static constexpr int kTokens = Memory::kTokens;
    static constexpr bool kPingpong = Memory::kPingpong;
    static constexpr int kRows = 2 * kGroupStrips;  // of a thread: g and g + 8 of each strip
    static constexpr int kSums = kTokens / 2;      // of a thread and strip
    static constexpr int kTurns = kTokens / kTurn;
    using Operand = uint32_t[kGroupStrips][kSteps][kStepRegisters];

  public:
    // The compiler must see that the group is the same in all lanes: products in branches that it takes for divergent wait for
    // each other (C7520).
    __device__ Consumer(const ManyParameters& p_, int group_) : p(p_), group(group_) {}

    // Every second of the cluster's tiles, or this group's half of all.
    __device__ void run() {
        const int tiles = cluster_tiles(p);
        for (int i = kPingpong ? group : 0; i < tiles; i += kPingpong ? kConsumers : 1) {
            const LowbitPlan::Place place = p.plan.place(cluster_index() + i * p.clusters);
            const int channel_tile = place.channel_pair * kPair + static_cast<int>(sm90::cluster_rank());
            first_channel = channel_tile * Memory::kTileChannels + first_strip() * kBlockRows;
            first_token = place.token_tile * kTokens;
            multiply(i * p.blocks, kPingpong && i > 0, kPingpong && i + 1 < tiles);
            finish();
        }
    }

  private:
    __device__ static unsigned thread() { return threadIdx.x % kGroupThreads; }  // asked for anew: a register is dearer
    __device__ int first_strip() const { return kPingpong ? 0 : group * kGroupStrips; }  // of a stage
    // Where wgmma's operand and accumulators are: rows 16 warp + g and 8 more, tokens 8 i + 2 c and the next.
    __device__ int warp() const { return static_cast<int>(thread() / 32); }
    __device__ int g() const { return static_cast<int>(thread() / 4 % 8); }
    __device__ int c() const { return static_cast<int>(thread() % 4); }

    // A thread's row 2 * strip + half of a strip: among the group's, its channel, and the same kept within the matrix.
    __device__ int row_of_group(int row) const { return row / 2 * kBlockRows + warp() * 16 + g() + row % 2 * 8; }
    __device__ int channel(int row) const { return first_channel + row_of_group(row); }
    __device__ int real_channel(int row) const { return channel(row) < p.n ? channel(row) : p.n - 1; }

    // ---- products

    // What the codes of the thread's rows mean: for a tile, of int4 for a block.
    using Meanings = RowMeaning<kCode>[kRows];

    __device__ void load_dictionaries(Meanings& to) const {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            to[row] = load_dictionary<kCode>(p.codebook, real_channel(row) / p.rows_of_scale);
        }
    }
    __device__ void load_block_scales(int stage, Meanings& to) const {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            to[row].scales = memory.scales(stage)[first_strip() * kBlockRows + row_of_group(row)];
        }
    }

    // A step of the next block's operand, from shared memory; steps come in order, and loads a piece at a time.
    __device__ void expand(int stage, int step, uint32_t (&words)[kGroupStrips][thread_words(kCode)],
                           Meanings& meaning, Operand& to) const {
        if constexpr (Memory::kHasScales) {
            if (step == 0) load_block_scales(stage, meaning);
        }
#pragma unroll
        for (int i = 0; i < kGroupStrips; ++i) {
            const unsigned char* codes = memory.codes(stage, first_strip() + i);
            if (step % 2 == 0) load_piece<kCode>(codes, static_cast<int>(thread()), step / 2, words[i]);
            expand_step<kCode>(words[i], meaning[2 * i], meaning[2 * i + 1], step, to[i][step]);
            sm90::keep_in_place(to[i][step]);  // now, not just before the product that reads it
        }
    }

    __device__ void multiply_step(int stage, int step, const Operand& operand) {
        const uint64_t tokens = sm90::swizzled_operand(sm90::shared_address(memory.tokens(stage)) + step * kStepColumns);
#pragma unroll
        for (int i = 0; i < kGroupStrips; ++i) sm90::multiply_s8<kTokens>(sums[i], operand[i][step], tokens, true);
    }

    // What the other block's producer fills too is released in both.
    __device__ void release(int stage) const {
        __syncwarp();
        if (thread() % 32 < kPair) sm90::barrier_arrive_in_block(memory.empty(stage), thread() % 32);
    }

    // Products of one block while the next block's operand is made.
    __device__ void multiply_and_expand(Ring<Memory::kStages>& at, bool first, const Operand& operand, Operand& next,
                                        Meanings& meaning) {
        Ring<Memory::kStages> after = at;
        after.advance();
        uint32_t words[kGroupStrips][thread_words(kCode)];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            sm90::products_begin();
            multiply_step(at.stage, step, operand);
            if (step == 0) {
                sm90::products_commit();
                sm90::products_wait<1>();  // the block before is done with: its operand's registers and its stage
                if (!first) release(at.before());
                sm90::barrier_wait(memory.full(after.stage), after.parity);
            }
            expand(after.stage, step, words, meaning, next);
        }
        sm90::products_commit();
        at = after;
    }

    __device__ void multiply_last(const Ring<Memory::kStages>& at, const Operand& operand) {
        sm90::products_begin();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) multiply_step(at.stage, step, operand);
        sm90::products_commit();
    }

    __device__ void expand_first(const Ring<Memory::kStages>& at, Operand& to, Meanings& meaning) const {
        sm90::barrier_wait(memory.full(at.stage), at.parity);
        uint32_t words[kGroupStrips][thread_words(kCode)];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) expand(at.stage, step, words, meaning, to);
    }

    // A group's turn comes when the other's last block has arrived: the products of that one last as long as this group's first
    // expansion. Not before, as a wait for a stage could then mean the round before the last.
    __device__ void multiply(int position, bool wait_for_turn, bool pass_turn) {
        Ring<Memory::kStages> at(position);
        Meanings meaning;
        Operand even, odd;  // of blocks of these numbers
        if constexpr (!Memory::kHasScales) load_dictionaries(meaning);
#pragma unroll
        for (int i = 0; i < kGroupStrips; ++i) {
#pragma unroll
            for (int j = 0; j < kSums; ++j) sums[i][j] = 0;
        }
        if (wait_for_turn) sm90::named_barrier_sync(kTurnBarrier + group, kConsumers * kGroupThreads);
        expand_first(at, even, meaning);
        keep_sums();
        int block = 0;
        for (; block + 2 < p.blocks; block += 2) {
            multiply_and_expand(at, block == 0, even, odd, meaning);
            multiply_and_expand(at, false, odd, even, meaning);
        }
        const bool one_more = block + 2 == p.blocks;
        if (one_more) multiply_and_expand(at, block == 0, even, odd, meaning);
        if (pass_turn) sm90::named_barrier_arrive(kTurnBarrier + 1 - group, kConsumers * kGroupThreads);
        if (one_more) {
            multiply_last(at, odd);
        } else {
            multiply_last(at, even);
        }
        if (p.blocks > 1) {
            sm90::products_wait<1>();
            release(at.before());
        }
        sm90::products_wait<0>();
        release(at.stage);
        keep_sums();
    }

    __device__ void keep_sums() {
#pragma unroll
        for (int i = 0; i < kGroupStrips; ++i) sm90::keep_in_place(sums[i]);
    }

    // ---- the end of a tile

    // Value j of four of a row: token 8 (j / 2) + 2 (c()) + j % 2 of the tile. Sums become floats where they lie.
    static constexpr int sum_of(int row, int j) { return j / 2 * 4 + row % 2 * 2 + j % 2; }
    __device__ float value(int row, int j) const { return __int_as_float(sums[row / 2][sum_of(row, j)]); }
    __device__ void set_value(int row, int j, float to) { sums[row / 2][sum_of(row, j)] = __float_as_int(to); }

    __device__ void finish() {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const float scale = p.scale[real_channel(row) / p.rows_of_scale];
#pragma unroll
            for (int j = 0; j < kTokens / 4; ++j) {
                set_value(row, j, __fmul_rn(__int2float_rn(sums[row / 2][sum_of(row, j)]), scale));
            }
        }
        if constexpr (kCode != Code::int4) {
            if (p.outliers.count > 0) add_outliers();
        }
        float bias[kRows];
#pragma unroll
        for (int row = 0; row < kRows; ++row) bias[row] = load_bias(p.bias, p.bias_type, real_channel(row));
#pragma unroll
        for (int first = 0; first < kTokens; first += Memory::kChunkTokens) {
            sm90::named_barrier_sync(kGroupBarrier + group, kGroupThreads);  // the chunk before has left
            write_chunk(first, bias);
            sm90::named_barrier_sync(kGroupBarrier + group, kGroupThreads);
            store_chunk(first);
        }
    }

    // An outlier: how much, and where its column of the tokens starts.
    struct Outlier {
        float delta;
        int column;
    };
    // Number `at` of the matrix; beyond the row's last nothing, of column 0.
    __device__ Outlier load_outlier(int at, int end) const {
        if (at >= end) return {0.0f, 0};
        const void* columns = p.outliers.col;
        return {p.outliers.delta[at], p.outliers.col_bytes == 2 ? static_cast<const int16_t*>(columns)[at]
                                                                : static_cast<const int32_t*>(columns)[at]};
    }

    // A thread's tokens of a column.
    using Column = uint4[kTurns];
    __device__ void load_column(int column, Column& to) const {
        const unsigned char* tokens = p.columns + (int64_t{first_token} * p.k + int64_t{column} * kTurn) + c() * 16;
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            to[turn] = *reinterpret_cast<const uint4*>(tokens + int64_t{turn} * p.k * kTurn);
        }
    }

    __device__ void add_column(int row, float delta, const Column& column) {
#pragma unroll
        for (int j = 0; j < kTokens / 4; ++j) {
            const uint4& four = column[j / 16];
            const uint32_t word = j % 16 < 4 ? four.x : j % 16 < 8 ? four.y : j % 16 < 12 ? four.z : four.w;
            set_value(row, j, fmaf(delta, byte_as_float(word ^ 0x80808080u, j % 4), value(row, j)));
        }
    }

    // Outliers of a row in their order, with fused multiply-adds, one of each of the thread's rows at a time: so a token's bits
    // depend neither on the tile nor on the batch. As soon as a row's column is used the row's next one is on its way, and the
    // outlier after that: both have the time of three rows to arrive. A warp goes on to the end of its richest row.
    __device__ void add_outliers() {
        int next[kRows], end[kRows], most = 0;
        float delta[kRows];
        Outlier after[kRows];
        Column column[kRows];
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const int start = p.outliers.rowptr[real_channel(row)];
            end[row] = channel(row) < p.n ? p.outliers.rowptr[channel(row) + 1] : start;
            next[row] = start + 2;
            most = end[row] - start > most ? end[row] - start : most;
            const Outlier first = load_outlier(start, end[row]);
            delta[row] = first.delta;
            load_column(first.column, column[row]);
            after[row] = load_outlier(start + 1, end[row]);
        }
        for (auto left = __reduce_max_sync(0xffffffffu, static_cast<unsigned>(most)); left > 0; --left) {
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
                add_column(row, delta[row], column[row]);
                delta[row] = after[row].delta;
                load_column(after[row].column, column[row]);
                after[row] = load_outlier(next[row]++, end[row]);
            }
        }
    }

    // A token's finished values of this thread's rows.
    __device__ void finish_token(int j, float s, const float (&bias)[kRows], float (&y)[kRows]) const {
#pragma unroll
        for (int row = 0; row < kRows; ++row) y[row] = scale_and_add(value(row, j), s, bias[row]);
        if (p.finish.activation == Activation::gelu) {
#pragma unroll
            for (int row = 0; row < kRows; ++row) y[row] = gelu(y[row]);
        }
    }

    __device__ void write_chunk(int first, const float (&bias)[kRows]) const {
#pragma unroll
        for (int j = first / 4; j < (first + Memory::kChunkTokens) / 4; ++j) {
            const int token = j / 2 * 8 + c() * 2 + j % 2;
            float y[kRows];
            finish_token(j, first_token + token < p.t ? p.s[first_token + token] : 0.0f, bias, y);
            uint32_t* to = memory.chunk(group) + (token - first) * Memory::kRowWords;
            if constexpr (sizeof(Out) == 4) {
#pragma unroll
                for (int row = 0; row < kRows; ++row) to[row_of_group(row)] = __float_as_uint(y[row]);
            } else if constexpr (sizeof(Out) == 2) {
#pragma unroll
                for (int i = 0; i < kGroupStrips; ++i) {
                    to[i * 32 + warp() * 8 + g()] = round_to_16_bits(y[2 * i], y[2 * i + 1], p.finish.float_type);
                }
            } else {
                uint32_t word = 0;
#pragma unroll
                for (int row = 0; row < kRows; ++row) {
                    word |= (static_cast<uint32_t>(round_to_int8(y[row], p.finish.inverse_out_scale)) & 0xff) << 8 * row;
                }
                to[warp() * 8 + g()] = word;
            }
        }
    }

    // The 16 bytes of neighbouring channels that are piece `piece` of a token's row.
    __device__ static uint4 gather_piece(const uint32_t* row, int piece) {
        if constexpr (sizeof(Out) == 4) {
            return reinterpret_cast<const uint4*>(row)[piece];
        } else {
            const int half = sizeof(Out) == 2 ? piece % 2 : piece / kGroupWarps;  // of rows g and g + 8; strip
            const uint32_t* of_warp = row + (sizeof(Out) == 2 ? piece / 2 : piece % kGroupWarps) * 8;
            const uint4 a = *reinterpret_cast<const uint4*>(of_warp), b = *reinterpret_cast<const uint4*>(of_warp + 4);
            if constexpr (sizeof(Out) == 2) {
                const uint32_t take = half == 0 ? 0x5410 : 0x7632;
                return make_uint4(sm90::permute_bytes(a.x, a.y, take), sm90::permute_bytes(a.z, a.w, take),
                                  sm90::permute_bytes(b.x, b.y, take), sm90::permute_bytes(b.z, b.w, take));
            } else {
                const uint32_t take = half == 0 ? 0x5140 : 0x7362;  // of two words: both rows g, then both g + 8
                const uint32_t a0 = sm90::permute_bytes(a.x, a.y, take), a1 = sm90::permute_bytes(a.z, a.w, take);
                const uint32_t b0 = sm90::permute_bytes(b.x, b.y, take), b1 = sm90::permute_bytes(b.z, b.w, take);
                return make_uint4(sm90::permute_bytes(a0, a1, 0x5410), sm90::permute_bytes(b0, b1, 0x5410),
                                  sm90::permute_bytes(a0, a1, 0x7632), sm90::permute_bytes(b0, b1, 0x7632));
            }
        }
    }

    __device__ void store_chunk(int first) const {
        constexpr int kPieceChannels = 16 / sizeof(Out), kPieces = kGroupChannels / kPieceChannels;
#pragma unroll 2
        for (int i = static_cast<int>(thread()); i < Memory::kChunkTokens * kPieces; i += kGroupThreads) {
            const int token = i / kPieces, from = first_channel + i % kPieces * kPieceChannels;
            if (first_token + first + token >= p.t || from >= p.n) continue;
            const uint4 piece = gather_piece(memory.chunk(group) + token * Memory::kRowWords, i % kPieces);
            Out* to = reinterpret_cast<Out*>(p.out) + (first_token + first + token) * p.out_pitch + from;
            if (p.whole_pieces && from + kPieceChannels <= p.n) {
                *reinterpret_cast<uint4*>(to) = piece;
            } else {
                const uint32_t words[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
                for (int e = 0; e < kPieceChannels; ++e) {
                    constexpr int kOfWord = 4 / sizeof(Out);
                    if (from + e < p.n) to[e] = static_cast<Out>(words[e / kOfWord] >> e % kOfWord * 8 * sizeof(Out));
                }
            }
        }
    }

    const ManyParameters& p;
    const Memory memory{};
    const int group;
    int first_channel = 0, first_token = 0;  // of the tile
    int32_t sums[kGroupStrips][kSums];
};

// Out: uint32_t, uint16_t or uint8_t, as wide as the results.
template <Code kCode, LowbitTileIndex kIndex, class Out>
__global__ void __launch_bounds__(kManyThreads, 1) lowbit_many_kernel(const __grid_constant__ ManyParameters p) {
    using Memory = ManyMemory<kCode, kIndex, Out>;
    static_assert(2 * Memory::kStages * sizeof(sm90::Barrier) <= Memory::kBarriersMax);
    const int group = sm90::warp_index() / kGroupWarps;
    pdl_launch_dependents();
    if (threadIdx.x == 0) {
        const Memory memory{};
        for (int i = 0; i < Memory::kStages; ++i) {
            sm90::barrier_init(memory.full(i), 1 + Memory::kHasScales);  // the producer and its bytes, and the scales
            sm90::barrier_init(memory.empty(i), kPair * Memory::kUsers * kGroupWarps);  // warps that use it, of both blocks
        }
        sm90::fence_barrier_init();
        sm90::prefetch_map(p.tokens);
    }
    sm90::cluster_sync();

    if (group == 0) {
        sm90::give_registers<Memory::kProducerRegisters>();
        if (sm90::warp_index() == 0 && sm90::elect_one()) Producer<Memory>(p).run();
        if constexpr (Memory::kHasScales) {
            if (sm90::warp_index() == 1) put_scales<Memory>(p);
        }
        __syncwarp();
    } else {
        sm90::take_registers<Memory::kConsumerRegisters>();
        pdl_wait();
        Consumer<Memory>(p, group - 1).run();
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

inline ManyParameters many_parameters(const LowbitLinear& a, const LowbitTile& tile, int multiprocessors) {
    ManyParameters p{};
    p.tokens = tensor_map(a.q, a.t, a.k, a.q_pitch, 1, tile.tokens / kPair);
    p.plan = lowbit_plan(tile, a.t, a.n);
    p.clusters = lowbit_clusters(p.plan, multiprocessors);
    p.t = static_cast<int>(a.t);
    p.n = static_cast<int>(a.n);
    p.k = static_cast<int>(a.k);
    p.blocks = static_cast<int>(blocks_of(a.k));
    p.codes = a.codes;
    p.strips = static_cast<int>(strips_of(a.n));
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
    const ManyParameters parameters = many_parameters(linear, kLowbitTiles[kIndex], launch.device.multiprocessors);
    Grid grid{};
    grid.x = static_cast<unsigned>(parameters.clusters * kPair);
    grid.y = 1;
    grid.threads = kManyThreads;
    grid.shared_bytes = Memory::kBytes;
    grid.cluster = kPair;
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
