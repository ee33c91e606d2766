"""What kernels over the rows of a matrix share: one program holds a whole row, so that memory is passed once.

Rows of up to 1024 values are held by a single warp, whose sums and maxima need no barrier. To be compiled without fused
multiply-adds (`enable_fp_fusion=False`): the reference rounds every product.
"""

import triton
import triton.language as tl

QMAX = tl.constexpr(127.0)
MIN_ABSMAX = tl.constexpr(2.0**-100)
# Added and taken off again, this rounds float32 of magnitude up to 2**22 half to even: its last place is 1.
ROUND = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def quantized(x):
    """`qbert.ops.reference.codes_and_scales` of one row (BLOCK,) float32, bit for bit: codes (BLOCK,) int8, scale float32.

    Values past the row's end must be 0. NaN or infinity makes the scale NaN and all codes 0.
    """
    magnitude = tl.abs(x)
    # NaN does not survive a maximum, so what is not finite is counted instead of compared.
    bad = tl.sum(tl.where(magnitude < float("inf"), 0, 1), axis=0) > 0
    absmax = tl.where(bad, 1.0, tl.maximum(tl.max(magnitude, axis=0), MIN_ABSMAX))
    codes = tl.where(bad, 0.0, nearest(x * tl.div_rn(QMAX, absmax)))
    return codes.to(tl.int8), tl.where(bad, float("nan"), tl.div_rn(absmax, QMAX))


@triton.jit
def nearest(steps):
    """The nearest codes of float32 steps, as float32: half to even, -127 ... 127."""
    return tl.minimum(tl.maximum((steps + ROUND) - ROUND, -QMAX), QMAX)


@triton.jit
def layer_norm(x, k, column, norm):
    """LayerNorm of one row (BLOCK,) float32, 0 past its end, with mean and variance in two passes over registers; 0 there.

    Args:
        norm: (gamma, beta, eps), the first two (k,) of any float type.
    """
    inside = column < k
    centered = tl.where(inside, x - tl.div_rn(tl.sum(x, axis=0), k.to(tl.float32)), 0.0)
    variance = tl.div_rn(tl.sum(centered * centered, axis=0), k.to(tl.float32))
    normed = centered * tl.div_rn(1.0, tl.sqrt_rn(variance + norm.eps))
    gamma = tl.load(norm.gamma + column, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(norm.beta + column, mask=inside, other=0.0).to(tl.float32)
    # NaN * 0 would not be 0.
    return tl.where(inside, normed * gamma + beta, 0.0)


@triton.jit
def store_normed(result, normed, row, k, column, to):
    """A float32 result of row `row` in its type, and the codes and scale of its norm, to a `Normed`."""
    inside = column < k
    codes, scale = quantized(normed)
    tl.store(to.out + row * k + column, result.to(to.out.dtype.element_ty), mask=inside)
    tl.store(to.codes + row * k + column, codes, mask=inside)
    tl.store(to.scale + row, scale)
