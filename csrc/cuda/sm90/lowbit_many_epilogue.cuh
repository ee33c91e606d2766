// The end of a tile of the kernel for many tokens: scales, outliers, bias, GELU, rounding, and the way out by shared memory.
#pragma once

#include "cuda/common/finish.cuh"
#include "cuda/sm90/lowbit_many_tile.cuh"

namespace qbert::cuda {

// The float of byte i of a word of int8, each with 128 added: 2**23 with a byte as its last bits. Conversions are slower.
__device__ inline float byte_as_float(uint32_t biased, int i) {
    return __fadd_rn(__uint_as_float(sm90::prmt(biased, 0x4b000000u, 0x7440u + i)), -8388736.0f);
}

template <class Memory>
class ManyEpilogue {
    using Out = typename Memory::Out;
    static constexpr int kTokens = Memory::kTokens, kRows = ManyTile<Memory>::kRows, kColumnBlocks = kTokens / kColumnTokens;

  public:
    __device__ explicit ManyEpilogue(ManyTile<Memory>& tile_) : p(tile_.p), tile(tile_) {}

    __device__ void finish() {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const float scale = p.scale[tile.real_channel(row) / p.rows_of_scale];
#pragma unroll
            for (int j = 0; j < kTokens / 4; ++j) {
                tile.set_value(row, j, __fmul_rn(__int2float_rn(tile.sums[row / 2][tile.sum_of(row, j)]), scale));
            }
        }
        if constexpr (Memory::kCode != Code::int4) {
            if (p.outliers.count > 0) add_outliers();
        }
        float bias[kRows];
#pragma unroll
        for (int row = 0; row < kRows; ++row) bias[row] = load_bias(p.bias, p.bias_type, tile.real_channel(row));
#pragma unroll
        for (int first = 0; first < kTokens; first += Memory::kChunkTokens) {
            sm90::named_barrier_sync(kWarpgroupBarrier + tile.warpgroup, kWarpgroupThreads);  // the chunk before has left
            write_chunk(first, bias);
            sm90::named_barrier_sync(kWarpgroupBarrier + tile.warpgroup, kWarpgroupThreads);
            store_chunk(first);
        }
    }

  private:
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
    using Column = uint4[kColumnBlocks];
    __device__ void load_column(int column, Column& to) const {
        const int64_t start = int64_t{tile.first_token} * p.k + int64_t{column} * kColumnTokens;
        const unsigned char* tokens = p.columns + start + tile.c() * 16;
#pragma unroll
        for (int block = 0; block < kColumnBlocks; ++block) {
            to[block] = *reinterpret_cast<const uint4*>(tokens + int64_t{block} * p.k * kColumnTokens);
        }
    }

    __device__ void add_column(int row, float delta, const Column& column) {
#pragma unroll
        for (int j = 0; j < kTokens / 4; ++j) {
            const uint4& four = column[j / 16];
            const uint32_t word = j % 16 < 4 ? four.x : j % 16 < 8 ? four.y : j % 16 < 12 ? four.z : four.w;
            tile.set_value(row, j, fmaf(delta, byte_as_float(word ^ 0x80808080u, j % 4), tile.value(row, j)));
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
            const int start = p.outliers.rowptr[tile.real_channel(row)];
            end[row] = tile.channel(row) < p.n ? p.outliers.rowptr[tile.channel(row) + 1] : start;
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
        for (int row = 0; row < kRows; ++row) y[row] = scale_and_add(tile.value(row, j), s, bias[row]);
        if (p.finish.activation == Activation::gelu) {
#pragma unroll
            for (int row = 0; row < kRows; ++row) y[row] = gelu(y[row]);
        }
    }

    __device__ void write_chunk(int first, const float (&bias)[kRows]) const {
#pragma unroll
        for (int j = first / 4; j < (first + Memory::kChunkTokens) / 4; ++j) {
            const int token = j / 2 * 8 + tile.c() * 2 + j % 2;
            float y[kRows];
            finish_token(j, tile.first_token + token < p.t ? p.s[tile.first_token + token] : 0.0f, bias, y);
            uint32_t* to = memory.chunk(tile.warpgroup) + (token - first) * Memory::kRowWords;
            if constexpr (sizeof(Out) == 4) {
#pragma unroll
                for (int row = 0; row < kRows; ++row) to[tile.row_of_warpgroup(row)] = __float_as_uint(y[row]);
            } else if constexpr (sizeof(Out) == 2) {
#pragma unroll
                for (int i = 0; i < kWarpgroupPanels; ++i) {
                    to[i * 32 + tile.warp() * 8 + tile.g()] = round_to_16_bits(y[2 * i], y[2 * i + 1], p.finish.float_type);
                }
            } else {
                uint32_t word = 0;
#pragma unroll
                for (int row = 0; row < kRows; ++row) {
                    word |= (static_cast<uint32_t>(round_to_int8(y[row], p.finish)) & 0xff) << 8 * row;
                }
                to[tile.warp() * 8 + tile.g()] = word;
            }
        }
    }

    // The 16 bytes of neighbouring channels that are piece `piece` of a token's row.
    __device__ static uint4 gather_piece(const uint32_t* row, int piece) {
        if constexpr (sizeof(Out) == 4) {
            return reinterpret_cast<const uint4*>(row)[piece];
        } else {
            const int half = sizeof(Out) == 2 ? piece % 2 : piece / kWarpgroupWarps;  // of rows g and g + 8; panel
            const uint32_t* of_warp = row + (sizeof(Out) == 2 ? piece / 2 : piece % kWarpgroupWarps) * 8;
            const uint4 a = *reinterpret_cast<const uint4*>(of_warp), b = *reinterpret_cast<const uint4*>(of_warp + 4);
            if constexpr (sizeof(Out) == 2) {
                const uint32_t take = half == 0 ? 0x5410 : 0x7632;
                return make_uint4(sm90::prmt(a.x, a.y, take), sm90::prmt(a.z, a.w, take),
                                  sm90::prmt(b.x, b.y, take), sm90::prmt(b.z, b.w, take));
            } else {
                const uint32_t take = half == 0 ? 0x5140 : 0x7362;  // of two words: both rows g, then both g + 8
                const uint32_t a0 = sm90::prmt(a.x, a.y, take), a1 = sm90::prmt(a.z, a.w, take);
                const uint32_t b0 = sm90::prmt(b.x, b.y, take), b1 = sm90::prmt(b.z, b.w, take);
                return make_uint4(sm90::prmt(a0, a1, 0x5410), sm90::prmt(b0, b1, 0x5410),
                                  sm90::prmt(a0, a1, 0x7632), sm90::prmt(b0, b1, 0x7632));
            }
        }
    }

    __device__ void store_chunk(int first) const {
        constexpr int kPieceChannels = 16 / sizeof(Out), kPieces = kWarpgroupChannels / kPieceChannels;
#pragma unroll 2
        for (int i = static_cast<int>(tile.thread()); i < Memory::kChunkTokens * kPieces; i += kWarpgroupThreads) {
            const int token = i / kPieces, from = tile.first_channel + i % kPieces * kPieceChannels;
            if (tile.first_token + first + token >= p.t || from >= p.n) continue;
            const uint4 piece = gather_piece(memory.chunk(tile.warpgroup) + token * Memory::kRowWords, i % kPieces);
            Out* to = reinterpret_cast<Out*>(p.out) + (tile.first_token + first + token) * p.out_pitch + from;
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
    ManyTile<Memory>& tile;
};

}  // namespace qbert::cuda
