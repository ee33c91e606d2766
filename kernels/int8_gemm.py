"""W8A8 linear: y (t, n) = epilogue(q (t, k) int8 times weight (n, k) int8 transposed), int32 sums.

Both operands lie K-major, as the integer matrix units ask for. Three roads to the same sums, and one epilogue behind all of
them (`kernels.epilogue`), so a result has the same bits whatever the road and the tile:

    tma       many tokens: persistent programs, copies by descriptor (sm_90); k a multiple of 16
    few       few tokens: weight rows as the matrix unit's M, one narrow strip of them a program (sm_90); k a multiple of 16
    pointer   plain loads: any t, n and k, and GPUs without a copy engine

Arguments that are tuples: `qbert.ops.triton.arguments`.
"""

import triton
import triton.language as tl

from qbert.kernels.epilogue import finish, scaled


@triton.jit
def place(tile, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile: down GROUP rows before the next column, so that neighbours in time share L2 lines."""
    first = tile // (GROUP * columns) * GROUP
    height = max(min(rows - first, GROUP), 1)  # a loop that loads ahead asks for tiles beyond the last, too
    within = tile % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def vectors(end, token, channel, t, n):
    """The scales of tokens, the scales of channels, and their biases (of an `End` without them, anything of that shape)."""
    s = tl.load(end.s + token, mask=token < t, other=0.0)
    scale = tl.load(end.scale + channel, mask=channel < n, other=0.0)
    bias = tl.load(end.bias + channel, mask=channel < n, other=0.0) if end.bias is not None else scale
    return s, scale, bias


@triton.jit
def store_tile(out_desc, acc, end, place, SUBTILES: tl.constexpr, ACTIVATION: tl.constexpr):
    """Stores a tile in SUBTILES parts, one after the other through the same buffer: shared memory is for copies ahead.

    Args:
        end: `End`.
        place: (first token, first channel, t, n).
    """
    BLOCK_T: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    t0, n0, t, n = place
    if SUBTILES == 1:
        token, channel = t0 + tl.arange(0, BLOCK_T), n0 + tl.arange(0, BLOCK_N)
        s, scale, bias = vectors(end, token, channel, t, n)
        y = scaled(acc.to(tl.float32), s[:, None], scale[None, :], bias[None, :], end.bias is not None, ACTIVATION)
        out_desc.store([t0, n0], finish(y, end, out_desc.dtype))
    else:
        left, right = tl.split(acc.reshape(BLOCK_T, 2, BLOCK_N // 2).permute(0, 2, 1))
        store_tile(out_desc, left, end, place, SUBTILES // 2, ACTIVATION)
        store_tile(out_desc, right, end, (t0, n0 + BLOCK_N // 2, t, n), SUBTILES // 2, ACTIVATION)


@triton.jit(do_not_specialize=["t"])
def int8_gemm_tma(q_desc, w_desc, out_desc, end, t, sizes, META: tl.constexpr):
    """Persistent: each program takes every num_programs-th tile. Grid: up to one program a tile, k above 0.

    One loop over the k steps of all its tiles, so that the copies for the next tile are under way during the epilogue of this
    one: at k = 768 a tile has six steps, of which three are then in shared memory, or nearly, before it begins.

    Args:
        q_desc, w_desc: blocks (BLOCK_T, BLOCK_K) of q (t, k) and (BLOCK_N, BLOCK_K) of the weight (n, k padded to 16).
        out_desc: blocks (BLOCK_T, BLOCK_N / SUBTILES) of the result (t, n).
        end: `End`.
        sizes: (n, k).
        META: an `Int8Meta`.
    """
    BLOCK_T: tl.constexpr = META.BLOCK_T
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_K: tl.constexpr = META.BLOCK_K
    n, k = sizes
    rows, columns = tl.cdiv(t, BLOCK_T), tl.cdiv(n, BLOCK_N)
    steps = tl.cdiv(k, BLOCK_K)
    tiles_here = tl.cdiv(rows * columns - tl.program_id(0), tl.num_programs(0))
    tile = tl.program_id(0) - tl.num_programs(0)
    step = -1
    t0, n0 = 0, 0
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    for _ in range(tiles_here * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += tl.num_programs(0)
            row, column = place(tile, rows, columns, META.GROUP)
            t0, n0 = row * BLOCK_T, column * BLOCK_N
        q = q_desc.load([t0, step * BLOCK_K])
        w = w_desc.load([n0, step * BLOCK_K])
        acc = tl.dot(q, w.T, acc, out_dtype=tl.int32)
        if step == steps - 1:
            store_tile(out_desc, acc, end, (t0, n0, t, n), META.SUBTILES, META.ACTIVATION)
            acc = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)


@triton.jit(do_not_specialize=["t"])
def int8_gemm_few(q_desc, w_desc, out_ptr, end, t, sizes, META: tl.constexpr):
    """Yᵀ = W·Xᵀ for a strip of BLOCK_N weight rows. Grid: (strips, blocks of tokens).

    Bound by how many bytes of the weight are on their way, so there must be many programs: strips of 16 or 32 rows, by
    mma.sync, make as many as wgmma's 64 rows would with k split over two to four programs, and need no second phase. To split
    k takes a workspace of sums and counters that are zero at the start and belong to one launch alone: that is a memset before
    each launch, or sums that mix where two CUDA graphs which share the workspace replay at once.
    """
    BLOCK_T: tl.constexpr = META.BLOCK_T
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_K: tl.constexpr = META.BLOCK_K
    n, k = sizes
    n0, t0 = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_T
    token, channel = t0 + tl.arange(0, BLOCK_T), n0 + tl.arange(0, BLOCK_N)
    s, scale, bias = vectors(end, token, channel, t, n)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.int32)
    for k0 in range(0, k, BLOCK_K):
        w = w_desc.load([n0, k0])
        q = q_desc.load([t0, k0])
        acc = tl.dot(w, q.T, acc, out_dtype=tl.int32)
    y = scaled(acc.to(tl.float32), s[None, :], scale[:, None], bias[:, None], end.bias is not None, META.ACTIVATION)
    store(out_ptr, finish(y, end, out_ptr.dtype.element_ty).T, token, channel, t, n)


@triton.jit(do_not_specialize=["t"])
def int8_gemm_pointer(q_ptr, w_ptr, out_ptr, end, t, sizes, META: tl.constexpr):
    """One tile a program. Grid: (tiles,). sizes: (n, k, distance of the weight's rows)."""
    BLOCK_T: tl.constexpr = META.BLOCK_T
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_K: tl.constexpr = META.BLOCK_K
    n, k, w_stride = sizes
    row, column = place(tl.program_id(0), tl.cdiv(t, BLOCK_T), tl.cdiv(n, BLOCK_N), META.GROUP)
    token, channel = row * BLOCK_T + tl.arange(0, BLOCK_T), column * BLOCK_N + tl.arange(0, BLOCK_N)
    s, scale, bias = vectors(end, token, channel, t, n)
    # Rows beyond the last are read as the last, and not stored: no mask in the loop. Their offsets may pass 2**31.
    q_rows = q_ptr + tl.minimum(token, t - 1).to(tl.int64)[:, None] * k
    w_rows = w_ptr + tl.minimum(channel, n - 1).to(tl.int64)[:, None] * w_stride
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    for k0 in range(0, k, BLOCK_K):
        inner = k0 + tl.arange(0, BLOCK_K)[None, :]
        if META.EVEN_K:
            q, w = tl.load(q_rows + inner), tl.load(w_rows + inner)
        else:
            q = tl.load(q_rows + inner, mask=inner < k, other=0)
            w = tl.load(w_rows + inner, mask=inner < k, other=0)
        acc = tl.dot(q, w.T, acc, out_dtype=tl.int32)
    y = scaled(acc.to(tl.float32), s[:, None], scale[None, :], bias[None, :], end.bias is not None, META.ACTIVATION)
    store(out_ptr, finish(y, end, out_ptr.dtype.element_ty), token, channel, t, n)


@triton.jit
def store(out_ptr, y, token, channel, t, n):
    """y (tokens, channels) to a contiguous (t, n); what lies outside is left out."""
    offsets = token.to(tl.int64)[:, None] * n + channel[None, :]
    tl.store(out_ptr + offsets, y, mask=(token < t)[:, None] & (channel < n)[None, :])
