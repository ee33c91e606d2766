// add_layer_norm_quantize: a warp a row, every access of memory 16 bytes a lane (codes: 8), every row read and written once.
// Nothing here is launched or linked; other kernels end their rows by finish_row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/pdl.cuh"
#include "cuda/common/rows.h"

namespace qbert::cuda {

inline constexpr int kRowWarps = 4;  // of a block
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr float kMinAbsmax = 0x1p-100f;  // reference.MIN_ABSMAX
inline constexpr unsigned kInfinityBits = 0x7f800000u;

// A lane's eight neighbours as they lie in memory; kBytes of each.
template <int kBytes>
struct Neighbours {
    uint4 words[kBytes / 2];
};

template <int kBytes>
__device__ Neighbours<kBytes> load(const void* data, int64_t at) {
    return reinterpret_cast<const Neighbours<kBytes>*>(data)[at / kLaneColumns];
}

__device__ inline void widen(const Neighbours<4>& from, FloatType, float* to) {
    const unsigned* words = &from.words[0].x;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) to[i] = __uint_as_float(words[i]);
}

__device__ inline void widen(const Neighbours<2>& from, FloatType type, float* to) {
    const unsigned* words = &from.words[0].x;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
        const auto bits = static_cast<unsigned short>(words[i / 2] >> (i % 2 * 16));
        to[i] = type == FloatType::bf16 ? __uint_as_float(unsigned{bits} << 16) : __half2float(__ushort_as_half(bits));
    }
}

__device__ inline void narrow(const float* from, FloatType, Neighbours<4>& to) {
    unsigned* words = &to.words[0].x;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) words[i] = __float_as_uint(from[i]);
}

__device__ inline void narrow(const float* from, FloatType type, Neighbours<2>& to) {
    unsigned* words = &to.words[0].x;
#pragma unroll
    for (int i = 0; i < kLaneColumns; i += 2) {
        unsigned short low, high;
        if (type == FloatType::bf16) {
            low = __bfloat16_as_ushort(__float2bfloat16_rn(from[i]));
            high = __bfloat16_as_ushort(__float2bfloat16_rn(from[i + 1]));
        } else {
            low = __half_as_ushort(__float2half_rn(from[i]));
            high = __half_as_ushort(__float2half_rn(from[i + 1]));
        }
        words[i / 2] = low | (unsigned{high} << 16);
    }
}

// Eight values of a vector that all rows share: after the first rows they come from the cache.
__device__ inline void load_shared(const Floats& vector, int column, float* to) {
    if (vector.type == FloatType::f32) {
        widen(load<4>(vector.data, column), vector.type, to);
    } else {
        widen(load<2>(vector.data, column), vector.type, to);
    }
}

// In the same order for every row, so that a row's result does not depend on its neighbours.
__device__ inline float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
    return value;
}

// What a row's codes are made with, from its largest magnitude as bits: those of NaN and infinity are the largest integers.
struct RowScale {
    float scale, inverse;
};
__device__ inline RowScale row_scale(unsigned largest_bits) {
    // Codes of a row that is not finite are 0, its scale NaN: it comes out as NaN whatever it is multiplied with.
    if (largest_bits >= kInfinityBits) return {__uint_as_float(0x7fc00000u), 0.0f};
    const float largest = fmaxf(__uint_as_float(largest_bits), kMinAbsmax);
    return {__fdiv_rn(largest, 127.0f), __fdiv_rn(127.0f, largest)};
}

__device__ inline uint2 codes_of(const float* normed, float inverse) {
    unsigned words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
        const int code = __float2int_rn(__fmul_rn(normed[i], inverse));  // to even; NaN gives 0
        words[i / 4] |= (static_cast<unsigned>(max(-127, min(127, code))) & 0xffu) << (i % 4 * 8);
    }
    return {words[0], words[1]};
}

// The columns that a lane holds of a row: eight neighbours of every step.
__device__ inline int row_column(int step) {
    return step * kRowStepColumns + static_cast<int>(threadIdx.x % 32) * kLaneColumns;
}

template <int kSteps, int kBytes>
__device__ void load_row(const Floats& matrix, int64_t row, int k, Neighbours<kBytes> (&to)[kSteps]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        if (row_column(step) < k) to[step] = load<kBytes>(matrix.data, row * k + row_column(step));
    }
}

// Ends a row of y, `x`, which its warp holds in registers wherever it comes from; zeros beyond the row, in residual too. All
// kernels end rows here, and every operation is named, so that no compiler fuses them in one kernel only: equal y, equal bits.
template <int kSteps, int kResidualBytes>
__device__ void finish_row(const AddLayerNormQuantize& a, int64_t row, float (&x)[kSteps][kLaneColumns],
                           const Neighbours<kResidualBytes> (&residual)[kSteps]) {
    const int k = static_cast<int>(a.k);
    float sum = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        float other[kLaneColumns];
        widen(residual[step], a.residual.type, other);
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) sum += x[step][i] += other[i];
    }
    const float mean = __fdiv_rn(warp_sum(sum), static_cast<float>(k));

    float squares = 0.0f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
            x[step][i] -= mean;
            if (row_column(step) < k) squares = fmaf(x[step][i], x[step][i], squares);
        }
    }
    const float deviation = __fsqrt_rn(__fadd_rn(__fdiv_rn(warp_sum(squares), static_cast<float>(k)), a.eps));
    const float inverse_deviation = __fdiv_rn(1.0f, deviation);

    unsigned largest = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        if (row_column(step) >= k) continue;
        float gamma[kLaneColumns], beta[kLaneColumns];
        load_shared(a.gamma, row_column(step), gamma);
        load_shared(a.beta, row_column(step), beta);
        Neighbours<kResidualBytes> rounded;
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
            x[step][i] = fmaf(__fmul_rn(x[step][i], inverse_deviation), gamma[i], beta[i]);
            largest = max(largest, __float_as_uint(x[step][i]) & 0x7fffffffu);
        }
        narrow(x[step], a.residual.type, rounded);
        reinterpret_cast<Neighbours<kResidualBytes>*>(a.normed)[(row * k + row_column(step)) / kLaneColumns] = rounded;
    }

    const RowScale found = row_scale(__reduce_max_sync(kAllLanes, largest));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        if (row_column(step) >= k) continue;
        reinterpret_cast<uint2*>(a.codes)[(row * k + row_column(step)) / kLaneColumns] = codes_of(x[step], found.inverse);
    }
    if (threadIdx.x % 32 == 0) a.scale[row] = found.scale;
}

// Three blocks on an SM are all it is asked for: left alone, ptxas spills for the sake of more.
template <int kSteps, int kYBytes, int kResidualBytes>
__global__ void __launch_bounds__(kRowWarps * 32, 3)
    add_layer_norm_quantize_kernel(const __grid_constant__ AddLayerNormQuantize a) {
    pdl_wait();
    pdl_launch_dependents();
    const int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32;
    if (row >= a.t) return;  // a whole warp
    const int k = static_cast<int>(a.k);

    Neighbours<kYBytes> y[kSteps] = {};  // all on their way before the first is used
    Neighbours<kResidualBytes> residual[kSteps] = {};
    load_row(a.y, row, k, y);
    load_row(a.residual, row, k, residual);
    float x[kSteps][kLaneColumns];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) widen(y[step], a.y.type, x[step]);
    finish_row(a, row, x, residual);
}

}  // namespace qbert::cuda
