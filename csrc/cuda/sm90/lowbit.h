// What a linear of 3- or 4-bit weights and int8 tokens is asked to compute, and which kernel computes it. Plain C++.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/common/checks.h"
#include "cuda/common/device.h"
#include "cuda/common/w8a8.h"
#include "cuda/sm90/fragments.h"

namespace qbert::cuda {

// What a codebook's weights differ from their centroids, compressed by rows.
struct Outliers {
    const int32_t* rowptr;  // (n + 1,)
    const void* col;        // (count,) int16 or int32
    int col_bytes;
    const float* delta;  // (count,)
    int64_t count;       // 0: nothing else is looked at
};
void check_outliers(const Outliers& outliers);
// Groups of a row of k int4 weights: what a thread expands at once has one scale.
void check_groups(int64_t groups, int64_t k);

// y[t, n] = finish((sum_k q[t, k] * weight[n, k]) * scale + outliers of row n * q[t]) * s[t] + bias[n]), where the int8 operand
// weight[n, k] is
//     code * group_scale[n, k / group]     int4: scale is scale[n], there are no outliers
//     codebook[m, code]                    dict3, dict4: of matrix m = n * matrices / n of several stacked; scale is scale[m]
struct LowbitLinear {
    int64_t t, n, k;  // tokens, output channels, input channels

    const int8_t* q;  // (t, k)
    int64_t q_pitch;
    const float* s;  // (t,)

    Code code;
    const uint8_t* codes;        // fragments_s8
    const uint8_t* group_scale;  // (n, groups), int4 only
    int64_t groups;
    const int8_t* codebook;  // (matrices, 2**bits), codebooks only
    const float* scale;      // (n,) or (matrices,)
    int64_t matrices;        // 1 with int4
    Outliers outliers;
    int8_t* columns;  // workspace of lowbit_columns_bytes

    const void* bias;  // (n,), or null
    FloatType bias_type;

    void* out;  // (t, n)
    int64_t out_pitch;
    bool requantize;  // int8 out
    Finish finish;

    int out_bytes() const { return requantize ? 1 : static_cast<int>(bytes_of(finish.float_type)); }
    // Neighbouring rows that share a scale and a codebook.
    int64_t rows_of_scale() const { return code == Code::int4 ? 1 : n / matrices; }
};

// Everything that can be said without a GPU. Throws Error.
void check_arguments(const LowbitLinear& linear);

// A tile of the kernel for many tokens: what a block computes at a time.
struct LowbitTile {
    const char* name;  // tokens x channels x k, schedule
    int tokens, channels;
    bool pingpong;  // two warpgroups, each with a tile of its own, one in the matrix units while the other finishes; else both
                    // share a tile (cooperative)
};
enum LowbitTileIndex { kLowbitFew, kLowbit64x128, kLowbit128x128, kLowbit128x256, kLowbitTileCount };
inline constexpr LowbitTile kLowbitTiles[kLowbitTileCount] = {
    {"few", 0, 0, false},  // the kernel for few tokens, which cuts problems in its own way
    // Too few tiles of 128 tokens to fill the GPU.
    {"64x128x128 pingpong", 64, 128, true},
    // The end of a tile hides behind the next one's products: short k, GELU, outliers.
    {"128x128x128 pingpong", 128, 128, true},
    // The fewest bytes of shared memory a product: long k, where the end of a tile is a small part.
    {"128x256x128 cooperative", 128, 256, false},
};
// The tile of that name. Throws Error.
LowbitTileIndex lowbit_tile_named(const char* name);

// The kernel for few tokens reads what outliers need of the tokens as they lie: with more than so many that costs too much.
inline constexpr int64_t kMaxFewTokens = 512;
// Bytes of LowbitLinear::columns that a launch with this tile needs: where there are outliers, a copy of the tokens by columns.
int64_t lowbit_columns_bytes(LowbitTileIndex tile, int64_t t, int64_t k, int64_t outliers);
// With whichever tile a codebook's weight gets.
int64_t lowbit_columns_bytes(int64_t t, int64_t n, int64_t k, int64_t outliers, int sm_count);

// Defined in files of their own.
void launch_lowbit_few(const LowbitLinear& linear, const Launch& launch, const char* plan_name = "");
void launch_lowbit_many(const LowbitLinear& linear, LowbitTileIndex tile, const Launch& launch);

}  // namespace qbert::cuda
