"""INT8 attention of packed sequences: a program for a tile of queries of one head; scores never touch memory.

Computes `qbert.ops.reference.attention`. Both products are of integers, and exact: queries times keys as int8 with int32 sums,
codes of probabilities times values as float16 (0 ... 255 and -127 ... 127 are exact there) with float32 sums, which stay exact
below 2**24: EXACT_KEYS keys cannot reach that, and longer sequences add every block up in int32.

A probability's code depends on the largest weight of its row, so the keys are passed twice: maxima, then codes. That costs one
more int8 product a block, but no sum is ever rescaled. A sequence of one block keeps its products in registers. What a row goes
through is decided by its sequence alone, KEYS keys at a time: no bit depends on the tile or on the batch.

With a window a program passes the blocks that one of its queries sees, from a multiple of KEYS on. A block of which a row sees
nothing leaves its maxima and sums as they were, to the bit. Biases are added to scores in powers of e, and the largest is taken
off before the rest is multiplied with log2(e). Floats come rotated and rounded from `kernels/round_heads.py`. What is not asked
for is compiled away.

The host does not know where sequences start: t // BLOCK_Q + sequences tiles are enough for any, and a program searches which is
its own. Positions are clamped to the tokens, so that wrong `cu_seqlens` give wrong results but touch no other memory.

Arguments that are tuples: `qbert.ops.triton.arguments`.
"""

import triton
import triton.language as tl

KEYS = tl.constexpr(64)  # of a block
EXACT_KEYS = tl.constexpr(512)  # 255 * 127 * 512 < 2**24
MAX_KEYS = tl.constexpr((2**31 - 1) // (255 * 127))  # int32 holds their sums; a longer sequence comes out as NaN
PROBABILITY_MAX = tl.constexpr(255.0)
QMAX = tl.constexpr(127.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Stands for the largest of no scores where a row may see none of a block: minus infinity less itself would be NaN.
LOWEST = tl.constexpr(-3.0e38)
# Added to a float32 this rounds it half to even and leaves the integer in its lowest bits: from 0 on, and of either sign.
UNSIGNED_BITS = tl.constexpr(2.0**23)
SIGNED_BITS = tl.constexpr(1.5 * 2.0**23)
SIGNED_BITS_INT = tl.constexpr(0x4B400000)
# The integer 0 ... 1023 itself, as the bits of a float16, is the subnormal number of so many times 2**-24. The matrix units
# multiply subnormal numbers exactly, so a code needs no conversion; the sums come out 2**-24 times as large.
SUBNORMAL = tl.constexpr(2.0**24)


@triton.jit(do_not_specialize=["t", "sequences"])  # every batch has others: one build serves all
def attention_int8_kernel(tokens, cu_seqlens_ptr, out_ptr, t, sequences, heads, distances, META: tl.constexpr):
    """Int8 queries, keys and values -> out (t, heads, d) float, or int8 of y * inverse_out_scale.

    Grid: (heads, y, z) with y * z at least t // BLOCK_Q + sequences: heads of a tile run together, for they lie together.

    Args:
        tokens: qkv (t, 3, heads, d) int8 and scales (3,) or, with PER_TOKEN, (t, 3), with PER_HEAD besides (heads, t, 3).
        heads, distances: `Heads`, `Distances`.
        META: an `AttentionMeta`.
    """
    qkv_ptr, scales_ptr = tokens
    HEAD_DIM: tl.constexpr = META.HEAD_DIM
    BLOCK_Q: tl.constexpr = META.BLOCK_Q
    PER_TOKEN: tl.constexpr = META.PER_TOKEN
    head, tile = tl.program_id(0), tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    sequence = _sequence_of(tile, cu_seqlens_ptr, sequences, t, BLOCK_Q)
    start = start_of(sequence, cu_seqlens_ptr, t)
    length = start_of(sequence + 1, cu_seqlens_ptr, t) - start
    first = (tile - sequence - start // BLOCK_Q) * BLOCK_Q
    if (first < 0) | (first >= length):
        return
    width = heads.number * HEAD_DIM
    qkv = qkv_ptr + start.to(tl.int64) * (3 * width) + head * HEAD_DIM
    if META.PER_HEAD:
        scales_ptr += head.to(tl.int64) * t * 3
    scales = scales_ptr + start.to(tl.int64) * 3 if PER_TOKEN else scales_ptr
    keys = (qkv, scales, length - 1, width)
    sight = (head, first, distances)  # what a key's distance is counted from, and what it does
    q = _rows(qkv, first, length - 1, 3 * width, BLOCK_Q, HEAD_DIM, META.BLOCK_D)
    factor = _score_factor(first, keys, heads.softmax_scale, distances, BLOCK_Q, PER_TOKEN)
    factor = tl.where(_others_seen(length - 1, distances) < MAX_KEYS, factor, float("nan"))
    if distances.positions is not None:
        factor = tl.where(length <= distances.positions, factor, float("nan"))
    if length <= KEYS:  # noqa: SIM108 (two branches of a kernel)
        y = _one_block(q, factor, keys, sight, META)
    else:
        y = _two_passes(q, factor, keys, sight, META)
    if out_ptr.dtype.element_ty == tl.int8:
        y = _requantized(y, heads.inverse_out_scale)
    row, column = first + tl.arange(0, BLOCK_Q), tl.arange(0, META.BLOCK_D)
    out = out_ptr + start.to(tl.int64) * width + head * HEAD_DIM
    inside = (row < length)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


# ---- where things are ------------------------------------------------------------------------------------------------


@triton.jit
def start_of(sequence, cu_seqlens_ptr, t):
    """First token of a sequence, in 0 ... t whatever `cu_seqlens` says."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), t)


@triton.jit
def _sequence_of(tile, cu_seqlens_ptr, sequences, t, BLOCK_Q: tl.constexpr):
    """The last sequence whose tiles start at `tile` or before: those of sequence i start at start_i // BLOCK_Q + i."""
    low, high = 0, sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        reached = start_of(middle, cu_seqlens_ptr, t) // BLOCK_Q + middle <= tile
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low


@triton.jit
def _rows(base, first, last, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(ROWS, BLOCK_D) int8 from row `first` on. In place of rows after `last`, `last` again: maxima do not mind."""
    row = tl.minimum(tl.arange(0, ROWS), last - first)
    column = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0)


@triton.jit
def _products(q, block, keys, HEAD_DIM: tl.constexpr):
    """(BLOCK_Q, KEYS) int32: queries times the keys from `block` on."""
    qkv, _, last, width = keys
    k = _rows(qkv + width, block, last, 3 * width, KEYS, HEAD_DIM, q.shape[1])
    return tl.dot(q, k.T, out_dtype=tl.int32)


@triton.jit
def _others_seen(last, distances):
    """How many keys beside its own a query sees at most, of a sequence whose last token is `last`."""
    return last if distances.window is None else tl.minimum(last, 2 * distances.window)


@triton.jit
def _distances(block, keys, sight, ROWS: tl.constexpr):
    """(ROWS, KEYS) int32: of the keys from `block` on from the queries. Keys stop at the last token, as `_rows` does."""
    key = block + tl.minimum(tl.arange(0, KEYS), keys[2] - block)
    return key[None, :] - (sight[1] + tl.arange(0, ROWS))[:, None]


@triton.jit
def _if_seen(values, block, keys, sight, other: tl.constexpr):
    """Values (ROWS, KEYS) of the keys from `block` on, and `other` where a query does not see the key."""
    window = sight[2].window
    if window is not None:
        values = tl.where(tl.abs(_distances(block, keys, sight, values.shape[0])) <= window, values, other)
    return values


@triton.jit
def _biased(scores, factor, block, keys, sight, PTX: tl.constexpr):
    """Scores to powers of e: times the queries' factors, plus the head's biases of the keys from `block` on."""
    head, _, distances = sight
    reach = distances.reach
    middle = distances.bias + head * (2 * reach + 1) + reach
    place = tl.minimum(tl.maximum(_distances(block, keys, sight, scores.shape[0]), -reach), reach)
    return tl.fma(scores, factor[:, None], _looked_up(middle + place, PTX))


@triton.jit
def _looked_up(pointers, PTX: tl.constexpr):
    """Float32 from memory in the order of the scores. Triton's own load goes through shared memory, to be copied ahead."""
    if PTX:
        values = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [pointers], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def _half(codes):
    """int8 as float16: v + 128 in the lowest bits of 1024, and that taken off again."""
    bits = (codes.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16) | 0x6400
    return bits.to(tl.float16, bitcast=True) - 1152.0


# ---- scales ----------------------------------------------------------------------------------------------------------


@triton.jit
def _score_factor(first, keys, softmax_scale, distances, BLOCK_Q: tl.constexpr, PER_TOKEN: tl.constexpr):
    """What turns a query's scores into exponents of two, or where biases are added of e, (BLOCK_Q,)."""
    _, scales, last, _ = keys
    if PER_TOKEN:
        row = tl.minimum(first + tl.arange(0, BLOCK_Q), last)
        factor = tl.load(scales + row * 3) * softmax_scale
    else:
        # A scale of values that is NaN or infinite makes everything NaN, as in the reference.
        product = tl.load(scales) * tl.load(scales + 1) * softmax_scale + tl.load(scales + 2) * 0
        factor = tl.full((BLOCK_Q,), 1.0, tl.float32) * product
    return factor * LOG2_E if distances.bias is None else factor


@triton.jit
def _key_scales(block, keys, WINDOW: tl.constexpr):
    """Scales of keys and values (KEYS,). A key whose value's scale is not finite becomes NaN, and so its sequence does."""
    _, scales, last, _ = keys
    row = scales + (block + tl.minimum(tl.arange(0, KEYS), last - block)) * 3
    value = tl.load(row + 2)
    key = tl.load(row + 1) + value * 0
    if WINDOW:  # what a query does not see has weight 0, times any scale
        value = tl.where(value * 0 == 0, value, 0.0)
    return key, value


# ---- first pass: maxima ----------------------------------------------------------------------------------------------


@triton.jit
def _no_maxima(distances, ROWS: tl.constexpr, PER_TOKEN: tl.constexpr):
    if distances.bias is None and not PER_TOKEN:
        largest = tl.full((ROWS,), -(2**31), tl.int32)
    elif distances.bias is None and distances.window is None:
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
    else:  # a block may have no key that a row sees
        largest = tl.full((ROWS,), LOWEST, tl.float32)
    return largest, tl.zeros((ROWS,), tl.float32)


@triton.jit
def _maxima(products, maxima, block, keys, factor, sight, META: tl.constexpr):
    """Each row's largest score and largest weight relative to it, with a block of keys more.

    Static scales leave scores integers here, unless biases are added, and need no weights: they all have one scale, and the
    largest power is 1.
    """
    largest, heaviest = maxima
    scores = products
    if META.PER_TOKEN:
        key_scale, value_scale = _key_scales(block, keys, sight[2].window is not None)
        scores = scores.to(tl.float32) * key_scale[None, :]
    if sight[2].bias is not None:
        scores = _biased(scores.to(tl.float32), factor, block, keys, sight, META.PTX)
        factor = tl.full(factor.shape, LOG2_E, tl.float32)
    scores = _if_seen(scores, block, keys, sight, -(2**31) if scores.dtype == tl.int32 else float("-inf"))
    grown = tl.maximum(largest, tl.max(scores, axis=1))
    if META.PER_TOKEN:
        weights = tl.exp2((scores - grown[:, None]) * factor[:, None]) * value_scale[None, :]
        heaviest = tl.maximum(heaviest * tl.exp2((largest - grown) * factor), tl.max(weights, axis=1))
    return grown, heaviest


@triton.jit
def _row_factors(maxima, factor, distances, PER_TOKEN: tl.constexpr):
    """(factor, offset, code_factor): weight = 2 ** (score * factor - offset), code = weight * code_factor.

    A fused multiply-add rounds an exponent once, and so best near 0, where it matters. But the offset was rounded before, which
    makes all weights of a row too large by the same ratio: the code's factor takes it back. With biases `offset` is the largest
    score itself, a power of e, and exact.
    """
    largest, heaviest = maxima
    largest = largest.to(tl.float32)
    if distances.bias is None:
        offset = largest * factor
        excess = 1.0 + LN_2 * tl.fma(largest, factor, -offset)
    else:
        offset, excess = largest, tl.full(largest.shape, 1.0, tl.float32)
    return factor, offset, tl.div_rn(PROBABILITY_MAX, heaviest * excess if PER_TOKEN else excess)


# ---- second pass: codes times values ---------------------------------------------------------------------------------


@triton.jit
def _no_sums(ROWS: tl.constexpr, BLOCK_D: tl.constexpr, LONG: tl.constexpr):
    """Of codes times values; of powers; the largest weight."""
    out = tl.zeros((ROWS, BLOCK_D), tl.int32 if LONG else tl.float32)
    return out, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)


@triton.jit
def _attend(products, sums, block, keys, row, sight, META: tl.constexpr, LAST: tl.constexpr):
    """The sums with a block of keys more, int32 where float32 could not hold them exactly; LAST: the sequence may end in it."""
    PER_TOKEN: tl.constexpr = META.PER_TOKEN
    out, total, heaviest = sums
    factor, offset, code_factor = row
    qkv, _, last, width = keys
    scores = products.to(tl.float32)
    if PER_TOKEN:
        key_scale, value_scale = _key_scales(block, keys, sight[2].window is not None)
        scores *= key_scale[None, :]
    if sight[2].bias is not None:
        exponents = (_biased(scores, factor, block, keys, sight, META.PTX) - offset[:, None]) * LOG2_E
    else:
        exponents = tl.fma(scores, factor[:, None], -offset[:, None])
    exponents = _if_seen(exponents, block, keys, sight, float("-inf"))
    if LAST:
        exponents = tl.where((tl.arange(0, KEYS) <= last - block)[None, :], exponents, float("-inf"))
    weights = tl.exp2(exponents)
    total += tl.sum(weights, axis=1)
    if PER_TOKEN:
        weights *= value_scale[None, :]
        heaviest = tl.maximum(heaviest, tl.max(weights, axis=1))
    codes = tl.fma(weights, code_factor[:, None], UNSIGNED_BITS).to(tl.int32, bitcast=True)
    codes = codes.to(tl.int16).to(tl.float16, bitcast=True)
    values = _half(_rows(qkv + 2 * width, block, last, 3 * width, KEYS, META.HEAD_DIM, out.shape[1]))
    if out.dtype == tl.int32:
        integers = tl.fma(tl.dot(codes, values), SUBNORMAL, SIGNED_BITS).to(tl.int32, bitcast=True)
        out += integers - SIGNED_BITS_INT
    else:
        out = tl.dot(codes, values, out)
    return out, total, heaviest


@triton.jit
def _normalized(sums, row, keys, PER_TOKEN: tl.constexpr):
    """(BLOCK_Q, BLOCK_D) float32: sums of codes times values, times the largest weight / 255 / the sum of powers."""
    out, total, heaviest = sums
    out = out.to(tl.float32) if out.dtype == tl.int32 else out * SUBNORMAL
    # Static scales: the heaviest key is that of the largest power, which in these sums is 255 / code_factor.
    heaviest = heaviest if PER_TOKEN else tl.load(keys[1] + 2)
    code = PROBABILITY_MAX if PER_TOKEN else row[2]
    return out * tl.div_rn(heaviest, total * code)[:, None]


@triton.jit
def _one_block(q, factor, keys, sight, META: tl.constexpr):
    """A sequence of at most KEYS tokens: one product serves both passes."""
    products = _products(q, 0, keys, META.HEAD_DIM)
    none = _no_maxima(sight[2], q.shape[0], META.PER_TOKEN)
    maxima = _maxima(products, none, 0, keys, factor, sight, META)
    row = _row_factors(maxima, factor, sight[2], META.PER_TOKEN)
    sums = _no_sums(q.shape[0], q.shape[1], False)
    sums = _attend(products, sums, 0, keys, row, sight, META, True)
    return _normalized(sums, row, keys, META.PER_TOKEN)


@triton.jit
def _two_passes(q, factor, keys, sight, META: tl.constexpr):
    """A sequence of any length."""
    begin, last = _blocks(keys, sight, META.BLOCK_Q)
    maxima = _no_maxima(sight[2], q.shape[0], META.PER_TOKEN)
    for block in range(begin, last + 1, KEYS):
        products = _products(q, block, keys, META.HEAD_DIM)
        maxima = _maxima(products, maxima, block, keys, factor, sight, META)
    row = _row_factors(maxima, factor, sight[2], META.PER_TOKEN)
    if _others_seen(keys[2], sight[2]) < EXACT_KEYS:
        y = _second_pass(q, begin, last, keys, row, sight, META, False)
    else:
        y = _second_pass(q, begin, last, keys, row, sight, META, True)
    return y


@triton.jit
def _blocks(keys, sight, BLOCK_Q: tl.constexpr):
    """The first block and the last key that one of the queries sees."""
    _, first, distances = sight
    begin, last = 0, keys[2]
    if distances.window is not None:
        begin = (first - tl.minimum(first, distances.window)) // KEYS * KEYS
        last = first + tl.minimum(last - first, BLOCK_Q - 1 + distances.window)
    return begin, last


@triton.jit
def _second_pass(q, begin, last, keys, row, sight, META: tl.constexpr, LONG: tl.constexpr):
    sums = _no_sums(q.shape[0], q.shape[1], LONG)
    final = last // KEYS * KEYS
    for block in range(begin, final, KEYS):
        sums = _attend(_products(q, block, keys, META.HEAD_DIM), sums, block, keys, row, sight, META, False)
    sums = _attend(_products(q, final, keys, META.HEAD_DIM), sums, final, keys, row, sight, META, True)
    return _normalized(sums, row, keys, META.PER_TOKEN)


@triton.jit
def _requantized(y, inverse_out_scale):
    """Nearest int8 codes of y / out_scale, NaN as 0."""
    steps = y * inverse_out_scale
    steps = tl.where(steps == steps, steps, 0.0)
    return (tl.minimum(tl.maximum(steps, -QMAX), QMAX) + SIGNED_BITS) - SIGNED_BITS
