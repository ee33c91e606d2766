"""What products of packed weights with int8 tokens share: which tile a program computes, its operands, where results go.

The matrix unit computes Y^T = W X^T: only its first operand can come from registers, and that is where weights are expanded.
Tokens go through shared memory, K-major as they lie. A tile has BLOCK_N output channels and BLOCK_T tokens.

A program computes one tile. Triton waits for the matrix unit before it lets registers change that are its operand, so a
program expands and multiplies in turn; persistent programs would not change that. Instead two of them share a multiprocessor
(16 warps, 128 registers a thread) and one's products fill the time in which the other expands weights or ends its tile.
For that, issuing must take less time than multiplying: 128 inputs of a 128 x 128 tile are 512 cycles of an H100's matrix
unit (4,096 multiply-adds a cycle) and, for its eight warps on four schedulers, so many cycles of issuing the whole loop
(Triton 3.6.0, compiled for sm_90, not run):

    3-bit dictionary 242, 4-bit dictionary 372, int4 in groups of 128: 338, of 64: 368, of 32: 404
"""

import triton
import triton.language as tl

from qbert.kernels.expand import BLOCK, HALF


@triton.jit
def tile_of(program, t, n, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First token and first channel of a program's tile: GROUP tiles of tokens take all channels in turn, for the L2 cache."""
    tiles_t, tiles_n = tl.cdiv(t, BLOCK_T), tl.cdiv(n, BLOCK_N)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_t - first, GROUP)
    within = program % (GROUP * tiles_n)
    return (first + within % height) * BLOCK_T, within // height * BLOCK_N


@triton.jit
def blocks_of(split, k, SPLIT_K: tl.constexpr):
    """First block along k of a program's share, and the block after its last."""
    blocks = tl.cdiv(k, BLOCK)
    share = tl.cdiv(blocks, SPLIT_K)
    return tl.minimum(split * share, blocks), tl.minimum((split + 1) * share, blocks)


@triton.jit
def load_codes(qdata, block, first_n, n, k, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """Packed weights (BLOCK_N, 64) uint8 of a block; rows beyond the last are zeros."""
    if TMA:
        codes = qdata.load([first_n, block * HALF])
    else:
        rows, columns = first_n + tl.arange(0, BLOCK_N), tl.arange(0, HALF) + block * HALF
        at = qdata + rows.to(tl.int64)[:, None] * (tl.cdiv(k, BLOCK) * HALF) + columns[None, :]
        codes = tl.load(at, mask=(rows < n)[:, None], other=0)
    return codes


@triton.jit
def load_tokens(q, block, first_t, t, k, BLOCK_T: tl.constexpr, TMA: tl.constexpr):
    """Codes (BLOCK_T, 128) int8 of a block of input channels, zeros beyond the last token and channel."""
    if TMA:
        codes = q.load([first_t, block * BLOCK])
    else:
        tokens, columns = first_t + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK) + block * BLOCK
        inside = (tokens < t)[:, None] & (columns < k)[None, :]
        codes = tl.load(q + tokens.to(tl.int64)[:, None] * k + columns[None, :], mask=inside, other=0)
    return codes


@triton.jit
def store(y, tile, place):
    """A tile (BLOCK_N, BLOCK_T) of Y^T to y (t, n): it turns in shared memory, in the result's type.

    Args:
        place: (first token, first channel, t, n).
    """
    first_t, first_n, t, n = place
    tokens, rows = first_t + tl.arange(0, tile.shape[1]), first_n + tl.arange(0, tile.shape[0])
    at = y + tokens.to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(at, tile, mask=(rows < n)[:, None] & (tokens < t)[None, :])


@triton.jit
def total(sums, place, META: tl.constexpr):
    """A tile (BLOCK_N, BLOCK_T) of the transposed sum of SPLIT_K partial sums (SPLIT_K, t, n) int32; `place` as in `store`."""
    SPLIT_K: tl.constexpr = META.SPLIT_K
    first_t, first_n, t, n = place
    tokens, rows = first_t + tl.arange(0, META.BLOCK_T), first_n + tl.arange(0, META.BLOCK_N)
    at = sums + tokens.to(tl.int64)[None, :] * n + rows[:, None]
    inside = (rows < n)[:, None] & (tokens < t)[None, :]
    acc = tl.load(at, mask=inside, other=0)
    for _ in tl.static_range(1, SPLIT_K):
        at += tl.cast(t, tl.int64) * n
        acc += tl.load(at, mask=inside, other=0)
    return acc
