"""Weight-only linear: float activations, packed weights, as few tokens as one stream of the weights serves.

Bound by the weights' bytes, so everything serves their stream. A program has 8 * REPEATS rows of the weight (output channels),
and its warps share the input channels: of each row, warp s takes every WARPS-th chunk of 64 bytes. So matrices with few rows
still keep many warps busy, the sum over warps has a fixed order, and there is neither a workspace nor a second launch.

    memory      a lane loads 16 bytes of a row: lanes 4 g ... 4 g + 3 of a warp 64 bytes of row g, one chunk ahead
    registers   those bytes become weights of x's type in the lane that loaded them (`kernels.decode`)
    product     y^T = W x^T: rows are the matrix unit's M, tokens its N, of which it takes eight at a time

The matrix unit wants weight (row g, k = 8 h + 2 c + b) in lane 4 g + c, register (h, b). In which order a product adds is free
as long as both operands keep to it, so the 16 neighbours that lane c = 0 ... 3 holds are numbered (q, b), and x is loaded in
that order: no operand goes through shared memory, and no barrier stands before the sum over warps. float32 has no matrix unit
that is exact enough; there each lane multiplies its own weights, for a few tokens at a time.

Tensors in memory order are 2-D with the leading index (repeat, warp, row), because then every version of Triton deals its last
eight out to lanes, the next WARPS to warps, and the rest to registers. With more dimensions the compiler would choose.

Weights that a multiprocessor must decode in a cycle to keep up with an H100's memory (3.35 TB/s, 132 multiprocessors, 1.7 GHz),
and those that the main loop's instructions allow, for up to 8 tokens of a 16-bit type (compiled for sm_90, not run):

                            int8    int4, groups of 32 / 128    4-bit dictionary    3-bit dictionary
    needed                  15      30                          30                  40
    possible, by issue      30      30 / 38                     32                  52
    possible, by shifts,    32      37 / 39                     23                  40
    logic, prmt (64 lanes)

Arguments that are tuples: `qbert.ops.triton.arguments`.
"""

import triton
import triton.language as tl

from qbert.kernels.decode import WORDS3, decode, parts_of, tables_of
from qbert.kernels.epilogue import activated

ROWS = tl.constexpr(8)  # of a warp's load
LANES = tl.constexpr(4)  # that share a row
RUN = tl.constexpr(16)  # bytes that a lane loads of a row
CHUNK = tl.constexpr(64)  # bytes that a warp loads of a row


@triton.jit
def weight_only_kernel(x_ptr, weight, bias_ptr, y_ptr, shape, META: tl.constexpr):
    """y (t, n) = activation(x (t, k) @ W^T + bias), y of x's type, sums float32. Grid: (ceil(t / BLOCK_T) * ceil(n / rows),).

    Args:
        x_ptr: contiguous, float32, bfloat16 or float16.
        weight: `Packed`, its codes int32.
        bias_ptr: (n,) of any float type, or None.
        shape: `Shape`.
        META: a `WeightOnlyMeta`.
    """
    BLOCK_T: tl.constexpr = META.BLOCK_T
    REPEATS: tl.constexpr = META.REPEATS
    WARPS: tl.constexpr = META.WARPS
    LAYOUT: tl.constexpr = META.LAYOUT
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    EXACT: tl.constexpr = DTYPE.primitive_bitwidth == 32
    t, n, k = shape
    slices = tl.cdiv(t, BLOCK_T)
    first_t = tl.program_id(0) % slices * BLOCK_T
    first_n = tl.program_id(0) // slices * (ROWS * REPEATS)
    if EXACT:
        acc = tl.zeros((BLOCK_T, REPEATS, WARPS * ROWS, LANES), tl.float32)
    else:
        acc = tl.zeros((WARPS, REPEATS * ROWS, BLOCK_T), tl.float32)
    place = (first_t, first_n, t, n, k)
    words = _load_words(weight, 0, first_n, n, META)
    tables = tables_of(weight.codebook, DTYPE, LAYOUT, META.BITS, META.PRMT)
    CODES: tl.constexpr = CHUNK * parts_of(LAYOUT)  # of a chunk
    for chunk in tl.range(0, tl.cdiv(k, CODES), WARPS):
        following = _load_words(weight, chunk + WARPS, first_n, n, META)
        weights = decode(words, tables, weight.codebook, DTYPE, LAYOUT, META.BITS, META.PRMT)
        if EXACT:
            acc = _add_float32(acc, weights, x_ptr, weight.scale, chunk, place, META)
        else:
            acc = _add_mma(acc, weights, x_ptr, weight.scale, chunk, place, META)
        words = following
    if EXACT:
        y = tl.sum(tl.sum(acc, axis=3).reshape(BLOCK_T, REPEATS, WARPS, ROWS), axis=2).reshape(BLOCK_T, REPEATS * ROWS)
    else:
        y = tl.sum(acc, axis=0).trans()
    tokens, rows = first_t + tl.arange(0, BLOCK_T), first_n + tl.arange(0, REPEATS * ROWS)
    if LAYOUT == "int8_rows":
        y *= tl.load(weight.scale + rows, mask=rows < n, other=0.0)[None, :]
    if weight.outliers is not None:
        y += _outliers(x_ptr, weight.outliers, tokens, rows, shape, META.OUTLIERS)
    bias = tl.load(bias_ptr + rows, mask=rows < n, other=0.0)[None, :] if bias_ptr is not None else 0.0
    y = activated(y, bias, bias_ptr is not None, META.ACTIVATION)
    at = y_ptr + tokens.to(tl.int64)[:, None] * n + rows[None, :]
    tl.store(at, y.to(DTYPE), mask=(tokens < t)[:, None] & (rows < n)[None, :])


@triton.jit
def _load_words(weight, chunk, first_n, n, META: tl.constexpr):
    """Chunks `chunk` ... `chunk + WARPS - 1` of the program's rows, (REPEATS * WARPS * 8, 16) int32, of each plane."""
    REPEATS: tl.constexpr = META.REPEATS
    WARPS: tl.constexpr = META.WARPS
    PLANES: tl.constexpr = 3 if META.LAYOUT == WORDS3 else 1
    index = tl.arange(0, REPEATS * WARPS * ROWS)
    row = index // (WARPS * ROWS) * ROWS + index % ROWS
    word = ((chunk + index // ROWS % WARPS) * (CHUNK // 4))[:, None] + tl.arange(0, CHUNK // 4)[None, :]
    # The compiler sees that rows and planes start on 16 bytes.
    row_words, width = weight.pitch * 4, weight.pitch // PLANES * 4
    inside = (first_n + row < n)[:, None] & (word < width)
    at = weight.codes + first_n.to(tl.int64) * row_words + (row * row_words)[:, None] + word
    words = ()
    for plane in tl.static_range(PLANES):
        words += (tl.load(at + plane * width, mask=inside, other=0),)
    return words


@triton.jit
def _load_x(x_ptr, chunk, offset, place, META: tl.constexpr, TURNS: tl.constexpr = 1, turn: tl.constexpr = 0):
    """Activations that meet one part of the weights (two, in words of 3 bits and not float32), 16 bytes a load.

    With TURNS = 2, only lanes c = 2 * turn and c = 2 * turn + 1 load, the others hold zeros.

    Returns:
        (steps * high * WARPS * 8, 4 * v): lane c = 0 ... 3 holds v neighbours of each step. (high, 8) is the token; of float32,
        high is the token and the eight rows of a load have copies.
    """
    LAYOUT: tl.constexpr = META.LAYOUT
    BLOCK_T: tl.constexpr = META.BLOCK_T
    WARPS: tl.constexpr = META.WARPS
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    first_t, _, t, _, k = place
    V: tl.constexpr = 4 if EXACT else 8
    HIGH: tl.constexpr = BLOCK_T if EXACT else BLOCK_T // ROWS
    STEPS: tl.constexpr = 4 if LAYOUT == WORDS3 else RUN // V
    step_k: tl.constexpr = 32 if LAYOUT == WORDS3 else V
    lane_k: tl.constexpr = 128 if LAYOUT == WORDS3 else RUN
    index, column = tl.arange(0, STEPS * HIGH * WARPS * ROWS), tl.arange(0, LANES * V)
    high = index // (ROWS * WARPS) % HIGH
    token = first_t + (high if EXACT else high * ROWS + index % ROWS)
    first_k = (
        (chunk + index // ROWS % WARPS) * (CHUNK * parts_of(LAYOUT)) + offset + index // (ROWS * WARPS * HIGH) * step_k
    )
    at = first_k[:, None] + (column // V * lane_k + column % V)[None, :]
    inside = (token < t)[:, None] & (at < k)
    if TURNS == 2:
        inside = inside & (column // (2 * V) == turn)[None, :]
    return tl.load(x_ptr + token[:, None] * k + at, mask=inside, other=0.0)


@triton.jit
def _add_mma(acc, weights, x_ptr, scale_ptr, chunk, place, META: tl.constexpr):
    """acc (WARPS, rows, tokens) and the products of a chunk."""
    LAYOUT: tl.constexpr = META.LAYOUT
    GROUP: tl.constexpr = META.GROUP
    BLOCK_T: tl.constexpr = META.BLOCK_T
    REPEATS: tl.constexpr = META.REPEATS
    WARPS: tl.constexpr = META.WARPS
    PRMT: tl.constexpr = META.PRMT
    HIGH: tl.constexpr = BLOCK_T // ROWS
    # Where two groups of 32 input channels meet in a part, they take turns: x is zero in the other's lanes.
    TURNS: tl.constexpr = 2 if GROUP % 64 else 1
    if LAYOUT == WORDS3:
        for plane in tl.static_range(4):
            x = _load_x(x_ptr, chunk, 8 * plane, place, META)
            x = x.reshape(2, 2, HIGH, WARPS, ROWS, LANES, 2, 2, 2).permute(3, 0, 5, 8, 2, 4, 1, 7, 6)
            low, high = tl.split(x.reshape(WARPS, RUN, BLOCK_T, 2, 2, 2))
            acc = _add_part(acc, weights, 2 * plane, low, REPEATS, WARPS, PRMT)
            acc = _add_part(acc, weights, 2 * plane + 1, high, REPEATS, WARPS, PRMT)
    else:
        for part in tl.static_range(parts_of(LAYOUT)):
            for turn in tl.static_range(TURNS):
                x = _load_x(x_ptr, chunk, CHUNK * part, place, META, TURNS, turn)
                x = x.reshape(2, HIGH, WARPS, ROWS, LANES, 2, 2, 2).permute(2, 0, 4, 7, 1, 3, 5, 6)
                x = x.reshape(WARPS, RUN, BLOCK_T, 2, 2)
                if GROUP:
                    scales = _row_scales(scale_ptr, chunk, CHUNK * part + 32 * turn, place, GROUP, REPEATS, WARPS)
                    acc += _add_part(tl.zeros_like(acc), weights, part, x, REPEATS, WARPS, PRMT) * scales
                else:
                    acc = _add_part(acc, weights, part, x, REPEATS, WARPS, PRMT)
    return acc


@triton.jit
def _add_part(acc, weights, part: tl.constexpr, x, REPEATS: tl.constexpr, WARPS: tl.constexpr, PRMT: tl.constexpr):
    """acc and the products of the four tensors of a part with x (WARPS, 16, tokens, 2, 2)."""
    if not PRMT:  # Triton's interpreter multiplies bfloat16 bits as integers
        x = x.to(tl.float32)
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    acc = tl.dot(_operand(weights[4 * part], x0, REPEATS, WARPS), x0, acc)
    acc = tl.dot(_operand(weights[4 * part + 1], x1, REPEATS, WARPS), x1, acc)
    acc = tl.dot(_operand(weights[4 * part + 2], x2, REPEATS, WARPS), x2, acc)
    return tl.dot(_operand(weights[4 * part + 3], x3, REPEATS, WARPS), x3, acc)


@triton.jit
def _operand(weights, x, REPEATS: tl.constexpr, WARPS: tl.constexpr):
    """Weights as they lie, (REPEATS * WARPS * 8, 16), to (WARPS, rows, 16) in the order of the registers: no value moves."""
    weights = weights.reshape(REPEATS, WARPS, ROWS, LANES, 2, 2).permute(1, 0, 2, 4, 3, 5)
    return weights.reshape(WARPS, REPEATS * ROWS, RUN).to(x.dtype)


@triton.jit
def _row_scales(scale_ptr, chunk, offset, place, GROUP: tl.constexpr, REPEATS: tl.constexpr, WARPS: tl.constexpr):
    """Scales (WARPS, rows, 1) float32 of the groups that hold input channel `offset` of each warp's chunk."""
    _, first_n, _, n, k = place
    first_k = (chunk + tl.arange(0, WARPS)) * (2 * CHUNK) + offset
    rows = first_n + tl.arange(0, REPEATS * ROWS)
    at = rows.to(tl.int64)[None, :] * (k // GROUP) + (first_k // GROUP)[:, None]
    inside = (first_k < k)[:, None] & (rows < n)[None, :]
    return tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)[:, :, None]


@triton.jit
def _add_float32(acc, weights, x_ptr, scale_ptr, chunk, place, META: tl.constexpr):
    """acc (tokens, REPEATS, WARPS * 8, 4) and the products of a chunk, each lane's summed up first."""
    LAYOUT: tl.constexpr = META.LAYOUT
    GROUP: tl.constexpr = META.GROUP
    BLOCK_T: tl.constexpr = META.BLOCK_T
    REPEATS: tl.constexpr = META.REPEATS
    WARPS: tl.constexpr = META.WARPS
    for part in tl.static_range(parts_of(LAYOUT)):
        x = _load_x(x_ptr, chunk, (4 if LAYOUT == WORDS3 else CHUNK) * part, place, META)
        x = x.reshape(4, BLOCK_T, WARPS * ROWS, LANES, 2, 2).permute(1, 2, 3, 0, 4, 5)
        even, odd = tl.split(x.reshape(BLOCK_T, 1, WARPS * ROWS, LANES, 4, 2, 2))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        products = _lane_sums(weights[4 * part], x0, REPEATS, WARPS) + _lane_sums(
            weights[4 * part + 1], x1, REPEATS, WARPS
        )
        products += _lane_sums(weights[4 * part + 2], x2, REPEATS, WARPS)
        products += _lane_sums(weights[4 * part + 3], x3, REPEATS, WARPS)
        if GROUP:
            products *= _lane_scales(scale_ptr, chunk, CHUNK * part, place, GROUP, REPEATS, WARPS)
        acc += products
    return acc


@triton.jit
def _lane_sums(weights, x, REPEATS: tl.constexpr, WARPS: tl.constexpr):
    """Sums (tokens, REPEATS, WARPS * 8, 4) of each lane's four products of x (tokens, 1, WARPS * 8, 4, 4)."""
    return tl.sum(weights.reshape(1, REPEATS, WARPS * ROWS, LANES, 4) * x, axis=4)


@triton.jit
def _lane_scales(scale_ptr, chunk, offset, place, GROUP: tl.constexpr, REPEATS: tl.constexpr, WARPS: tl.constexpr):
    """Scales (1, REPEATS, WARPS * 8, 4) float32 of the groups that hold each lane's input channels."""
    _, first_n, _, n, k = place
    index = tl.arange(0, REPEATS * WARPS * ROWS)
    row = first_n + index // (WARPS * ROWS) * ROWS + index % ROWS
    first_k = ((chunk + index // ROWS % WARPS) * (2 * CHUNK) + offset)[:, None] + (tl.arange(0, LANES) * RUN)[None, :]
    at = row.to(tl.int64)[:, None] * (k // GROUP) + first_k // GROUP
    scale = tl.load(scale_ptr + at, mask=(first_k < k) & (row < n)[:, None], other=0.0)
    return scale.to(tl.float32).reshape(1, REPEATS, WARPS * ROWS, LANES)


@triton.jit
def _outliers(x_ptr, outliers, tokens, rows, shape, WIDTH: tl.constexpr):
    """x @ outliers^T (tokens, rows) float32, WIDTH outliers of each row at a time.

    In float64, where a product of two float32 is exact and the sum in effect too: no order of adding shows in the result.
    """
    rowptr, col, values = outliers
    t, n, k = shape
    start = tl.load(rowptr + rows, mask=rows < n, other=0)
    stop = tl.load(rowptr + rows + 1, mask=rows < n, other=0)
    total = tl.zeros((tokens.shape[0], rows.shape[0]), tl.float64)
    for first in tl.range(0, tl.max(stop - start), WIDTH):
        index = start[:, None] + first + tl.arange(0, WIDTH)[None, :]
        mine = index < stop[:, None]
        column = tl.load(col + index, mask=mine, other=0).to(tl.int32)
        delta = tl.load(values + index, mask=mine, other=0.0).to(tl.float64)
        at = x_ptr + tokens[:, None, None] * k + column[None, :, :]
        x = tl.load(at, mask=(tokens < t)[:, None, None] & mine[None, :, :], other=0.0)
        total += tl.sum(x.to(tl.float64) * delta[None, :, :], axis=2)
    return total.to(tl.float32)
