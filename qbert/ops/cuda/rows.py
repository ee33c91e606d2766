"""L5. Row operations: csrc/cuda/rows.h says what the arguments mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.dispatch import compiled_obstacle
from qbert.ops import checks
from qbert.ops.cpu_native import FLOAT_TYPES
from qbert.ops.cuda import launch
from qbert.ops.triton.launch import require_operands
from qbert.target import Target

# What a warp keeps of a row, and how many neighbours a lane takes of it: csrc/cuda/rows.h.
_MAX_ROW_COLUMNS, _LANE_COLUMNS = 2048, 8


def row_obstacle(k: int, target: Target) -> str | None:
    """Why the compiled kernels cannot run an operation on rows of k columns; None where they can."""
    if k % _LANE_COLUMNS or not 0 < k <= _MAX_ROW_COLUMNS:
        return f"k is {k}; the CUDA row kernels take multiples of {_LANE_COLUMNS} up to {_MAX_ROW_COLUMNS}"
    return compiled_obstacle("add_layer_norm_quantize", target)


def add_layer_norm_quantize(
    y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Float norm of residual's type, its codes and their scales, in one pass over memory."""
    checks.add_layer_norm_quantize(y, residual, gamma, beta)
    t, k = residual.shape
    if row_obstacle(k, launch.target_of(residual.device)) is not None:
        return NotImplemented
    operands = {"y": y, "residual": residual, "gamma": gamma, "beta": beta}
    for name, operand in operands.items():
        checks.float_dtype(f"{name} is", operand.dtype)
    require_operands("add_layer_norm_quantize", residual.device, **operands)
    normed, scale = torch.empty_like(residual), residual.new_empty(t, dtype=torch.float32)
    codes = residual.new_empty(t, k, dtype=torch.int8)
    if t:
        launch.extension().add_layer_norm_quantize(
            t=t, k=k, eps=eps, normed=normed.data_ptr(), codes=codes.data_ptr(), scale=scale.data_ptr(),
            stream=launch.stream_of(residual.device),
            **{name: operand.data_ptr() for name, operand in operands.items()},
            **{f"{name}_type": FLOAT_TYPES[operand.dtype] for name, operand in operands.items()},
        )  # fmt: skip
    return normed, codes, scale


KERNELS: dict[str, Callable[..., Any]] = {"add_layer_norm_quantize": add_layer_norm_quantize}
