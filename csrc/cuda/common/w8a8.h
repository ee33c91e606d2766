// What a W8A8 linear is asked to compute. Plain C++: the kernels, the checks and the bindings all see this.
#pragma once

#include <cstdint>

#include "cuda/common/checks.h"

namespace qbert::cuda {

// What becomes of a float32 result: none or exact GELU, then one rounding.
struct Finish {
    Activation activation = Activation::none;
    FloatType float_type = FloatType::f32;  // of the result, unless it is requantized
    float inverse_out_scale = 1.0f;         // of an int8 result
    int zero = 0;                           // and its code of 0
};

// y[t, n] = finish((sum_k q[t, k] * weight[n, k]) * scale[n] * s[t] + bias[n]), rows contiguous, row pitches in elements.
struct W8a8Linear {
    int64_t t, n, k;  // tokens, output channels, input channels

    const int8_t* q;  // (t, k)
    int64_t q_pitch;
    const float* s;  // (t,)

    // (n, k). A kernel may read it before the grid right before its own has ended (pdl_wait): that one must
    // not write it. It is the one that makes q and s; a weight is made once, long before.
    const int8_t* weight;
    int64_t weight_pitch;
    const float* scale;  // (n,)

    const void* bias;  // (n,), or null
    FloatType bias_type;

    void* out;  // (t, n)
    int64_t out_pitch;
    bool requantize;  // int8 out
    Finish finish;

    constexpr int64_t out_bytes() const { return requantize ? 1 : bytes_of(finish.float_type); }
};

// Longer rows could overflow the int32 sum of products of magnitude 127 * 127.
inline constexpr int64_t kMaxK = INT32_MAX / (127 * 127);

// Everything that can be said without a GPU. Throws Error.
void check_arguments(const W8a8Linear& linear);
// Of what goes in alone.
void check_operands(const W8a8Linear& linear);

}  // namespace qbert::cuda
