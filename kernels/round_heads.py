"""Float queries, keys and values to int8 codes for attention: rotated by position, then rounded; a program for a token's heads.

Computes `qbert.ops.reference.attention_codes` bit for bit. A head's channels are held as two halves, which a rotation mixes. To
be compiled without fused multiply-adds (`enable_fp_fusion=False`): the reference rounds every product. It is a pass of its own
because attention reads a key twice for each tile of queries, and int8 operands come from memory.
"""

import triton
import triton.language as tl

from qbert.kernels.attention import start_of
from qbert.kernels.row import MIN_ABSMAX, QMAX, nearest


@triton.jit(do_not_specialize=["t", "sequences"])  # every batch has others: one build serves all
def round_heads_kernel(qkv_ptr, given, rotation, cu_seqlens_ptr, rounded, t, sequences, heads, META: tl.constexpr):
    """qkv (t, 3, heads, d) float -> codes of the same shape int8, and scales (heads, t, 3) float32 where none are given.

    Grid: (t, 3, heads / HEADS rounded up).

    Args:
        given: static scales (3,) float32 of queries, keys and values, or None: then each row of d channels gets one.
        rotation: of queries and keys: cosines, then sines (positions, d) float32, and how many positions; or None. What a token
            beyond them gets is NaN before it is rounded.
        rounded: codes, and scales, or None where they are given.
        META: a `HeadsMeta`.
    """
    codes_ptr, scales_ptr = rounded
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.program_id(2) * META.HEADS + tl.arange(0, META.HEADS)
    first = tl.arange(0, META.HALF)
    places = ((token * 3 + part) * heads + head)[:, None] * META.HEAD_DIM + first[None, :]
    HALF: tl.constexpr = (META.HEAD_DIM + 1) // 2
    there = (head < heads)[:, None] & (first < HALF)[None, :]
    second_there = there & (first + HALF < META.HEAD_DIM)[None, :]
    a = tl.load(qkv_ptr + places, mask=there, other=0.0).to(tl.float32)
    b = tl.load(qkv_ptr + places + HALF, mask=second_there, other=0.0).to(tl.float32)
    if rotation is not None:  # noqa: SIM102 (known to the compiler; the next one is not)
        if part < 2:
            start = start_of(_sequence_of(token, cu_seqlens_ptr, sequences, t), cu_seqlens_ptr, t)
            a, b = _rotated(a, b, token - start, first, rotation, META.HEAD_DIM)
    if given is None:
        a, b, scale = _rounded(a, b)
        tl.store(scales_ptr + (head.to(tl.int64) * t + token) * 3 + part, scale, mask=head < heads)
    else:
        inverse = tl.div_rn(1.0, tl.load(given + part))
        a, b = _steps(a * inverse), _steps(b * inverse)
    tl.store(codes_ptr + places, a.to(tl.int8), mask=there)
    tl.store(codes_ptr + places + HALF, b.to(tl.int8), mask=second_there)


@triton.jit
def _rotated(a, b, position, channel, rotation, HEAD_DIM: tl.constexpr):
    """Halves of heads (HEADS, HALF), turned by the angles of a position."""
    table, positions = rotation
    known = (position >= 0) & (position < positions)
    channels = tl.where(known, HEAD_DIM // 2, 0)  # that are read
    angles = table + position * HEAD_DIM + channel
    cosine = tl.load(angles, mask=channel < channels, other=float("nan"))
    sine = tl.load(angles + HEAD_DIM // 2, mask=channel < channels, other=float("nan"))
    there = channel < HEAD_DIM // 2  # what is no channel stays 0
    cosine, sine = tl.where(there, cosine, 0.0)[None, :], tl.where(there, sine, 0.0)[None, :]
    return a * cosine - b * sine, b * cosine + a * sine


@triton.jit
def _sequence_of(token, cu_seqlens_ptr, sequences, t):
    """The last sequence that starts at a token or before."""
    low, high = 0, sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        reached = start_of(middle, cu_seqlens_ptr, t) <= token
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low


@triton.jit
def _rounded(a, b):
    """`qbert.kernels.row.quantized` of rows whose halves are `a` and `b` (HEADS, HALF): codes as float32, scales (HEADS,)."""
    absmax = tl.maximum(tl.max(tl.abs(a), axis=1), tl.max(tl.abs(b), axis=1))
    bad = (_not_finite(a) + _not_finite(b)) > 0
    absmax = tl.where(bad, 1.0, tl.maximum(absmax, MIN_ABSMAX))
    factor = tl.div_rn(QMAX, absmax)[:, None]
    a, b = nearest(a * factor), nearest(b * factor)
    scale = tl.where(bad, float("nan"), tl.div_rn(absmax, QMAX))
    return tl.where(bad[:, None], 0.0, a), tl.where(bad[:, None], 0.0, b), scale


@triton.jit
def _not_finite(x):
    return tl.sum(tl.where(tl.abs(x) < float("inf"), 0, 1), axis=1)


@triton.jit
def _steps(x):
    """Nearest codes of x, NaN as 0."""
    return nearest(tl.where(x == x, x, 0.0))
