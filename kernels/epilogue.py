"""The end of every integer product, on a tile of sums in registers: scales, bias, GELU, then one rounding to the result's type.

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


@triton.jit
def scaled(acc, s_t, scale_n, bias_n, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    """activation(acc * scale_n * s_t + bias_n), float32.

    Args:
        acc: float32 sums, (t, n), or (n, t) where weight rows are the matrix unit's M.
        s_t, scale_n: float32, a scale a token and one a channel, of shapes that broadcast to acc's.
        bias_n: of any float type, shaped as scale_n; not looked at without HAS_BIAS.
    """
    return activated(acc * scale_n * s_t, bias_n, HAS_BIAS, GELU)


@triton.jit
def activated(y, bias_n, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    """activation(y + bias_n), float32."""
    if HAS_BIAS:
        y += bias_n.to(tl.float32)
    if GELU:
        y = gelu(y)
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
def finish(y, inverse_out_scale, DTYPE: tl.constexpr):
    """y float32 as DTYPE: rounded to a float type, or for int8 the codes of round(y * inverse_out_scale).

    Codes are rounded half to even and clamped to -127 ... 127; NaN becomes 0.
    """
    if DTYPE == tl.int8:  # noqa: SIM300 (DTYPE is no constant here)
        y = y * inverse_out_scale
        y = tl.where(y == y, y, 0.0)
        y = tl.minimum(tl.maximum(y, -QMAX), QMAX) + ROUND
        return y.to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return y.to(DTYPE)
