"""Launcher of attention, `kernels/attention.py`, and of what rounds floats for it, `kernels/round_heads.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.ops import checks
from qbert.ops.abi import inverse_scale
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import Attention
from qbert.ops.triton.arguments import AttentionMeta, Distances, Heads, HeadsMeta
from qbert.ops.triton.launch import INTERPRETED, target_for
from qbert.ops.triton.rows import row_options
from qbert.target import Target
from qbert.tiles import TileConfig, select_tile

MAX_HEAD_DIM = 128
_MIN_BLOCK_D = 32  # the least K of an int8 product on Hopper's matrix units
_MAX_GRID_Y = 65_535
_MAX_WINDOW = 2**30 - 1  # twice that and one is an int32; no sequence is longer
_MIN_HALF = 16  # channels of half a head: fewer would leave a warp's lanes idle
_PROGRAM_HEADS = 16  # that a program rounds: of 64 channels they are the elements that one warp holds
_PTX = torch.version.hip is None and not INTERPRETED
PLAIN = Distances(None, None, None, None)


def attention_tile(head_dim: int, average_length: int, narrow: bool, target: Target) -> TileConfig:
    """The tile of attention: `block_t` queries and `block_n` keys of a head of up to `block_k` channels.

    Args:
        average_length: tokens a sequence; the host does not know how long each is.
        narrow: whether each token has scales of its own, or there are a window or biases, which take registers.
    """
    key = "attention_int8_per_token" if narrow else "attention_int8"
    return select_tile(key, average_length, 0, block_d(head_dim), target)


def block_d(head_dim: int) -> int:
    return max(_MIN_BLOCK_D, 1 << (head_dim - 1).bit_length())


def heads_meta(heads: int, head_dim: int) -> HeadsMeta:
    """How heads are rounded: some of a token's a program."""
    half = max(_MIN_HALF, 1 << ((head_dim + 1) // 2 - 1).bit_length())
    return HeadsMeta(head_dim, half, min(_PROGRAM_HEADS, 1 << (heads - 1).bit_length()))


def max_registers(
    head_dim: int, per_token: bool, warps: int, int8_out: bool, distances: Distances = PLAIN
) -> int | None:
    """Of a thread: 16 warps shall share a multiprocessor, or 12 where that would spill. The compiler alone takes a few more.
    None where 12 would spill, too: 8 always fit."""
    if head_dim > 64 or (per_token and distances.bias is not None):
        return None
    return 168 if is_narrow(per_token, distances) or (warps == 4 and not int8_out) else 128


def is_narrow(per_token: bool, distances: Distances) -> bool:
    """See `attention_tile`."""
    return per_token or distances.window is not None or distances.bias is not None


def attention(a: Attention) -> Tensor:
    """Values of `cu_seqlens` are not looked at: that would wait for the GPU. What a token in no sequence gets is left open. A
    sequence is NaN that is longer than there are rotations, or whose queries see more keys than int32 sums allow (66,311).
    """
    from qbert.kernels.attention import attention_int8_kernel

    operands = {"qkv": a.qkv, "scales": a.scales, "cu_seqlens": a.cu_seqlens, "bias": a.bias, "rotary": a.rotary}
    require_operands("attention", a.qkv.device, **operands)
    t, sequences = a.qkv.shape[0], a.cu_seqlens.shape[0] - 1
    out = a.qkv.new_empty(t, a.heads * a.head_dim, dtype=checks.out_type(a.out))
    if out.numel() == 0:
        return out
    if sequences == 0:
        raise QBertError(f"cu_seqlens must ascend from 0 to {t}, got a single bound: no sequence")
    target = target_for(a.qkv)
    codes, scales = codes_and_scales(a)
    distances, per_token = _distances(a), scales.dim() > 1
    tile = attention_tile(a.head_dim, -(-t // sequences), is_narrow(per_token, distances), target)
    registers = max_registers(a.head_dim, per_token, tile.warps, out.dtype == torch.int8, distances)
    tiles = t // tile.block_t + sequences
    columns = min(tiles, _MAX_GRID_Y)
    meta = AttentionMeta(a.head_dim, block_d(a.head_dim), tile.block_t, per_token, scales.dim() == 3, _PTX)
    attention_int8_kernel[(a.heads, columns, -(-tiles // columns))](
        (codes, scales), a.cu_seqlens, out, t, sequences, Heads(a.heads, a.softmax_scale, inverse_scale(a.out)),
        distances, META=meta, num_warps=tile.warps, num_stages=tile.stages, maxnreg=registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def codes_and_scales(a: Attention) -> tuple[Tensor, Tensor]:
    """Int8 queries, keys and values, and their scales: (3,), (t, 3), or (heads, t, 3) where floats got them here."""
    from qbert.kernels.round_heads import round_heads_kernel

    if a.qkv.dtype == torch.int8:
        assert a.scales is not None
        return a.qkv, a.scales
    t, sequences = a.qkv.shape[0], a.cu_seqlens.shape[0] - 1
    codes = torch.empty_like(a.qkv, dtype=torch.int8)
    given, found = a.scales, None
    if given is None:
        found = a.qkv.new_empty(a.heads, t, 3, dtype=torch.float32)
    rotation = None if a.rotary is None else (a.rotary, a.rotary.shape[0])
    meta = heads_meta(a.heads, a.head_dim)
    round_heads_kernel[(t, 3, -(-a.heads // meta.HEADS))](
        a.qkv, given, rotation, a.cu_seqlens, (codes, found), t, sequences, a.heads, META=meta,
        **row_options(2 * meta.HALF * meta.HEADS),
    )  # fmt: skip
    scales = found if given is None else given
    assert scales is not None
    return codes, scales


def _distances(a: Attention) -> Distances:
    window = None if a.window is None else min(a.window, _MAX_WINDOW)
    reach = None if a.bias is None else a.bias.shape[1] // 2
    return Distances(window, a.bias, reach, None if a.rotary is None else a.rotary.shape[0])


def obstacle(problem: Problem) -> str | None:
    """Why not this problem on a GPU that the kernels run on; None where they compute it."""
    if problem.pattern.first:
        return "queries of first tokens alone; it takes one of every token"
    return f"heads of {problem.k}; it takes up to {MAX_HEAD_DIM}" if problem.k > MAX_HEAD_DIM else None
