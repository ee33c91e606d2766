"""Residual addition, LayerNorm and per-token int8 quantization: one program a token, one pass over memory.

Computes `qbert.ops.reference.add_norm`. The codes and scale are exactly those of the float32 norm, before it is
rounded to the residual's type. NaN or infinity in a token makes its row NaN, its scale NaN and its codes 0, and no other's.

Arguments that are tuples: `qbert.ops.triton.arguments`.
"""

import triton
import triton.language as tl

from qbert.kernels.row import layer_norm, store_normed


@triton.jit
def add_layer_norm_quantize_kernel(y_ptr, residual_ptr, norm, to, k, strides, BLOCK: tl.constexpr, SUM: tl.constexpr):
    """y, residual (t, k) float, with rows that far apart, and a norm as in `layer_norm` -> a `Normed`, contiguous.

    Grid: (t,). BLOCK: power of two, at least k. SUM: whether the float result is the sum that the norm is of.
    """
    y_stride, residual_stride = strides
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    y = tl.load(y_ptr + token * y_stride + column, mask=column < k, other=0.0)
    residual = tl.load(residual_ptr + token * residual_stride + column, mask=column < k, other=0.0)
    total = y.to(tl.float32) + residual.to(tl.float32)
    normed = layer_norm(total, k, column, norm)
    store_normed(total if SUM else normed, normed, token, k, column, to)
