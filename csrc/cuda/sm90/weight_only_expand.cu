// A packed weight as a dense matrix: a CTA for each block of 64 x 128, by way of shared memory, so that rows are
// stored whole. Values are float32, outliers added, and rounded once.
#include "cuda/common/grid.h"
#include "cuda/sm90/stream_finish.cuh"
#include "cuda/sm90/weight_only.h"

namespace qbert::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kPitch = kBlockColumns + 4;

struct Parameters {
    PackedWeight weight;
    void* out;
    FloatType out_type;
    bool wide;
};

// Code `i` (of four) of a thread's quad of its words, see qbert/weight/layout/fragments.py.
template <Code kCode>
__device__ int code_at(const uint32_t (&words)[thread_words(kCode)], int quad, int i) {
    const int nibble = quad % 2 * 4 + i;
    if constexpr (kCode == Code::int8) {
        return static_cast<int8_t>(words[quad] >> (8 * i));
    } else if constexpr (kCode == Code::int4) {
        const int byte = i == 1 ? 2 : i == 2 ? 1 : i;
        return static_cast<int32_t>(words[quad / 2] << (28 - 8 * byte - quad % 2 * 4)) >> 28;
    } else if constexpr (kCode == Code::dict4) {
        return words[quad / 2] >> (4 * nibble) & 15;
    } else {
        const uint32_t* of_half = words + quad / 8 * 3;
        if (quad % 8 < 6) return of_half[quad % 8 / 2] >> (4 * nibble) & 7;
        const int bit = 4 * nibble + 3;
        return (of_half[0] >> bit & 1) | (of_half[1] >> bit & 1) << 1 | (of_half[2] >> bit & 1) << 2;
    }
}

template <Code kCode>
__device__ float value_of(const PackedWeight& a, int code, int64_t row, int64_t column) {
    if constexpr (kCode == Code::int8) return static_cast<float>(code) * static_cast<const float*>(a.scale)[row];
    if constexpr (kCode == Code::int4) {
        return static_cast<float>(code) * load_float(a.scale, FloatType::bf16, row * a.groups + column / (a.k / a.groups));
    }
    return a.codebook[code];
}

template <Code kCode>
__device__ void expand_block(const PackedWeight& a, int64_t first_row, int64_t first_column, float* tile) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int64_t block = first_row / kBlockRows * blocks_of(a.k) + first_column / kBlockColumns;
    uint32_t words[thread_words(kCode)];
#pragma unroll
    for (int piece = 0; 4 * piece < thread_words(kCode); ++piece) {
        load_piece<kCode>(a.codes + block * block_bytes(kCode), thread, piece, words);
    }
#pragma unroll
    for (int quad = 0; quad < 16; ++quad) {
        const int row = thread / 32 * 16 + lane / 4 + 8 * (quad % 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = quad / 2 * 16 + lane % 4 * 2 + i % 2 + i / 2 * 8;
            if (first_row + row >= a.n || first_column + column >= a.k) continue;
            const int code = code_at<kCode>(words, quad, i);
            tile[row * kPitch + column] = value_of<kCode>(a, code, first_row + row, first_column + column);
        }
    }
}

// A row's outliers that lie in this block; every warp has its rows.
__device__ void add_block_outliers(const Outliers& outliers, int64_t first_row, int rows, int64_t first_column, float* tile) {
    if (outliers.count == 0) return;
    for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += kWarps) {
        const int stop = outliers.rowptr[first_row + row + 1];
        for (int at = outliers.rowptr[first_row + row] + static_cast<int>(threadIdx.x) % 32; at < stop; at += 32) {
            const int64_t column = outlier_column(outliers, at) - first_column;
            if (column >= 0 && column < kBlockColumns) tile[row * kPitch + column] += outliers.delta[at];
        }
    }
}

template <Code kCode>
__global__ void __launch_bounds__(kThreads) expand_weight_kernel(const __grid_constant__ Parameters p) {
    const PackedWeight& a = p.weight;
    const int64_t first_row = int64_t{blockIdx.x} * kBlockRows, first_column = int64_t{blockIdx.y} * kBlockColumns;
    const int rows = static_cast<int>(min(int64_t{kBlockRows}, a.n - first_row));
    float* tile = reinterpret_cast<float*>(sm90::shared_memory());
    expand_block<kCode>(a, first_row, first_column, tile);
    __syncthreads();
    add_block_outliers(a.outliers, first_row, rows, first_column, tile);
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x) % 32 * kQuadChannels;
    const int columns = static_cast<int>(min(int64_t{kQuadChannels}, a.k - first_column - column));
    for (int row = static_cast<int>(threadIdx.x) / 32; row < rows && columns > 0; row += kWarps) {
        float four[kQuadChannels];
#pragma unroll
        for (int i = 0; i < kQuadChannels; ++i) four[i] = i < columns ? tile[row * kPitch + column + i] : 0.0f;
        store_floats(p.out, p.out_type, (first_row + row) * a.k + first_column + column, four, columns, p.wide);
    }
}

template <Code kCode>
void launch_of(const ExpandedWeight& a, const Launch& launch) {
    const Parameters parameters{a.weight, a.out, a.out_type, stores_quads(a.out, a.weight.k, bytes_of(a.out_type))};
    Grid grid{};
    grid.x = static_cast<unsigned>(panels_of(a.weight.n));
    grid.y = static_cast<unsigned>(blocks_of(a.weight.k));
    grid.threads = kThreads;
    grid.shared_bytes = kBlockRows * kPitch * 4;
    grid.cluster = 1;
    launch_grid<expand_weight_kernel<kCode>>(grid, launch, parameters, "expanding a weight");
}

}  // namespace

void launch_expand_weight(const ExpandedWeight& a, const Launch& launch) {
    switch (a.weight.code) {
        case Code::int4: return launch_of<Code::int4>(a, launch);
        case Code::dict4: return launch_of<Code::dict4>(a, launch);
        case Code::dict3: return launch_of<Code::dict3>(a, launch);
        case Code::int8: return launch_of<Code::int8>(a, launch);
    }
}

}  // namespace qbert::cuda
