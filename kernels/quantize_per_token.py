"""Per-token int8 quantization: one program a token, one pass over memory.

Computes `qbert.ops.reference.quantize_rows` bit for bit: the row's largest magnitude, one IEEE division for the factor and
one for the scale, products rounded half to even. A row with NaN or infinity in it gets scale NaN and codes 0.
"""

import triton
import triton.language as tl

from qbert.kernels.row import quantized


@triton.jit
def quantize_per_token_kernel(x_ptr, codes_ptr, scale_ptr, k, x_stride, BLOCK: tl.constexpr):
    """x (t, k) float -> codes (t, k) int8 contiguous, scale (t,) float32. Grid: (t,). BLOCK: power of two, at least k."""
    token = tl.program_id(0).to(tl.int64)  # t * k may pass 2**31
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * x_stride + column, mask=column < k, other=0.0).to(tl.float32)
    codes, scale = quantized(x)
    tl.store(codes_ptr + token * k + column, codes, mask=column < k)
    tl.store(scale_ptr + token, scale)
