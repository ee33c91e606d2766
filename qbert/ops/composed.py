"""Operations that are two others one after the other wherever no kernel does both at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qbert.ops.kernel import Kernel, Problem
from qbert.ops.operations import AddNorm, LinearAddNorm
from qbert.target import Target

LINEAR_THEN_NORM = "linear, add_norm"


def _linear_add_norm(a: LinearAddNorm) -> tuple[Tensor, Tensor, Tensor]:
    from qbert.ops.table import run

    result: Any = run(AddNorm(run(a.linear), a.residual, a.norm))
    return result


KERNELS = (
    Kernel(
        "linear_add_norm",
        LINEAR_THEN_NORM,
        _linear_add_norm,
        obstacle=lambda problem, target: None,
        reason=lambda problem, target: _REASON,
    ),
)
_REASON = "two launches: no kernel here does both at once, or two are faster"


def composes(problem: Problem, target: Target) -> bool:
    """Whether a linear and the norm after it are two launches there, whatever the number of tokens."""
    from qbert.ops.table import select

    return target.device == "cpu" and select("linear_add_norm", problem, target).name == LINEAR_THEN_NORM
