"""L5. Launchers of the row kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert import reference
from qbert.formats import INT8
from qbert.ops import checks

_MIN_BLOCK = 32  # one element a thread of a warp


def triton_quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_per_token` by `kernels/quantize_per_token.py`; on CPU tensors only in Triton's interpreter."""
    from qbert.kernels.quantize_per_token import quantize_per_token_kernel

    checks.activations(x)
    t, k = x.shape
    codes = x.new_empty(t, k, dtype=torch.int8)
    scale = x.new_empty(t, dtype=torch.float32)
    if t and k:
        x = x if x.stride(1) == 1 else x.contiguous()
        block = max(_MIN_BLOCK, 1 << (k - 1).bit_length())
        warps = _row_warps(block)
        # Without fusion: a fused multiply-add rounds once where the reference rounds twice.
        quantize_per_token_kernel[(t,)](
            x, codes, scale, k, x.stride(0), BLOCK_K=block, num_warps=warps, enable_fp_fusion=False
        )
    return codes, scale.fill_(reference.MIN_ABSMAX / INT8.qmax) if k == 0 else scale


def _row_warps(block: int) -> int:
    """Warps for a row kernel: eight to sixteen elements a thread, which are two 16-byte loads of a half type."""
    return min(16, max(1, block // 512))


KERNELS: dict[str, Callable[..., Any]] = {"quantize_per_token": triton_quantize_per_token}
