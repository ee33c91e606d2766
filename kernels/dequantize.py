"""A packed weight as floats in memory, for torch's matrix product: one reading of the codes, one writing of the floats.

A program does a row. Codes are found one by one, in plain arithmetic: writing the floats takes more time than that. A row's
outliers are written last, over what the row's program wrote before.

Arguments that are tuples: `qbert.ops.triton.arguments`.
"""

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(weight, out_ptr, k, META: tl.constexpr):
    """out (n, k) of any float type = the weight that `weight_only_kernel` multiplies by. Grid: (n,).

    Args:
        weight: `Packed`, its codes uint8.
        META: an `ExpandMeta`.
    """
    LAYOUT: tl.constexpr = META.LAYOUT
    BITS: tl.constexpr = META.BITS
    GROUP: tl.constexpr = META.GROUP
    row = tl.program_id(0).to(tl.int64)
    codes_ptr, row_ptr = weight.codes + row * weight.pitch, out_ptr + row * k
    for first in tl.range(0, k, META.BLOCK_K):
        column = first + tl.arange(0, META.BLOCK_K)
        inside = column < k
        codes = _codes_at(codes_ptr, column, inside, weight.pitch, LAYOUT, BITS)
        if weight.codebook is not None:
            value = tl.load(weight.codebook + codes)
        else:
            at = row * (k // GROUP) + column // GROUP if GROUP else row + tl.zeros_like(column)
            scale = tl.load(weight.scale + at, mask=inside, other=0.0).to(tl.float32)
            value = (codes << (32 - BITS) >> (32 - BITS)).to(tl.float32) * scale
        tl.store(row_ptr + column, value, mask=inside)
    if weight.outliers is not None:
        rowptr, col, delta = weight.outliers
        tl.debug_barrier()  # other threads wrote these places
        stop = tl.load(rowptr + row + 1)
        for first in tl.range(tl.load(rowptr + row), stop, META.BLOCK_K):
            index = first + tl.arange(0, META.BLOCK_K)
            inside = index < stop
            column = tl.load(col + index, mask=inside, other=0).to(tl.int32)
            codes = _codes_at(codes_ptr, column, inside, weight.pitch, LAYOUT, BITS)
            value = tl.load(weight.codebook + codes) + tl.load(delta + index, mask=inside, other=0.0)
            tl.store(row_ptr + column, value, mask=inside)


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
