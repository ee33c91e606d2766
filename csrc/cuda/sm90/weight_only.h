// What a linear of packed weights and 16-bit float tokens is asked to compute, for few tokens, and the weight as a dense matrix
// for everything else. Plain C++.
#pragma once

#include <cstdint>

#include "cuda/common/checks.h"
#include "cuda/common/device.h"
#include "cuda/sm90/lowbit.h"
#include "cuda/sm90/stream.h"

namespace qbert::cuda {

// weight[n, k] of fragments_f16 is
//     code * scale[n]                int8: scale is float32 (n,)
//     code * scale[n, k / group]     int4: scale is bfloat16 (n, groups)
//     codebook[code] + outlier       dict3, dict4
struct PackedWeight {
    int64_t n, k;  // output channels, input channels
    Code code;
    const uint8_t* codes;
    const void* scale;      // integers only
    int64_t groups;         // int4 only
    const float* codebook;  // (2**bits,), codebooks only
    Outliers outliers;
};

// y[t, n] = activation(x[t] weight[n]^T + bias[n]), rounded to x's type.
struct WeightOnlyLinear {
    int64_t t;
    const void* x;  // (t, k)
    int64_t x_pitch;
    FloatType x_type;  // bf16, f16

    PackedWeight weight;

    const void* bias;  // (n,), or null
    FloatType bias_type;
    Activation activation;

    void* out;  // (t, n)
    int64_t out_pitch;
};

struct ExpandedWeight {
    PackedWeight weight;
    void* out;  // (n, k), contiguous
    FloatType out_type;
};

// That share a reading of the weights: the matrix units take as long for their products as memory for three-bit weights.
inline constexpr int kMostWeightOnlyTokens = 64;

// Everything that can be said without a GPU. They throw Error.
void check_arguments(const WeightOnlyLinear& linear);
void check_arguments(const ExpandedWeight& expanded);

StreamProblem weight_only_problem(int64_t t, int64_t n, int64_t k, Code code);
// A file for each code defines them.
template <Code kCode, FloatType kType>
void launch_weight_only_of(const WeightOnlyLinear& linear, const StreamPlan& plan, const Launch& launch);

// The plan of that name, or with "" the one that is chosen.
void launch_weight_only(const WeightOnlyLinear& linear, const Launch& launch, const char* plan_name = "");
void launch_expand_weight(const ExpandedWeight& expanded, const Launch& launch);

}  // namespace qbert::cuda
