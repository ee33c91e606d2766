"""Per-token int8 quantization: one program a token, one pass over memory.

Computes `qbert.reference.quantize_per_token` bit for bit: the row's largest magnitude, one IEEE division for the factor and
one for the scale, products rounded half to even. A row with NaN or infinity in it gets scale NaN and codes 0. To be compiled
without fused multiply-adds: the reference rounds the product before it rounds to an integer.
"""

import triton
import triton.language as tl

QMAX = tl.constexpr(127.0)
MIN_ABSMAX = tl.constexpr(2.0**-100)
# Added and taken off again, this rounds float32 of magnitude up to 2**22 half to even: its last place is 1.
ROUND = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def quantize_per_token_kernel(x_ptr, codes_ptr, scale_ptr, k, x_stride, BLOCK_K: tl.constexpr):
    """x (t, k) float -> codes (t, k) int8 contiguous, scale (t,) float32. Grid: (t,). BLOCK_K: power of two, at least k."""
    token = tl.program_id(0).to(tl.int64)  # t * k may pass 2**31
    column = tl.arange(0, BLOCK_K)
    inside = column < k
    x = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(x)
    # NaN does not survive a maximum, so what is not finite is counted instead of compared.
    bad = tl.sum(tl.where(magnitude < float("inf"), 0, 1), axis=0)
    absmax = tl.maximum(tl.max(magnitude, axis=0), MIN_ABSMAX)
    absmax = tl.where(bad > 0, 1.0, absmax)
    factor = tl.div_rn(QMAX, absmax)
    codes = tl.where(bad > 0, 0.0, (x * factor + ROUND) - ROUND)
    codes = tl.minimum(tl.maximum(codes, -QMAX), QMAX)
    tl.store(codes_ptr + token * k + column, codes.to(tl.int8), mask=inside)
    tl.store(scale_ptr + token, tl.where(bad > 0, float("nan"), tl.div_rn(absmax, QMAX)))
