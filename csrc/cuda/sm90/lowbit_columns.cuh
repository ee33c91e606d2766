// The tokens once more, column by column: what outliers are added from. As q lies, (t, k), a column of 128 tokens is 128
// sectors of 32 bytes; here it is four.
#pragma once

#include "cuda/common/grid.h"
#include "cuda/sm90/lowbit.h"
#include "cuda/sm90/lowbit_plan.h"
#include "cuda/sm90/sm90.cuh"

namespace qbert::cuda {

struct ColumnsParameters {
    const int8_t* q;
    int64_t q_pitch;
    int t, k;
    unsigned char* columns;
};

inline constexpr int kColumnsThreads = 128, kColumnsOfBlock = 128;

// Columns `column` ... + 3 of a token, zeros beyond the edges.
__device__ inline uint32_t load_four_columns(const ColumnsParameters& p, int64_t token, int column) {
    if (token >= p.t) return 0;
    const int8_t* at = p.q + token * p.q_pitch + column;
    if (column + 4 <= p.k) return *reinterpret_cast<const uint32_t*>(at);
    uint32_t word = 0;
    for (int i = 0; column + i < p.k; ++i) word |= uint32_t{static_cast<uint8_t>(at[i])} << 8 * i;
    return word;
}

// q (t, k) to columns (blocks, k, 64), zeros beyond the last token. Token 8 i + 2 c + e of a block of 64 stands at place
// 16 c + 2 i + e: a thread of wgmma's accumulators has the tokens of one c, and takes 16 of them with one load. Blocks of the
// grid: (blocks of tokens, k / 128). A warp reads 32 columns, eight lanes a sector of a token, and writes whole sectors too.
__global__ void __launch_bounds__(kColumnsThreads) lowbit_columns_kernel(const __grid_constant__ ColumnsParameters p) {
    pdl_launch_dependents();
    pdl_wait();
    const int c = static_cast<int>(threadIdx.x) % 4;
    const int column = static_cast<int>(blockIdx.y) * kColumnsOfBlock + static_cast<int>(threadIdx.x) / 4 * 4;
    if (column >= p.k) return;
    uint32_t out[4][4];  // column, word of 4 tokens
#pragma unroll
    for (int word = 0; word < 4; ++word) {
        uint32_t in[4];
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
            const int i = 2 * word + byte / 2, e = byte % 2;
            in[byte] = load_four_columns(p, int64_t{blockIdx.x} * kColumnTokens + 8 * i + 2 * c + e, column);
        }
        // Four by four bytes, transposed.
        const uint32_t low01 = sm90::prmt(in[0], in[1], 0x5140), high01 = sm90::prmt(in[0], in[1], 0x7362);
        const uint32_t low23 = sm90::prmt(in[2], in[3], 0x5140), high23 = sm90::prmt(in[2], in[3], 0x7362);
        out[0][word] = sm90::prmt(low01, low23, 0x5410);
        out[1][word] = sm90::prmt(low01, low23, 0x7632);
        out[2][word] = sm90::prmt(high01, high23, 0x5410);
        out[3][word] = sm90::prmt(high01, high23, 0x7632);
    }
    unsigned char* to = p.columns + (int64_t{blockIdx.x} * p.k + column) * kColumnTokens + 16 * c;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (column + i >= p.k) break;
        *reinterpret_cast<uint4*>(to + i * kColumnTokens) = make_uint4(out[i][0], out[i][1], out[i][2], out[i][3]);
    }
}

inline void launch_columns(const LowbitLinear& a, const Launch& launch) {
    const ColumnsParameters parameters{a.q, a.q_pitch, static_cast<int>(a.t), static_cast<int>(a.k),
                                       reinterpret_cast<unsigned char*>(a.columns)};
    Grid grid{};
    grid.x = static_cast<unsigned>(column_blocks(a.t));
    grid.y = static_cast<unsigned>((a.k + kColumnsOfBlock - 1) / kColumnsOfBlock);
    grid.threads = kColumnsThreads;
    grid.cluster = 1;
    grid.overlap = true;
    launch_grid<lowbit_columns_kernel>(grid, launch, parameters, "lowbit_linear's columns");
}

}  // namespace qbert::cuda
