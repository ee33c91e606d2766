"""A packed weight as floats in memory, for torch's matrix product: one reading of the codes, one writing of the floats.

A program does a row. Codes are found one by one, in plain arithmetic: writing the floats takes more time than that. A row's
outliers are written last, over what the row's program wrote before.
"""

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(
    qdata_ptr, codebook_ptr, scale_ptr, rowptr_ptr, col_ptr, delta_ptr, out_ptr, k, row_bytes,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, DICTIONARY: tl.constexpr, GROUP: tl.constexpr, OUTLIERS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (n, k) of any float type = the weight that `weight_only_kernel` multiplies by. Grid: (n,).

    Args:
        qdata_ptr: (n, row_bytes) uint8 in LAYOUT: plain, int8_rows, nibble_halves, select_halves or dict3_words.
        codebook_ptr: (2**BITS,) float32; with DICTIONARY.
        scale_ptr: (n,) float32 with GROUP = 0, else (n, k / GROUP) bfloat16; without DICTIONARY.
        rowptr_ptr, col_ptr, delta_ptr: compressed sparse rows to add, in float32; with OUTLIERS.
        BLOCK_K: input channels at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    codes_ptr, row_ptr = qdata_ptr + row * row_bytes, out_ptr + row * k
    for first in tl.range(0, k, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        inside = column < k
        codes = _codes_at(codes_ptr, column, inside, row_bytes, LAYOUT, BITS)
        if DICTIONARY:
            weight = tl.load(codebook_ptr + codes)
        else:
            at = row * (k // GROUP) + column // GROUP if GROUP else row + tl.zeros_like(column)
            scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
            weight = (codes << (32 - BITS) >> (32 - BITS)).to(tl.float32) * scale
        tl.store(row_ptr + column, weight, mask=inside)
    if OUTLIERS:
        tl.debug_barrier()  # other threads wrote these places
        stop = tl.load(rowptr_ptr + row + 1)
        for first in tl.range(tl.load(rowptr_ptr + row), stop, BLOCK_K):
            index = first + tl.arange(0, BLOCK_K)
            inside = index < stop
            column = tl.load(col_ptr + index, mask=inside, other=0).to(tl.int32)
            codes = _codes_at(codes_ptr, column, inside, row_bytes, LAYOUT, BITS)
            weight = tl.load(codebook_ptr + codes) + tl.load(delta_ptr + index, mask=inside, other=0.0)
            tl.store(row_ptr + column, weight, mask=inside)


@triton.jit
def _codes_at(row_ptr, column, inside, row_bytes, LAYOUT: tl.constexpr, BITS: tl.constexpr):
    """Codes int32, unsigned, of input channels `column` of a row."""
    if LAYOUT == "dict3_words":
        codes = _dict3_at(row_ptr, column, inside, row_bytes // 3)
    else:
        if LAYOUT == "nibble_halves":
            byte, shift = column // 128 * 64 + column % 64, column // 64 % 2 * 4
        elif LAYOUT == "select_halves":
            byte = column // 128 * 64 + column % 64 // 4 * 4 + column // 64 % 2 * 2 + column // 2 % 2
            shift = column % 2 * 4
        else:
            byte, shift = column * BITS // 8, column * BITS % 8
        packed = tl.load(row_ptr + byte, mask=inside, other=0).to(tl.int32)
        if BITS == 3:  # a code may lie across two bytes
            packed |= tl.load(row_ptr + byte + 1, mask=inside & (shift > 5), other=0).to(tl.int32) << 8
        codes = packed >> shift & (2**BITS - 1)
    return codes


@triton.jit
def _dict3_at(row_ptr, column, inside, plane_bytes):
    eight, j = column // 8 % 4, column % 8  # which eight of a run of 32 codes, and the code's nibble there
    at, shift = row_ptr + column // 32 * 4 + j // 2, 4 * (j % 2)
    first = tl.load(at, mask=inside, other=0).to(tl.int32) >> shift
    second = tl.load(at + plane_bytes, mask=inside, other=0).to(tl.int32) >> shift
    third = tl.load(at + 2 * plane_bytes, mask=inside, other=0).to(tl.int32) >> shift
    fourth = first >> 3 & 1 | second >> 2 & 2 | third >> 1 & 4
    return tl.where(eight == 0, first, tl.where(eight == 1, second, tl.where(eight == 2, third, fourth))) & 7
