"""Outliers of a dictionary weight, added exactly in the epilogue: each is float32, so no int8 operand can hold it.

A row n of the weight has a few outliers (0.1 to 0.8 % of its k weights), compressed by rows: its sum over tokens t gains
sum_j q[t, col_j] * delta_j. Before the scale of the token is multiplied in, a tile goes through its rows' outliers in rounds,
one of each row at a time, in order, with fused multiply-adds: so a token's bits depend neither on the tile nor on the batch.

What a round costs is getting 128 columns of q. As q lies, (t, k), a column of 128 tokens is 128 sectors of 32 bytes: for 768
rows of 768 with 0.1 % outliers and 4,096 tokens 77 MB through the L2 cache, three times what the product reads; with 0.8 %,
twenty times. So for tiles of 128 tokens `columns_kernel` first writes q once more, column by column (2 t k bytes, 6 MB), and
such a column is four sectors. It puts the 64 tokens of a block in the order in which the matrix unit's accumulators hold
them: 16 bytes of a column, one load of a thread, meet 16 accumulators of the same thread, and no float passes through shared
memory. Smaller tiles, of few tokens, read q as it lies.

A round of a 128 x 128 tile is 270 instructions of each of eight warps, 540 cycles on four schedulers: for an accumulator a
quarter of a logical operation, `prmt`, an addition and an FMA. There are as many rounds as the tile's richest row has
outliers: with 0.1 % about 4 for k = 768, beside a product of 3,072 cycles, and 9 for k = 3,072, beside 12,288. Schedulers are
idle for half of a product's cycles, so of the first some is seen and of the second little. (Compiled for sm_90, not run.)

Not taken: the outliers as a second product over the columns that have any. A tile of 128 rows has outliers in 13 % (of 0.1 %)
to 64 % of the columns, and a delta needs three int8 or bfloat16 digits, so that product would cost 0.4 to 2 times the first.
Not taken either: a kernel of its own that leaves t n float32 for the epilogue to add: 8 bytes a result, where int8 results
have one.
"""

import triton
import triton.language as tl

# Tokens of a block of `columns_kernel`'s result.
TURN = tl.constexpr(64)


@triton.jit
def columns_kernel(q, columns, t, k, BLOCK_K: tl.constexpr):
    """q (t, k) int8 to columns (blocks, k, 64), zeros beyond the last token. Grid: (blocks, tiles of columns).

    Token 8 i + 2 c + b of a block stands at place 16 c + 2 i + b: accumulators of thread c of four, one after the other.
    """
    block = tl.program_id(0)
    tokens, column = block * TURN + tl.arange(0, TURN), tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (tokens < t)[:, None] & (column < k)[None, :]
    codes = tl.load(q + tokens.to(tl.int64)[:, None] * k + column[None, :], mask=inside, other=0)
    codes = codes.reshape(8, 4, 2, BLOCK_K).permute(3, 1, 0, 2).reshape(BLOCK_K, TURN)
    at = columns + block.to(tl.int64) * k * TURN + (column * TURN)[:, None] + tl.arange(0, TURN)[None, :]
    tl.store(at, codes, mask=(column < k)[:, None])


@triton.jit
def add_outliers(value, outliers, q, place, k):
    """value (BLOCK_N, BLOCK_T) float32 plus its rows' outliers times q (t, k) int8, read as it lies.

    Args:
        outliers: `Outliers`.
        place: (first token, first channel, t, n).
    """
    BLOCK_N: tl.constexpr = value.shape[0]
    BLOCK_T: tl.constexpr = value.shape[1]
    rowptr, col, delta = outliers
    first_t, first_n, t, n = place
    tokens = first_t + tl.arange(0, BLOCK_T)
    start, count = _outliers_of(rowptr, first_n + tl.arange(0, BLOCK_N), n)
    at = q + tokens.to(tl.int64)[None, :] * k
    # Each round waits for memory twice, so several are under way, as many as registers have room for.
    ROUNDS: tl.constexpr = 4 if BLOCK_T <= 32 else 2
    for j in tl.range(0, tl.max(count), loop_unroll_factor=ROUNDS):
        column = tl.load(col + start + j, mask=j < count, other=0).to(tl.int32)[:, None]
        weight = tl.load(delta + start + j, mask=j < count, other=0.0)[:, None]
        codes = tl.load(at + column, mask=(j < count)[:, None] & (tokens < t)[None, :], other=0)
        value = tl.fma(weight, codes.to(tl.float32), value)
    return value


@triton.jit
def add_outliers_turned(value, outliers, columns, place, k, WARPS: tl.constexpr, PRMT: tl.constexpr):
    """The same for 128 tokens from `columns_kernel`'s result, WARPS being the program's."""
    BLOCK_N: tl.constexpr = value.shape[0]
    rowptr, col, delta = outliers
    first_t, first_n, _, n = place
    rows = tl.arange(0, BLOCK_N)
    # A thread's loads are laid over rows by the compiler's rule for copies, its accumulators by the matrix unit's: the
    # rows are loaded in such an order that both give each thread the same ones.
    lane, warp, low, high = rows % 8, rows // 8 % WARPS, rows // (8 * WARPS) % 2, rows // (16 * WARPS)
    loaded_start, loaded_count = _outliers_of(rowptr, first_n + ((high * WARPS + warp) * 2 + low) * 8 + lane, n)
    start, count = _outliers_of(rowptr, first_n + rows, n)
    first = columns + first_t.to(tl.int64) * k + tl.arange(0, TURN)[None, :]
    second = first + tl.cast(k, tl.int64) * TURN
    left, right = tl.split(value.reshape(BLOCK_N, 2, TURN).permute(0, 2, 1))
    for j in tl.range(0, tl.max(count)):
        inside = j < loaded_count
        column = tl.load(col + loaded_start + j, mask=inside, other=0).to(tl.int32)[:, None] * TURN
        weight = tl.load(delta + start + j, mask=j < count, other=0.0)[:, None]
        left = tl.fma(weight, _unfold(tl.load(first + column, mask=inside[:, None], other=0), WARPS, PRMT), left)
        right = tl.fma(weight, _unfold(tl.load(second + column, mask=inside[:, None], other=0), WARPS, PRMT), right)
    return tl.join(left, right).permute(0, 2, 1).reshape(BLOCK_N, 2 * TURN)


@triton.jit
def _outliers_of(rowptr, rows, n):
    """Where the outliers of each row start, and how many there are: none of rows beyond the last."""
    start = tl.load(rowptr + tl.minimum(rows, n - 1))
    return start, tl.where(rows < n, tl.load(rowptr + tl.minimum(rows, n - 1) + 1) - start, 0)


@triton.jit
def _unfold(codes, WARPS: tl.constexpr, PRMT: tl.constexpr):
    """Codes (n, 64) in loaded order to float32 in the order of rows and tokens: a renaming of registers."""
    n: tl.constexpr = codes.shape[0]
    values = _to_float(codes, PRMT).reshape(n // (16 * WARPS), 2, WARPS, 8, 4, 8, 2)
    return values.permute(0, 2, 1, 3, 5, 4, 6).reshape(n, TURN)


@triton.jit
def _to_float(codes, PRMT: tl.constexpr):
    """int8 to float32: 2**23 with byte u as its last bits is 2**23 + u. Conversions run at a fraction of these' rate."""
    if PRMT:
        values = tl.inline_asm_elementwise(
            """{
            .reg .b32 u;
            xor.b32 u, $4, 0x80808080;
            prmt.b32 $0, u, 0x4B000000, 0x7440;
            prmt.b32 $1, u, 0x4B000000, 0x7441;
            prmt.b32 $2, u, 0x4B000000, 0x7442;
            prmt.b32 $3, u, 0x4B000000, 0x7443;
            sub.f32 $0, $0, 0f4B000080;
            sub.f32 $1, $1, 0f4B000080;
            sub.f32 $2, $2, 0f4B000080;
            sub.f32 $3, $3, 0f4B000080;
            }""",
            "=&r,=&r,=&r,=&r,r", [codes], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        values = codes.to(tl.float32)
    return values
