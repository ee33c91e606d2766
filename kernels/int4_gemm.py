"""W4A8: int4 weights with integer group scales times int8 tokens, on the int8 matrix units.

A weight's int8 operand is code * group_scale, made in registers right before it is used (`expand`), so that the sum over the
whole row is one int32 sum and the float32 scale of the row waits for the epilogue. Computes `qbert.ops.reference.linear`
of such weights.

Arguments that are tuples: `qbert.ops.triton.arguments`.
"""

import triton
import triton.language as tl

from qbert.kernels.epilogue import finish, scaled
from qbert.kernels.expand import BLOCK, HALF, expand_int4, join_halves
from qbert.kernels.lowbit_tile import blocks_of, load_codes, load_tokens, store, tile_of, total


@triton.jit
def int4_gemm_kernel(q, qdata, group_scale, y, end, shape, META: tl.constexpr):
    """y (t, n) = activation(s * scale * (q @ weight^T) + bias); with SPLIT_K > 1 partial sums for `int4_finish_kernel`.

    Grid: (tiles of y, SPLIT_K).

    Args:
        q: (t, k) int8.
        qdata, group_scale: nibble halves, `Groups`.
        y: (t, n) of a float type or int8; or (SPLIT_K, t, n) int32.
        end: `End`.
        shape: `Shape`.
        META: a `LowbitMeta`.
    """
    BLOCK_T: tl.constexpr = META.BLOCK_T
    BLOCK_N: tl.constexpr = META.BLOCK_N
    GROUP_SIZE: tl.constexpr = META.GROUP_SIZE
    t, n, k = shape
    groups = group_scale.groups
    first_t, first_n = tile_of(tl.program_id(0), t, n, BLOCK_T, BLOCK_N, META.GROUP)
    start, stop = blocks_of(tl.program_id(1), k, META.SPLIT_K)
    # Rows beyond the last have codes 0, whatever their scale.
    scale_rows = group_scale.scale + tl.minimum(first_n + tl.arange(0, BLOCK_N), n - 1).to(tl.int64) * groups
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.int32)
    for block in tl.range(start, stop):
        packed = load_codes(qdata, block, first_n, n, k, BLOCK_N, META.TMA)
        tokens = load_tokens(q, block, first_t, t, k, BLOCK_T, META.TMA)
        low = _half_scale(scale_rows, block * BLOCK, groups, GROUP_SIZE)
        high = _half_scale(scale_rows, block * BLOCK + HALF, groups, GROUP_SIZE) if GROUP_SIZE < BLOCK else low
        first, second = expand_int4(packed, low, high, META.PRMT)
        acc = tl.dot(join_halves(first, second), tokens.T, acc, out_dtype=tl.int32)
    place = (first_t, first_n, t, n)
    if META.SPLIT_K > 1:
        store(y + tl.program_id(1).to(tl.int64) * t * n, acc, place)
    else:
        _end(acc, y, end, place, META.ACTIVATION)


@triton.jit
def int4_finish_kernel(sums, y, end, shape, META: tl.constexpr):
    """y (t, n) from partial sums (SPLIT_K, t, n). Grid: (tiles of tokens, tiles of channels)."""
    place = (tl.program_id(0) * META.BLOCK_T, tl.program_id(1) * META.BLOCK_N, shape.t, shape.n)
    _end(total(sums, place, META), y, end, place, META.ACTIVATION)


@triton.jit
def _half_scale(scale_rows, column, groups, GROUP_SIZE: tl.constexpr):
    """Group scales of the 64 weights from a column on, int32: (n, 64) where two groups share them, else (n, 1)."""
    # Columns beyond the last group are padding: codes 0, whatever their scale.
    group = tl.minimum(column // GROUP_SIZE, groups - 1)
    scale = tl.load(scale_rows + group)[:, None]
    if GROUP_SIZE < HALF:
        n: tl.constexpr = scale_rows.shape[0]
        high = tl.load(scale_rows + tl.minimum(group + 1, groups - 1))[:, None]
        scale = tl.join(scale, high).broadcast_to(n, GROUP_SIZE, 2).permute(0, 2, 1).reshape(n, HALF)
    return scale.to(tl.int32)


@triton.jit
def _end(acc, y, end, place, ACTIVATION: tl.constexpr):
    """Scales, bias, activation, rounding, and out."""
    HAS_BIAS: tl.constexpr = end.bias is not None
    first_t, first_n, t, n = place
    tokens, rows = first_t + tl.arange(0, acc.shape[1]), first_n + tl.arange(0, acc.shape[0])
    s_t = tl.load(end.s + tokens, mask=tokens < t, other=0.0)[None, :]
    scale_n = tl.load(end.scale + rows, mask=rows < n, other=0.0)[:, None]
    bias_n = tl.load(end.bias + rows, mask=rows < n, other=0.0)[:, None] if HAS_BIAS else scale_n
    value = scaled(acc.to(tl.float32), s_t, scale_n, bias_n, HAS_BIAS, ACTIVATION)
    store(y, finish(value, end, y.dtype.element_ty), place)
