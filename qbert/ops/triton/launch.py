"""What every launcher does before a launch: where the tensors are, that a kernel may read them, which tile it takes.

And what every row of the table asks before a launcher: whether the GPU is one that the kernels run on, and why they run where
other kernels were asked for.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qbert.devices import GPUS
from qbert.errors import QBertError
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.target import Target, target_of
from qbert.tiles import MIN_SM, require_supported
from qbert.weight import Layout, Weight

# Triton's interpreter runs kernels on CPU tensors; they choose tiles as an H100 would.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_H100 = Target(**GPUS["h100"].limits)


def target_for(tensor: Tensor) -> Target:
    """The target that a launch on a tensor's device chooses its tile for.

    Raises:
        QBertError: a device that the kernels do not run on.
    """
    if tensor.device.type == "cuda":
        target = replace(target_of(tensor.device), native=False)  # the compiled extension's tiles are not Triton's
    elif INTERPRETED and tensor.device.type == "cpu":
        target = _H100
    else:
        raise QBertError(f"a Triton kernel was given a tensor on {tensor.device}; allowed: cuda")
    require_supported(target)
    return target


def require_weight(operation: str, device: torch.device, weight: Weight) -> None:
    """`require_operands` of a weight's tensors, which are looked at once a weight.

    Raises:
        QBertError: as there.
    """
    if weight.device != device:
        raise QBertError(f"{operation}: qdata is on {weight.device}, the activations are on {device}")
    weight.prepared(_require_readable)


def _require_readable(weight: Weight) -> None:
    require_operands(f"a {weight.scheme.name} weight", weight.device, **weight.tensors)


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """How the copy engine reads or writes blocks (rows, columns) of a contiguous matrix."""
    (height, width) = matrix.shape
    return _descriptor_class()(matrix, [height, width], [width, 1], [rows, columns])


@functools.cache
def _descriptor_class() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


# ---- what rows of the table say -------------------------------------------------------------------------------------


def gpu_obstacle(target: Target) -> str | None:
    """Why no Triton kernel runs on a target; None where they do."""
    if target.device != "cuda":
        return "it is for tensors on a CUDA device"
    if target.sm < MIN_SM:
        return f"it needs compute capability {MIN_SM / 10:.1f}, this GPU has {target.sm / 10:.1f}"
    return None


def layout_obstacle(problem: Problem, readable: frozenset[Layout]) -> str | None:
    """Why not a weight in its layout; None where that is one of `readable`."""
    if problem.layout in readable:
        return None
    assert problem.scheme is not None
    lies = None if problem.layout is None else problem.layout.value
    allowed = ", ".join(sorted(each.value for each in readable))
    return f"it does not read {problem.scheme.name} weights in layout {lies}; it reads {allowed}"


def asked_for_other(operation: str, problem: Problem, target: Target) -> str:
    """The beginning of a reason where QBERT_KERNEL asks for the compiled kernels and Triton's run; else nothing."""
    from qbert.ops.cuda import why_not

    return why_not(operation, problem, target)
