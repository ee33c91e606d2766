"""Row operations: csrc/cuda/common/rows.h says what the arguments mean."""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.ops.abi import FLOAT_TYPES
from qbert.ops.cuda import launch
from qbert.ops.cuda.choice import chosen_reason, norms_obstacle
from qbert.ops.kernel import Kernel, Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import AddNorm
from qbert.target import Target

# What a warp keeps of a row, and how many neighbours a lane takes of it: csrc/cuda/common/rows.h.
_MAX_ROW_COLUMNS, _LANE_COLUMNS = 2048, 8


def obstacle(problem: Problem, target: Target) -> str | None:
    """What `norms_obstacle` says, or rows that no kernel takes."""
    k = problem.k
    if k % _LANE_COLUMNS or not 0 < k <= _MAX_ROW_COLUMNS:
        return f"k is {k}; the CUDA row kernels take multiples of {_LANE_COLUMNS} up to {_MAX_ROW_COLUMNS}"
    return norms_obstacle("add_norm", problem, target)


def add_norm(a: AddNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Float norm of residual's type, its codes and their scales, in one pass over memory."""
    residual, (t, k) = a.residual, a.residual.shape
    operands = {"y": a.y, "residual": residual, "gamma": a.norm.gamma, "beta": a.norm.beta}
    require_operands("add_norm", residual.device, **operands)
    normed, scale = torch.empty_like(residual), residual.new_empty(t, dtype=torch.float32)
    codes = residual.new_empty(t, k, dtype=torch.int8)
    if t:
        launch.extension().add_layer_norm_quantize(
            t=t, k=k, eps=a.norm.eps, normed=normed.data_ptr(), codes=codes.data_ptr(), scale=scale.data_ptr(),
            stream=launch.stream_of(residual.device),
            **{name: operand.data_ptr() for name, operand in operands.items()},
            **{f"{name}_type": FLOAT_TYPES[operand.dtype] for name, operand in operands.items()},
        )  # fmt: skip
    return normed, codes, scale


KERNEL = Kernel("add_norm", "cuda add_norm", add_norm, obstacle, lambda problem, target: chosen_reason(target))
