"""GOBO with int8 centroids: 3- or 4-bit dictionary codes and exact outliers times int8 tokens, on the int8 matrix units.

A weight's int8 operand is its centroid, looked up in registers right before it is used (`expand`); outliers are added to the
scaled sum in the epilogue (`outliers`). Computes `qbert.reference.gobo_linear` and its int8-out twin. GOBO: Zadeh et al.,
MICRO 2020.
"""

import triton
import triton.language as tl

from qbert.kernels.epilogue import activated, finish
from qbert.kernels.expand import expand_dictionary, join_halves
from qbert.kernels.lowbit_tile import blocks_of, load_codes, load_tokens, store, tile_of, total
from qbert.kernels.outliers import add_outliers, add_outliers_turned


@triton.jit
def gobo_gemm_kernel(
    q, s, qdata, codebook, scale, rowptr, col, delta, columns, bias, y, inverse_out_scale, t, n, k, matrices,
    BITS: tl.constexpr, OUTLIERS: tl.constexpr, TURNED: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SPLIT_K: tl.constexpr, WARPS: tl.constexpr,
    TMA: tl.constexpr, PRMT: tl.constexpr,
):  # fmt: skip
    """y (t, n) = activation(s * (scale * (q @ centroids^T) + q @ outliers^T) + bias); with SPLIT_K > 1 partial sums.

    Grid: (tiles of y, SPLIT_K). Partial sums are of q @ centroids^T, for `gobo_finish_kernel`.

    Args:
        q, s: (t, k) int8, (t,) float32.
        qdata: select halves.
        codebook, scale: (matrices, 2**BITS / 4) int32, four int8 centroids each, little-endian; (matrices,) float32.
        rowptr, col, delta: outliers, compressed by rows; not looked at without OUTLIERS.
        columns: q itself, or with TURNED what `columns_kernel` makes of it, for BLOCK_T = 128.
        bias: (n,) float; not looked at without HAS_BIAS.
        y: (t, n) of a float type or int8; or (SPLIT_K, t, n) int32.
        inverse_out_scale: for an int8 y.
        WARPS: of the program.
        TMA: whether q and qdata are descriptors of (BLOCK_T, 128) and (BLOCK_N, 64) blocks; else they are pointers.
        PRMT: see `expand`.
    """
    first_t, first_n = tile_of(tl.program_id(0), t, n, BLOCK_T, BLOCK_N, GROUP)
    start, stop = blocks_of(tl.program_id(1), k, SPLIT_K)
    # A dictionary for each row, so that a tile may hold rows of several matrices: the same instructions, more registers.
    table = codebook + _matrix_of(first_n, n, matrices, BLOCK_N) * (4 if BITS == 4 else 2)
    t0, t1 = tl.load(table)[:, None], tl.load(table + 1)[:, None]
    t2, t3 = (tl.load(table + 2)[:, None], tl.load(table + 3)[:, None]) if BITS == 4 else (t0, t1)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.int32)
    for block in tl.range(start, stop):
        packed = load_codes(qdata, block, first_n, n, k, BLOCK_N, TMA)
        tokens = load_tokens(q, block, first_t, t, k, BLOCK_T, TMA)
        first, second = expand_dictionary(packed, t0, t1, t2, t3, BITS, PRMT)
        acc = tl.dot(join_halves(first, second), tokens.T, acc, out_dtype=tl.int32)
    if SPLIT_K > 1:
        store(y + tl.program_id(1).to(tl.int64) * t * n, acc, first_t, first_n, t, n, BLOCK_T, BLOCK_N)
    else:
        value = acc.to(tl.float32) * tl.load(scale + _matrix_of(first_n, n, matrices, BLOCK_N))[:, None]
        if OUTLIERS and TURNED:
            value = add_outliers_turned(
                value, rowptr, col, delta, columns, first_t, first_n, n, k, BLOCK_N, WARPS, PRMT
            )  # fmt: skip
        elif OUTLIERS:
            value = add_outliers(value, rowptr, col, delta, columns, first_t, first_n, t, n, k, BLOCK_T, BLOCK_N)
        _end(value, s, bias, y, inverse_out_scale, first_t, first_n, t, n, HAS_BIAS, GELU, BLOCK_T, BLOCK_N)


@triton.jit
def gobo_finish_kernel(
    sums, s, scale, rowptr, col, delta, q, bias, y, inverse_out_scale, t, n, k, matrices,
    OUTLIERS: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """y (t, n) from partial sums (SPLIT_K, t, n). Grid: (tiles of tokens, tiles of channels)."""
    first_t, first_n = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_N
    acc = total(sums, first_t, first_n, t, n, BLOCK_T, BLOCK_N, SPLIT_K)
    value = acc.to(tl.float32) * tl.load(scale + _matrix_of(first_n, n, matrices, BLOCK_N))[:, None]
    if OUTLIERS:
        value = add_outliers(value, rowptr, col, delta, q, first_t, first_n, t, n, k, BLOCK_T, BLOCK_N)
    _end(value, s, bias, y, inverse_out_scale, first_t, first_n, t, n, HAS_BIAS, GELU, BLOCK_T, BLOCK_N)


@triton.jit
def _matrix_of(first_n, n, matrices, BLOCK_N: tl.constexpr):
    """Which of the stacked matrices each row of a tile is of."""
    return tl.minimum(first_n + tl.arange(0, BLOCK_N), n - 1) // (n // matrices)


@triton.jit
def _end(
    value, s, bias, y, inverse_out_scale, first_t, first_n, t, n,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scales of tokens, bias, activation, rounding, and out."""
    tokens, rows = first_t + tl.arange(0, BLOCK_T), first_n + tl.arange(0, BLOCK_N)
    value = value * tl.load(s + tokens, mask=tokens < t, other=0.0)[None, :]
    bias_n = tl.load(bias + rows, mask=rows < n, other=0.0)[:, None] if HAS_BIAS else value
    value = finish(activated(value, bias_n, HAS_BIAS, GELU), inverse_out_scale, y.dtype.element_ty)
    store(y, value, first_t, first_n, t, n, BLOCK_T, BLOCK_N)
