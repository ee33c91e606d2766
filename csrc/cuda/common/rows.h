// What the row kernels are asked to compute. Plain C++, as w8a8.h.
#pragma once

#include <cstdint>

#include "cuda/common/checks.h"
#include "cuda/common/device.h"

namespace qbert::cuda {

// A matrix or vector of floats, rows contiguous and next to each other.
struct Floats {
    const void* data;
    FloatType type;
};

// normed = LayerNorm(y + residual) * gamma + beta, and its symmetric int8 codes with a scale for each token.
struct AddLayerNormQuantize {
    int64_t t, k;             // tokens, columns
    Floats y, residual;       // (t, k)
    Floats gamma, beta;       // (k,)
    float eps;
    void* normed;             // (t, k) of residual's type
    int8_t* codes;            // (t, k)
    float* scale;             // (t,)
};

// A warp takes a row and keeps it in registers: 256 columns a step, eight neighbours a lane.
inline constexpr int kLaneColumns = 8;
inline constexpr int kRowStepColumns = 32 * kLaneColumns;
inline constexpr int kMaxSteps = 8;
inline constexpr int64_t kMaxRowColumns = kMaxSteps * kRowStepColumns;

// Everything that can be said without a GPU. Throws Error.
void check_arguments(const AddLayerNormQuantize& arguments);
// Of all but y.
void check_norm(const AddLayerNormQuantize& arguments);

void launch_add_layer_norm_quantize(const AddLayerNormQuantize& arguments, const Launch& launch);

}  // namespace qbert::cuda
