// The activations of linears, sixteen lanes at a time: our own fits, the same bits on every instruction set. NaN stays NaN; of the
// infinities the lower one becomes NaN, as in torch, but for RELU, where it is 0.
//
// The logistic function is here what kernels/epilogue.py computes, operation by operation. tools/fit_gelu.py derives the constants,
// measures the errors and holds both files to the same.
#pragma once

#include "cpu/simd.h"

namespace qbert {
namespace QBERT_ISA {

constexpr float kGeluAbove[6] = {0.398942235f, 0.0338525307f, 0.00467725338f, 1.68824518e-4f, 6.35211221e-6f, 2.27495037e-8f};
constexpr float kGeluBelow[6] = {1.0f, 0.251521629f, 0.0286458049f, 0.00188443813f, 7.36471486e-5f, 1.19750761e-6f};

// Exact GELU: x Phi(x), Phi(x) - 1/2 = x P(x^2) / Q(x^2), our own minimax fit on |x| <= 5.5 (absolute error 2.6e-8, as rounded),
// beyond which it is 1/2 in float32. The error is below 2.2e-7 |x| (tools/fit_gelu.py); minus infinity gives NaN, as in torch.
QBERT_INLINE f32x16 gelu(f32x16 x) {
    const f32x16 inside = max(min(x, broadcast(5.5f)), broadcast(-5.5f)), square = inside * inside;
    const f32x16 half_erf = inside * polynomial(kGeluAbove, square) / polynomial(kGeluBelow, square);
    return madd(x, half_erf, x * 0.5f);
}

// 2^r for |r| <= 1/2, to 1.5e-8 of it.
constexpr float kExp2[7] = {1.0f, 0.693147182f, 0.240226462f, 0.0555032901f, 0.00961847696f, 0.00133998692f, 0.000153494388f};
constexpr float kLog2EHigh = 1.44269502f, kLog2ELow = 1.92596303e-8f;
constexpr float kTanhLinear = 2.3022082f, kTanhCubic = 0.102943240f;  // 2 sqrt(2 / pi) log2(e), and 0.044715 of it
constexpr float kLeastPower = -125.0f;    // smaller powers of two count as 0

// 2^(n + r) where n is what `shifted` - kRounder is, and not above 0.
QBERT_INLINE f32x16 power_of_two(f32x16 shifted, f32x16 n, f32x16 r) {
    const u32x16 exponent = (u32x16)shifted << 23;  // what is left of kRounder's own bits is 0
    const f32x16 power = (f32x16)((u32x16)polynomial(kExp2, r) + exponent);
    return select(n < broadcast(kLeastPower), f32x16{}, power);
}

// x / (1 + power), and below 0 x * power / (1 + power): x times the logistic function whose e^-|...| is `power`.
QBERT_INLINE f32x16 times_logistic(f32x16 x, f32x16 power) {
    return select(x < f32x16{}, x * power, x) / (power + 1.0f);
}

// x / (1 + e^-x), to 2.4e-7 of itself: log2(e) in two parts, for the error of |x| log2(e) is that of the power.
QBERT_INLINE f32x16 silu(f32x16 x) {
    const f32x16 magnitude = (f32x16)((u32x16)x & 0x7fffffff);
    const f32x16 shifted = magnitude * -kLog2EHigh + kRounder, n = shifted - kRounder;
    const f32x16 r = madd(magnitude, broadcast(-kLog2EHigh), -n);
    return times_logistic(x, power_of_two(shifted, n, madd(magnitude, broadcast(-kLog2ELow), r)));
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which is x times a logistic function.
QBERT_INLINE f32x16 gelu_tanh(f32x16 x) {
    const f32x16 magnitude = (f32x16)((u32x16)x & 0x7fffffff);
    const f32x16 z = magnitude * madd(x * x, broadcast(-kTanhCubic), broadcast(-kTanhLinear));
    const f32x16 shifted = z + kRounder, n = shifted - kRounder;
    return times_logistic(x, power_of_two(shifted, n, z - n));
}

// As torch: of a NaN, NaN.
QBERT_INLINE f32x16 relu(f32x16 x) { return max(f32x16{}, x); }

QBERT_INLINE f32x16 activated(Activation activation, f32x16 x) {
    switch (activation) {
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return gelu_tanh(x);
        case Activation::relu: return relu(x);
        case Activation::silu: return silu(x);
        default: return x;
    }
}

// In place of an activation that a kernel is compiled for: any of them.
constexpr Activation kAnyActivation = static_cast<Activation>(-1);

template <Activation kActivation>
QBERT_INLINE f32x16 activated_as(Activation activation, f32x16 x) {
    return activated(kActivation == kAnyActivation ? activation : kActivation, x);
}

}  // namespace QBERT_ISA
}  // namespace qbert
