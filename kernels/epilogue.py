"""The end of every integer product, on a tile of sums in registers: scales, bias, activation, then one rounding to the result's
type.

The order of the float32 operations is `qbert.ops.reference`'s, and every kernel that ends here gives the same bits, whatever
its tile. That holds for code compiled without fused multiply-adds (`enable_fp_fusion=False`): the reference rounds each
product.

What is written here decides how fast short products are. A multiprocessor of an H100 does 4,096 int8 multiply-adds in a
cycle and 128 other operations, so for k = 768 each instruction an element in the epilogue costs 1/24 of the product.
"""

import triton
import triton.language as tl

QMAX = tl.constexpr(127.0)
# Added to a float32 of magnitude up to 2**22, this rounds it half to even (its last place is 1), and leaves the integer in
# the low bits: an addition and a truncation, where a conversion to integer runs at an eighth of an addition's rate.
ROUND = tl.constexpr(1.5 * 2.0**23)
# Activations, by their numbers in csrc/enums.h.
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
RELU = tl.constexpr(3)
SILU = tl.constexpr(4)
# Of 2**r for |r| <= 1/2; of log2(e); and of 2 sqrt(2 / pi) log2(e) (x + 0.044715 x**3). tools/fit_gelu.py derives them.
EXP2_0 = tl.constexpr(1.0)
EXP2_1 = tl.constexpr(0.693147182)
EXP2_2 = tl.constexpr(0.240226462)
EXP2_3 = tl.constexpr(0.0555032901)
EXP2_4 = tl.constexpr(0.00961847696)
EXP2_5 = tl.constexpr(0.00133998692)
EXP2_6 = tl.constexpr(0.000153494388)
LOG2E_HIGH = tl.constexpr(1.44269502)
LOG2E_LOW = tl.constexpr(1.92596303e-08)
TANH_LINEAR = tl.constexpr(2.3022082)
TANH_CUBIC = tl.constexpr(0.102943240)
LEAST_POWER = tl.constexpr(-125.0)  # smaller powers of two count as 0


@triton.jit
def scaled(acc, s_t, scale_n, bias_n, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """activation(acc * scale_n * s_t + bias_n), float32.

    Args:
        acc: float32 sums, (t, n), or (n, t) where weight rows are the matrix unit's M.
        s_t, scale_n: float32, a scale a token and one a channel, of shapes that broadcast to acc's.
        bias_n: of any float type, shaped as scale_n; not looked at without HAS_BIAS.
    """
    return activated(acc * scale_n * s_t, bias_n, HAS_BIAS, ACTIVATION)


@triton.jit
def activated(y, bias_n, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """activation(y + bias_n), float32."""
    if HAS_BIAS:
        y += bias_n.to(tl.float32)
    if ACTIVATION == GELU:
        y = gelu(y)
    elif ACTIVATION == GELU_TANH:
        y = gelu_tanh(y)
    elif ACTIVATION == RELU:
        y = tl.where(y <= 0.0, 0.0, y)  # NaN stays
    elif ACTIVATION == SILU:
        y = silu(y)
    return y


@triton.jit
def gelu(x):
    """x * (1 + erf(x / sqrt(2))) / 2 of float32, to 1.5e-7 of itself for x > 0 and to 8e-8 in absolute terms for x < 0.

    (With a power of two that is rounded once; a GPU's may be off by two units, which makes 3.8e-7 and 1e-7 of it at most.)
    That is nearer to the truth than the formula in float32, which cancels for x < 0, and takes a third of the instructions of
    a library: with erfc(|x| / sqrt(2)) = 2**(|x| p(|x|)), one polynomial and one power of two are good for all x:

        gelu(x) = max(x, 0) - |x| * 2**(|x| p(|x|) - 1)

    p is a minimax fit on 0 ... 6 of the error relative to gelu; beyond, the power is below 2**-29 and falls to 0. NaN stays
    NaN, and an infinity becomes NaN. csrc/cuda computes the same operations, so that both give the same bits;
    tools/fit_gelu.py measures the fit.
    """
    a = tl.abs(x)
    p = tl.fma(a, -2.00788055e-06, 3.11566380e-05)
    p = tl.fma(a, p, -1.54591183e-04)
    p = tl.fma(a, p, -1.96607522e-04)
    p = tl.fma(a, p, 7.12169478e-03)
    p = tl.fma(a, p, -5.25244713e-02)
    p = tl.fma(a, p, -4.59202255e-01)
    p = tl.fma(a, p, -1.15110558)
    tail = tl.exp2(tl.fma(a, p, -1.0))
    # As a product, for `-a` is 0 - a in some versions of Triton: an instruction, where a sign costs nothing.
    return tl.fma(a * -1.0, tail, tl.maximum(x, 0.0))


@triton.jit
def silu(x):
    """x / (1 + e**-x) of float32, to 2.4e-7 of itself, by the operations of csrc/cpu/activations.h: CPUs give the same bits.

    log2(e) is in two parts, for the error of |x| log2(e) is that of the power. NaN stays NaN, minus infinity becomes NaN.
    """
    a = tl.abs(x)
    shifted = a * -LOG2E_HIGH + ROUND
    n = shifted - ROUND
    r = tl.fma(a, -LOG2E_LOW, tl.fma(a, -LOG2E_HIGH, n * -1.0))
    return _times_logistic(x, _power_of_two(shifted, n, r))


@triton.jit
def gelu_tanh(x):
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))) of float32, as x times a logistic function: see `silu`."""
    z = tl.abs(x) * tl.fma(x * x, -TANH_CUBIC, -TANH_LINEAR)
    shifted = z + ROUND
    n = shifted - ROUND
    return _times_logistic(x, _power_of_two(shifted, n, z - n))


@triton.jit
def _power_of_two(shifted, n, r):
    """2**(n + r) where n is what `shifted` - ROUND is, and not above 0."""
    p = tl.fma(r, EXP2_6, EXP2_5)
    p = tl.fma(r, p, EXP2_4)
    p = tl.fma(r, p, EXP2_3)
    p = tl.fma(r, p, EXP2_2)
    p = tl.fma(r, p, EXP2_1)
    p = tl.fma(r, p, EXP2_0)
    exponent = shifted.to(tl.int32, bitcast=True) << 23  # what is left of ROUND's own bits is 0
    power = (p.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)
    return tl.where(n < LEAST_POWER, 0.0, power)


@triton.jit
def _times_logistic(x, power):
    """x / (1 + power), and below 0 x * power / (1 + power)."""
    return tl.div_rn(tl.where(x < 0.0, x * power, x), power + 1.0)


@triton.jit
def finish(y, end, DTYPE: tl.constexpr):
    """y float32 as DTYPE: rounded to a float type, or for int8 the codes of round(y * end.inverse_out_scale) + end.zero.

    Codes are rounded half to even and clamped to -127 ... 127; NaN becomes the code of 0.
    """
    if DTYPE == tl.int8:  # noqa: SIM300 (DTYPE is no constant here)
        SHIFTED: tl.constexpr = end.zero is not None
        y = y * end.inverse_out_scale
        y = tl.where(y == y, y, 0.0)
        if SHIFTED:
            y = tl.minimum(tl.maximum(y, -QMAX - end.zero), QMAX - end.zero) + ROUND
            y = y - ROUND + end.zero + ROUND  # exact: a whole number and another
        else:
            y = tl.minimum(tl.maximum(y, -QMAX), QMAX) + ROUND
        return y.to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return y.to(DTYPE)
