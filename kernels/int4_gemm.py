"""W4A8: int4 weights with integer group scales times int8 tokens, on the int8 matrix units.

A weight's int8 operand is code * group_scale, made in registers right before it is used (`expand`), so that the sum over the
whole row is one int32 sum and the float32 scale of the row waits for the epilogue. Computes `qbert.reference.w4a8_linear` and
its int8-out twin.
"""

import triton
import triton.language as tl

from qbert.kernels.epilogue import finish, scaled
from qbert.kernels.expand import BLOCK, HALF, expand_int4, join_halves
from qbert.kernels.lowbit_tile import blocks_of, load_codes, load_tokens, store, tile_of, total


@triton.jit
def int4_gemm_kernel(
    q, s, qdata, group_scale, scale, bias, y, inverse_out_scale, t, n, k, groups,
    GROUP_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, SPLIT_K: tl.constexpr, TMA: tl.constexpr, PRMT: tl.constexpr,
):  # fmt: skip
    """y (t, n) = activation(s * scale * (q @ weight^T) + bias); with SPLIT_K > 1 partial sums for `int4_finish_kernel`.

    Grid: (tiles of y, SPLIT_K).

    Args:
        q, s: (t, k) int8, (t,) float32.
        qdata, group_scale, scale: nibble halves, (n, groups) uint8, (n,) float32.
        bias: (n,) float; not looked at without HAS_BIAS.
        y: (t, n) of a float type or int8; or (SPLIT_K, t, n) int32.
        inverse_out_scale: for an int8 y.
        GROUP_SIZE: weights that share a group scale: 32, 64 or a multiple of 128.
        TMA: whether q and qdata are descriptors of (BLOCK_T, 128) and (BLOCK_N, 64) blocks; else they are pointers.
        PRMT: see `expand`.
    """
    first_t, first_n = tile_of(tl.program_id(0), t, n, BLOCK_T, BLOCK_N, GROUP)
    start, stop = blocks_of(tl.program_id(1), k, SPLIT_K)
    # Rows beyond the last have codes 0, whatever their scale.
    scale_rows = group_scale + tl.minimum(first_n + tl.arange(0, BLOCK_N), n - 1).to(tl.int64) * groups
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.int32)
    for block in tl.range(start, stop):
        packed = load_codes(qdata, block, first_n, n, k, BLOCK_N, TMA)
        tokens = load_tokens(q, block, first_t, t, k, BLOCK_T, TMA)
        low = _half_scale(scale_rows, block * BLOCK, groups, GROUP_SIZE)
        high = _half_scale(scale_rows, block * BLOCK + HALF, groups, GROUP_SIZE) if GROUP_SIZE < BLOCK else low
        first, second = expand_int4(packed, low, high, PRMT)
        acc = tl.dot(join_halves(first, second), tokens.T, acc, out_dtype=tl.int32)
    if SPLIT_K > 1:
        store(y + tl.program_id(1).to(tl.int64) * t * n, acc, first_t, first_n, t, n, BLOCK_T, BLOCK_N)
    else:
        _end(acc, s, scale, bias, y, inverse_out_scale, first_t, first_n, t, n, HAS_BIAS, GELU, BLOCK_T, BLOCK_N)


@triton.jit
def int4_finish_kernel(
    sums, s, scale, bias, y, inverse_out_scale, t, n,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """y (t, n) from partial sums (SPLIT_K, t, n). Grid: (tiles of tokens, tiles of channels)."""
    first_t, first_n = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_N
    acc = total(sums, first_t, first_n, t, n, BLOCK_T, BLOCK_N, SPLIT_K)
    _end(acc, s, scale, bias, y, inverse_out_scale, first_t, first_n, t, n, HAS_BIAS, GELU, BLOCK_T, BLOCK_N)


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
def _end(
    acc, s, scale, bias, y, inverse_out_scale, first_t, first_n, t, n,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scales, bias, activation, rounding, and out."""
    tokens, rows = first_t + tl.arange(0, BLOCK_T), first_n + tl.arange(0, BLOCK_N)
    s_t = tl.load(s + tokens, mask=tokens < t, other=0.0)[None, :]
    scale_n = tl.load(scale + rows, mask=rows < n, other=0.0)[:, None]
    bias_n = tl.load(bias + rows, mask=rows < n, other=0.0)[:, None] if HAS_BIAS else scale_n
    value = scaled(acc.to(tl.float32), s_t, scale_n, bias_n, HAS_BIAS, GELU)
    store(y, finish(value, inverse_out_scale, y.dtype.element_ty), first_t, first_n, t, n, BLOCK_T, BLOCK_N)
