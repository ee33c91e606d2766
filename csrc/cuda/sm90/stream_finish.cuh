// What streaming products share besides the stream: scales of groups on the way in, outliers and stores on the way out.
#pragma once

#include "cuda/common/finish.cuh"
#include "cuda/sm90/expand.cuh"
#include "cuda/sm90/fragments.h"
#include "cuda/sm90/lowbit.h"
#include "cuda/sm90/sm90.cuh"

namespace qbert::cuda {

inline constexpr int kQuarters = 4;      // of a block, 32 columns each
inline constexpr int kQuadChannels = 4;  // neighbouring ones, which a thread finishes together

// Scales (n, groups) of rows `row` and `row` + 8, block by block. Groups are of 32, 64 or a multiple of 128 columns, or one of
// all.
template <class T>
struct GroupScales {
    const T* rows[2];
    int groups, of_block, blocks_of_group;  // groups that a block has, blocks that a group has: one of both is 1
    int group, left;                        // the next block's first, and blocks that it still has
    T loaded[2][kQuarters] = {};            // of_block of them

    __device__ GroupScales(const T* scales, int64_t all_groups, int64_t k, int64_t n, int row, int block) {
        const int64_t size = k / all_groups;
        groups = static_cast<int>(all_groups);
        of_block = groups > 1 && size < kBlockColumns ? static_cast<int>(kBlockColumns / size) : 1;
        blocks_of_group = groups == 1 ? INT32_MAX : of_block > 1 ? 1 : static_cast<int>(size / kBlockColumns);
        group = block / blocks_of_group * of_block;
        left = blocks_of_group - block % blocks_of_group;
#pragma unroll
        for (int h = 0; h < 2; ++h) rows[h] = scales + min(int64_t{row} + 8 * h, n - 1) * all_groups + group;
        fetch();
    }

    // Of the block that comes next.
    __device__ void fetch() {
#pragma unroll
        for (int i = 0; i < kQuarters; ++i) {
            if (i >= of_block || group + i >= groups) continue;  // beyond k codes and tokens are 0
#pragma unroll
            for (int h = 0; h < 2; ++h) loaded[h][i] = rows[h][i];
        }
        if (--left > 0) return;
        left = blocks_of_group;
        group += of_block;
#pragma unroll
        for (int h = 0; h < 2; ++h) rows[h] += of_block;
    }

    // Of columns 32 quarter ... of the block.
    __device__ T of(int h, int quarter) const {
        return of_block == 1 ? loaded[h][0] : of_block == 2 ? loaded[h][quarter / 2] : loaded[h][quarter];
    }
};

__device__ inline int outlier_column(const Outliers& outliers, int64_t at) {
    if (outliers.col_bytes == 2) return static_cast<const int16_t*>(outliers.col)[at];
    return static_cast<const int32_t*>(outliers.col)[at];
}

// Adds the outliers of four channels to their values, in the order of the columns: value = fma(delta, x of the column, value).
template <class LoadX>
__device__ void add_outliers(const Outliers& outliers, int channel, int channels, const LoadX& x,
                             float (&values)[kQuadChannels]) {
    if (outliers.count == 0) return;
    int start[kQuadChannels], count[kQuadChannels], most = 0;
#pragma unroll
    for (int i = 0; i < kQuadChannels; ++i) {
        start[i] = i < channels ? outliers.rowptr[channel + i] : 0;
        count[i] = i < channels ? outliers.rowptr[channel + i + 1] - start[i] : 0;
        most = max(most, count[i]);
    }
#pragma unroll 2
    for (int j = 0; j < most; ++j) {
#pragma unroll
        for (int i = 0; i < kQuadChannels; ++i) {
            if (j >= count[i]) continue;
            const int64_t at = int64_t{start[i]} + j;
            values[i] = fmaf(outliers.delta[at], x(outlier_column(outliers, at)), values[i]);
        }
    }
}

// Elements `first` ... of a vector, to L2.
__device__ inline void prefetch_elements(const void* vector, int bytes, int64_t first, int64_t count) {
    sm90::bulk_prefetch(static_cast<const char*>(vector) + first * bytes, count * bytes);
}

// What add_outliers will read.
__device__ inline void prefetch_outliers(const Outliers& outliers, int channel, int channels) {
    if (outliers.count == 0) return;
    prefetch_elements(outliers.rowptr, 4, channel, channels + 1);
    const int start = outliers.rowptr[channel], count = outliers.rowptr[channel + channels] - start;
    if (count == 0) return;
    prefetch_elements(outliers.col, outliers.col_bytes, start, count);
    prefetch_elements(outliers.delta, 4, start, count);
}

// Of channels `channel` ..., none beyond `last`.
__device__ inline void add_bias(float (&y)[kQuadChannels], const void* bias, FloatType type, int channel, int last) {
#pragma unroll
    for (int i = 0; i < kQuadChannels; ++i) y[i] = __fadd_rn(y[i], load_bias(bias, type, min(channel + i, last)));
}

__device__ inline void apply_gelu(float (&y)[kQuadChannels]) {
#pragma unroll
    for (int i = 0; i < kQuadChannels; ++i) y[i] = gelu(y[i]);
}

template <class Vector, class Element>
__device__ void store_quad(Element* to, const Vector& four, int channels, bool wide) {
    if (wide && channels >= kQuadChannels) {
        *reinterpret_cast<Vector*>(to) = four;
        return;
    }
    Element each[kQuadChannels];
    memcpy(each, &four, sizeof(four));
#pragma unroll
    for (int i = 0; i < kQuadChannels; ++i) {
        if (i < channels) to[i] = each[i];
    }
}

// Where results go: rows of a float type.
__device__ inline void store_floats(void* out, FloatType type, int64_t at, const float (&y)[kQuadChannels], int channels,
                                    bool wide) {
    if (type == FloatType::f32) {
        store_quad(static_cast<float*>(out) + at, float4{y[0], y[1], y[2], y[3]}, channels, wide);
    } else {
        const uint2 four{round_to_16_bits(y[0], y[1], type), round_to_16_bits(y[2], y[3], type)};
        store_quad(static_cast<unsigned short*>(out) + at, four, channels, wide);
    }
}

__device__ inline void store_int8(void* out, const Finish& finish, int64_t at, const float (&y)[kQuadChannels], int channels,
                                  bool wide) {
    uint32_t four = 0;
#pragma unroll
    for (int i = 0; i < kQuadChannels; ++i) {
        four |= (static_cast<uint32_t>(round_to_int8(y[i], finish)) & 0xff) << (8 * i);
    }
    store_quad(static_cast<signed char*>(out) + at, four, channels, wide);
}

// Whether four results can be stored at once.
inline bool stores_quads(const void* out, int64_t pitch, int64_t element_bytes) {
    const int64_t bytes = kQuadChannels * element_bytes;
    return reinterpret_cast<uintptr_t>(out) % static_cast<uintptr_t>(bytes) == 0 && pitch * element_bytes % bytes == 0;
}

}  // namespace qbert::cuda
