"""Look-ups in float, int8, int4 and dictionary tables: one program a row, codes unpacked in registers.

Computes `qbert.ops.reference.embedding` bit for bit, from tables in `Layout.PLAIN`: a row is a little-endian bit stream that
starts on a byte, so eight codes of b bits are b bytes. An id outside of the table reads nothing and gives a row of NaN: to
raise, the host would have to wait for the GPU.

Arguments that are tuples: `qbert.ops.triton.arguments`.
"""

import triton
import triton.language as tl


@triton.jit
def embedding_kernel(ids_ptr, out_ptr, table, k, META: tl.constexpr):
    """Rows ids (t,) of a `Table` (rows, k) -> out (t, k) float. Grid: (t,). META: a `TableMeta`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, META.BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    values = table_row(row, table, k, column, META.BITS, META.GROUP)
    tl.store(out_ptr + token * k + column, values.to(out_ptr.dtype.element_ty), mask=column < k)


@triton.jit
def table_row(row, table, k, column, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Row `row` of a `Table` as float32 (BLOCK,), NaN if there is none. BITS and GROUP: see `TableMeta`."""
    known = (row >= 0) & (row < table.rows)
    inside = column < tl.where(known, k, 0)
    if BITS == 0:
        values = tl.load(table.codes + row * k + column, mask=inside, other=0).to(tl.float32)
        if table.scale is not None:
            values *= tl.load(table.scale + row, mask=known, other=0.0)
    else:
        size = tl.cdiv(k * BITS, 8)
        codes = _unpacked(table.codes + row * size, tl.where(known, size, 0), BITS, column.shape[0])
        if GROUP > 0:
            scale = tl.load(table.scale + row * (k // GROUP) + column // GROUP, mask=inside, other=0.0)
            values = ((codes ^ 8) - 8).to(tl.float32) * scale.to(tl.float32)
        else:
            values = tl.load(table.scale + codes)
            values = _with_outliers(values, row, known, table, column)
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
def _with_outliers(values, row, known, table, column):
    """The row with its outliers' deltas added, one after the other: there are a few in a row, and columns occur once."""
    rowptr, col, delta = table.outliers
    start = tl.maximum(tl.load(rowptr + row, mask=known, other=0), 0)
    stop = tl.minimum(tl.load(rowptr + row + 1, mask=known, other=0), table.kept)
    for i in range(start, stop):
        values = tl.where(column == tl.load(col + i).to(tl.int32), values + tl.load(delta + i), values)
    return values
