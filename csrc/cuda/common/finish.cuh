// The end of a linear, value by value, in the order of qbert/ops/reference.py: every kernel of an operation rounds alike.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "cuda/common/gelu.cuh"
#include "cuda/common/w8a8.h"

namespace qbert::cuda {

// The bits of element i of a vector of any float type: only when they become a float does anyone wait for them.
__device__ inline unsigned load_bits(const void* data, FloatType type, int64_t i) {
    if (type == FloatType::f32) return static_cast<const unsigned*>(data)[i];
    return static_cast<const unsigned short*>(data)[i];
}
__device__ inline float float_of(unsigned bits, FloatType type) {
    if (type == FloatType::f32) return __uint_as_float(bits);
    if (type == FloatType::bf16) return __uint_as_float(bits << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
// Element i of a vector of any float type.
__device__ inline float load_float(const void* data, FloatType type, int64_t i) {
    return float_of(load_bits(data, type, i), type);
}

// The bias of a channel; 0 where there is none.
__device__ inline float load_bias(const void* bias, FloatType type, int64_t channel) {
    return bias == nullptr ? 0.0f : load_float(bias, type, channel);
}

// value * s + bias, rounded twice as in the reference: never fused into a multiply-add.
__device__ inline float scale_and_add(float value, float s, float bias) { return __fadd_rn(__fmul_rn(value, s), bias); }

// To even; NaN gives the code of 0.
__device__ inline int round_to_int8(float y, const Finish& finish) {
    const int steps = __float2int_rn(__fmul_rn(y, finish.inverse_out_scale));
    return max(-127 - finish.zero, min(127 - finish.zero, steps)) + finish.zero;
}

// Two values as two 16-bit floats, the first in the low half.
__device__ inline uint32_t round_to_16_bits(float low, float high, FloatType type) {
    uint32_t bits;
    if (type == FloatType::bf16) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        memcpy(&bits, &pair, sizeof(bits));
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        memcpy(&bits, &pair, sizeof(bits));
    }
    return bits;
}

}  // namespace qbert::cuda
