"""L5. Parts of an encoder layer of few tokens in one launch: csrc/cuda/layer.h says what the arguments mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.ops import checks
from qbert.ops.cpu_native import FLOAT_TYPES
from qbert.ops.cuda import launch
from qbert.ops.cuda.linear import linear_obstacle
from qbert.ops.triton.launch import require_operands
from qbert.target import Target

# Channels that a block computes, and how many blocks share a row: csrc/cuda/layer.h.
_CHANNELS, _MAX_BLOCKS = 128, 8


def add_norm_obstacle(n: int, k: int, out: torch.dtype, layout: str, target: Target) -> str | None:
    """Why no compiled kernel computes a W8A8 linear and the norm after it at once; None where one can.

    Args:
        n, k: output and input channels.
        out: type of the residual stream.
        layout: of the weight.
    """
    if n % _CHANNELS or not 2 <= n // _CHANNELS <= _MAX_BLOCKS:
        return f"n is {n}; a cluster of blocks takes multiples of {_CHANNELS}, 2 to {_MAX_BLOCKS} of them"
    return linear_obstacle(n, k, out, layout, target)


def w8a8_linear_add_norm(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor,
    beta: Tensor, eps: float, layout: str, *, tile: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`NotImplemented` also where two launches are faster, by a model.

    Args:
        tile: one of `extension().add_norm_tiles()`; by default what the extension chooses (for tests and measurements).
    """
    n = checks.w8a8_linear_add_norm(q, s, qdata, scale, bias, residual, gamma, beta, layout)
    t, k = q.shape
    target = launch.target_of(q.device)
    if add_norm_obstacle(n, k, residual.dtype, layout, target) is not None:
        return NotImplemented
    tile = tile or launch.extension().add_norm_choose(max(t, 1), n, k, target.sm_count)
    if not tile:
        return NotImplemented
    scale = scale.to(torch.float32)
    floats = {"bias": bias, "residual": residual, "gamma": gamma, "beta": beta}
    for name, operand in floats.items():
        if operand is not None:
            checks.float_dtype(f"{name} is", operand.dtype)
    require_operands("w8a8_linear_add_norm", q.device, q=q, s=s, weight=qdata, scale=scale, **floats)
    normed, codes = torch.empty_like(residual), residual.new_empty(t, n, dtype=torch.int8)
    out_scale = residual.new_empty(t, dtype=torch.float32)
    if t:
        launch.extension().w8a8_linear_add_norm(
            t=t, n=n, k=k, q=q.data_ptr(), q_pitch=k, s=s.data_ptr(), weight=qdata.data_ptr(),
            weight_pitch=qdata.stride(0), scale=scale.data_ptr(), eps=eps, normed=normed.data_ptr(),
            codes=codes.data_ptr(), out_scale=out_scale.data_ptr(), stream=launch.stream_of(q.device), tile=tile,
            **{name: launch.pointer(operand) for name, operand in floats.items()},
            **{f"{name}_type": 0 if each is None else FLOAT_TYPES[each.dtype] for name, each in floats.items()},
        )  # fmt: skip
    return normed, codes, out_scale


KERNELS: dict[str, Callable[..., Any]] = {"w8a8_linear_add_norm": w8a8_linear_add_norm}
