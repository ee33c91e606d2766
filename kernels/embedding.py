"""Look-ups in float, int8, int4 and dictionary tables: one program a row, codes unpacked in registers.

Computes `qbert.reference.w8_embedding`, `w4_embedding` and `gobo_embedding` bit for bit, from tables in `Layout.PLAIN`: a row
is a little-endian bit stream that starts on a byte, so eight codes of b bits are b bytes. An id outside of the table reads
nothing and gives a row of NaN: to raise, the host would have to wait for the GPU.
"""

import triton
import triton.language as tl


@triton.jit
def embedding_kernel(
    ids_ptr, out_ptr, rows, outliers, k, table_ptr, scale_ptr, rowptr_ptr, col_ptr, delta_ptr, BITS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows ids (t,) of a table (rows, k) as `table_row` reads it -> out (t, k) float. Grid: (t,)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    values = table_row(
        row, table_ptr, scale_ptr, rowptr_ptr, col_ptr, delta_ptr, rows, outliers, k, column, BITS, GROUP, BLOCK
    )
    tl.store(out_ptr + token * k + column, values.to(out_ptr.dtype.element_ty), mask=column < k)


@triton.jit
def table_row(
    row, table_ptr, scale_ptr, rowptr_ptr, col_ptr, delta_ptr, rows, outliers, k, column, BITS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row `row` as float32 (BLOCK,), NaN if there is none.

    Args:
        table_ptr: (rows, k) float or int8 with BITS 0, else (rows, bytes) uint8 of codes of BITS bits.
        scale_ptr: None of a float table; (rows,) of int8; (rows, k / GROUP) of int4; the dictionary (2**BITS,) otherwise.
        rowptr_ptr, col_ptr, delta_ptr: None but of dictionaries: compressed sparse rows of what is added to the centroids.
        GROUP: codes that share a scale, 0 but of int4.
    """
    known = (row >= 0) & (row < rows)
    inside = column < tl.where(known, k, 0)
    if BITS == 0:
        values = tl.load(table_ptr + row * k + column, mask=inside, other=0).to(tl.float32)
        if scale_ptr is not None:
            values *= tl.load(scale_ptr + row, mask=known, other=0.0)
    else:
        size = tl.cdiv(k * BITS, 8)
        codes = _unpacked(table_ptr + row * size, tl.where(known, size, 0), BITS, BLOCK)
        if GROUP > 0:
            scale = tl.load(scale_ptr + row * (k // GROUP) + column // GROUP, mask=inside, other=0.0)
            values = ((codes ^ 8) - 8).to(tl.float32) * scale.to(tl.float32)
        else:
            values = tl.load(scale_ptr + codes)
            values = _with_outliers(values, row, known, rowptr_ptr, col_ptr, delta_ptr, outliers, column)
    return tl.where(known, values, float("nan"))


@triton.jit
def _unpacked(stream_ptr, size, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The codes (BLOCK,) int32 of a bit stream of `size` bytes; past its end they are any."""
    first = tl.arange(0, BLOCK // 8) * BITS
    word = tl.zeros((BLOCK // 8,), tl.int32)
    for i in tl.static_range(BITS):
        byte = tl.load(stream_ptr + first + i, mask=first + i < size, other=0)
        word |= byte.to(tl.int32) << (8 * i)
    codes = (word[:, None] >> (tl.arange(0, 8) * BITS)[None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes, (BLOCK,))


@triton.jit
def _with_outliers(values, row, known, rowptr_ptr, col_ptr, delta_ptr, outliers, column):
    """The row with its outliers' deltas added, one after the other: there are a few in a row, and columns occur once."""
    start = tl.maximum(tl.load(rowptr_ptr + row, mask=known, other=0), 0)
    stop = tl.minimum(tl.load(rowptr_ptr + row + 1, mask=known, other=0), outliers)
    for i in range(start, stop):
        values = tl.where(column == tl.load(col_ptr + i).to(tl.int32), values + tl.load(delta_ptr + i), values)
    return values
