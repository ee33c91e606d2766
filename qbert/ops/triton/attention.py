"""L5. Launcher of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.ops import checks
from qbert.ops.triton.launch import require_operands, target_for
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
    operation = "attention_int8_per_token" if per_token else "attention_int8"
    return select_tile(operation, average_length, 0, block_d(head_dim), target)


def block_d(head_dim: int) -> int:
    return max(_MIN_BLOCK_D, 1 << (head_dim - 1).bit_length())


def max_registers(head_dim: int, per_token: bool, warps: int, int8_out: bool) -> int | None:
    """Of a thread: 16 warps shall share a multiprocessor, or 12 where that would spill. The compiler alone takes a few more."""
    if head_dim > 64:
        return None
    return 168 if per_token or (warps == 4 and not int8_out) else 128


def attention_int8(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out_dtype: torch.dtype
) -> Tensor:
    """`attention_int8` by `kernels/attention.py`. Values of `cu_seqlens` are not looked at: that would wait for the GPU.

    Returns:
        (t, num_heads * head_dim). What a token in no sequence gets is left open, and tokens of a sequence that is longer than
        int32 sums allow (66,311) are NaN. `NotImplemented` for heads wider than 128.
    """
    checks.out_type(out_dtype)
    return _attention(qkv, scales, cu_seqlens, num_heads, softmax_scale, out_dtype, 1.0)


def attention_int8_requant(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out_scale: float
) -> Tensor:
    """`attention_int8_requant`, likewise; NaN becomes code 0."""
    return _attention(qkv, scales, cu_seqlens, num_heads, softmax_scale, torch.int8, 1.0 / out_scale)


def _attention(
    qkv: Tensor, scales: Tensor, cu_seqlens: Tensor, num_heads: int, softmax_scale: float, out_dtype: torch.dtype,
    inverse_out_scale: float,
) -> Tensor:  # fmt: skip
    from qbert.kernels.attention import attention_int8_kernel

    checks.attention(qkv, scales, cu_seqlens, num_heads)
    if not (0 < softmax_scale < math.inf):
        raise QBertError(f"softmax_scale is {softmax_scale}; allowed: finite and above 0")
    require_operands("attention_int8", qkv.device, qkv=qkv, scales=scales, cu_seqlens=cu_seqlens)
    t, width, sequences = qkv.shape[0], qkv.shape[1] // 3, cu_seqlens.shape[0] - 1
    head_dim, per_token = width // num_heads, scales.dim() == 2
    if head_dim > MAX_HEAD_DIM:
        return NotImplemented
    out = qkv.new_empty(t, width, dtype=out_dtype)
    if out.numel() == 0:
        return out
    if sequences == 0:
        raise QBertError(f"cu_seqlens must ascend from 0 to {t}, got a single bound: no sequence")
    tile = attention_tile(head_dim, -(-t // sequences), per_token, target_for(qkv))
    registers = max_registers(head_dim, per_token, tile.warps, out_dtype == torch.int8)
    tiles = t // tile.block_t + sequences
    columns = min(tiles, _MAX_GRID_Y)
    attention_int8_kernel[(num_heads, columns, -(-tiles // columns))](
        qkv, scales, cu_seqlens, out, t, sequences, num_heads, softmax_scale, inverse_out_scale, HEAD_DIM=head_dim,
        BLOCK_D=block_d(head_dim), BLOCK_Q=tile.block_t, PER_TOKEN=per_token, num_warps=tile.warps,
        num_stages=tile.stages, maxnreg=registers, enable_fp_fusion=False,
    )  # fmt: skip
    return out


KERNELS: dict[str, Callable[..., Any]] = {
    "attention_int8": attention_int8,
    "attention_int8_requant": attention_int8_requant,
}
