"""Launcher of attention, `kernels/attention.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.ops import checks
from qbert.ops.abi import inverse_scale
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import Attention
from qbert.ops.triton.launch import target_for
from qbert.target import Target
from qbert.tiles import TileConfig, select_tile

MAX_HEAD_DIM = 128
_MIN_BLOCK_D = 32  # the least K of an int8 product on Hopper's matrix units
_MAX_GRID_Y = 65_535


def attention_tile(head_dim: int, average_length: int, per_token: bool, target: Target) -> TileConfig:
    """The tile of attention: `block_t` queries and `block_n` keys of a head of up to `block_k` channels.

    Args:
        average_length: tokens a sequence; the host does not know how long each is.
        per_token: whether each token has scales of its own, which take registers.
    """
    key = "attention_int8_per_token" if per_token else "attention_int8"
    return select_tile(key, average_length, 0, block_d(head_dim), target)


def block_d(head_dim: int) -> int:
    return max(_MIN_BLOCK_D, 1 << (head_dim - 1).bit_length())


def max_registers(head_dim: int, per_token: bool, warps: int, int8_out: bool) -> int | None:
    """Of a thread: 16 warps shall share a multiprocessor, or 12 where that would spill. The compiler alone takes a few more."""
    if head_dim > 64:
        return None
    return 168 if per_token or (warps == 4 and not int8_out) else 128


def attention(a: Attention) -> Tensor:
    """Values of `cu_seqlens` are not looked at: that would wait for the GPU. What a token in no sequence gets is left open, and
    tokens of a sequence that is longer than int32 sums allow (66,311) are NaN."""
    from qbert.kernels.attention import attention_int8_kernel
    from qbert.ops.triton.arguments import AttentionMeta, Heads

    qkv, scales, cu_seqlens = a.qkv, a.scales, a.cu_seqlens
    assert scales is not None
    require_operands("attention", qkv.device, qkv=qkv, scales=scales, cu_seqlens=cu_seqlens)
    t, sequences = qkv.shape[0], cu_seqlens.shape[0] - 1
    head_dim, per_token = a.head_dim, scales.dim() == 2
    out = qkv.new_empty(t, a.heads * head_dim, dtype=checks.out_type(a.out))
    if out.numel() == 0:
        return out
    if sequences == 0:
        raise QBertError(f"cu_seqlens must ascend from 0 to {t}, got a single bound: no sequence")
    tile = attention_tile(head_dim, -(-t // sequences), per_token, target_for(qkv))
    registers = max_registers(head_dim, per_token, tile.warps, out.dtype == torch.int8)
    tiles = t // tile.block_t + sequences
    columns = min(tiles, _MAX_GRID_Y)
    attention_int8_kernel[(a.heads, columns, -(-tiles // columns))](
        (qkv, scales), cu_seqlens, out, t, sequences, Heads(a.heads, a.softmax_scale, inverse_scale(a.out)),
        META=AttentionMeta(head_dim, block_d(head_dim), tile.block_t, per_token), num_warps=tile.warps,
        num_stages=tile.stages, maxnreg=registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def obstacle(problem: Problem) -> str | None:
    """Why not this problem on a GPU that the kernels run on; None where they compute it."""
    if problem.k > MAX_HEAD_DIM:
        return f"heads of {problem.k}; it takes up to {MAX_HEAD_DIM}"
    missing = [name for name, asked in problem.pattern._asdict().items() if asked]
    return f"attention with {' and '.join(missing)}; it takes int8 codes and whole sequences" if missing else None
