"""GOBO with int8 centroids: 3- or 4-bit dictionary codes and exact outliers times int8 tokens, on the int8 matrix units.

A weight's int8 operand is its centroid, looked up in registers right before it is used (`expand`); outliers are added to the
scaled sum in the epilogue (`outliers`). Computes `qbert.ops.reference.linear` of such weights. GOBO: Zadeh et
al., MICRO 2020.

Arguments that are tuples: `qbert.ops.triton.arguments`.
"""

import triton
import triton.language as tl

from qbert.kernels.epilogue import activated, finish
from qbert.kernels.expand import expand_dictionary, join_halves
from qbert.kernels.lowbit_tile import blocks_of, load_codes, load_tokens, store, tile_of, total
from qbert.kernels.outliers import add_outliers, add_outliers_turned


@triton.jit
def gobo_gemm_kernel(q, qdata, dictionaries, y, end, shape, META: tl.constexpr):
    """y (t, n) = activation(s * (scale * (q @ centroids^T) + q @ outliers^T) + bias); with SPLIT_K > 1 partial sums.

    Grid: (tiles of y, SPLIT_K). Partial sums are of q @ centroids^T, for `gobo_finish_kernel`.

    Args:
        q: (t, k) int8.
        qdata, dictionaries: select halves, `Dictionaries`.
        y: (t, n) of a float type or int8; or (SPLIT_K, t, n) int32.
        end: `End`.
        shape: `Shape`.
        META: a `LowbitMeta`.
    """
    BLOCK_T: tl.constexpr = META.BLOCK_T
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BITS: tl.constexpr = META.BITS
    t, n, k = shape
    first_t, first_n = tile_of(tl.program_id(0), t, n, BLOCK_T, BLOCK_N, META.GROUP)
    start, stop = blocks_of(tl.program_id(1), k, META.SPLIT_K)
    # A dictionary for each row, so that a tile may hold rows of several matrices: the same instructions, more registers.
    table = dictionaries.codebook + _matrix_of(first_n, n, dictionaries.matrices, BLOCK_N) * (4 if BITS == 4 else 2)
    t0, t1 = tl.load(table)[:, None], tl.load(table + 1)[:, None]
    t2, t3 = (tl.load(table + 2)[:, None], tl.load(table + 3)[:, None]) if BITS == 4 else (t0, t1)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.int32)
    for block in tl.range(start, stop):
        packed = load_codes(qdata, block, first_n, n, k, BLOCK_N, META.TMA)
        tokens = load_tokens(q, block, first_t, t, k, BLOCK_T, META.TMA)
        first, second = expand_dictionary(packed, t0, t1, t2, t3, BITS, META.PRMT)
        acc = tl.dot(join_halves(first, second), tokens.T, acc, out_dtype=tl.int32)
    place = (first_t, first_n, t, n)
    if META.SPLIT_K > 1:
        store(y + tl.program_id(1).to(tl.int64) * t * n, acc, place)
    else:
        _end(acc, dictionaries, y, end, place, k, META)


@triton.jit
def gobo_finish_kernel(sums, dictionaries, y, end, shape, META: tl.constexpr):
    """y (t, n) from partial sums (SPLIT_K, t, n). Grid: (tiles of tokens, tiles of channels)."""
    place = (tl.program_id(0) * META.BLOCK_T, tl.program_id(1) * META.BLOCK_N, shape.t, shape.n)
    _end(total(sums, place, META), dictionaries, y, end, place, shape.k, META)


@triton.jit
def _matrix_of(first_n, n, matrices, BLOCK_N: tl.constexpr):
    """Which of the stacked matrices each row of a tile is of."""
    return tl.minimum(first_n + tl.arange(0, BLOCK_N), n - 1) // (n // matrices)


@triton.jit
def _end(acc, dictionaries, y, end, place, k, META: tl.constexpr):
    """Scales, outliers, bias, activation, rounding, and out."""
    HAS_BIAS: tl.constexpr = end.bias is not None
    first_t, first_n, t, n = place
    matrix = _matrix_of(first_n, n, dictionaries.matrices, META.BLOCK_N)
    value = acc.to(tl.float32) * tl.load(end.scale + matrix)[:, None]
    if dictionaries.outliers is not None and META.TURNED:
        value = add_outliers_turned(value, dictionaries.outliers, dictionaries.tokens, place, k, META.WARPS, META.PRMT)
    elif dictionaries.outliers is not None:
        value = add_outliers(value, dictionaries.outliers, dictionaries.tokens, place, k)
    tokens, rows = first_t + tl.arange(0, META.BLOCK_T), first_n + tl.arange(0, META.BLOCK_N)
    value = value * tl.load(end.s + tokens, mask=tokens < t, other=0.0)[None, :]
    bias_n = tl.load(end.bias + rows, mask=rows < n, other=0.0)[:, None] if HAS_BIAS else value
    value = finish(activated(value, bias_n, HAS_BIAS, META.ACTIVATION), end, y.dtype.element_ty)
    store(y, value, place)
