"""Operations that are two steps one after the other wherever no kernel does both at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qbert.ops import reference
from qbert.ops.abi import Activation
from qbert.ops.kernel import Kernel, Problem
from qbert.ops.operations import AddNorm, Linear, LinearAddNorm
from qbert.target import Target

LINEAR_THEN_NORM = "linear, add_norm"
LINEAR_THEN_ACTIVATION = "linear, activation"
# What the kernels of every backend end with.
_EVERYWHERE = (Activation.NONE, Activation.GELU)


def _linear_add_norm(a: LinearAddNorm) -> tuple[Tensor, Tensor, Tensor]:
    from qbert.ops.table import run

    result: Any = run(AddNorm(run(a.linear), a.residual, a.norm, a.keeps))
    return result


def _linear(a: Linear) -> Tensor:
    """The sums in float32, or of float tokens in their own type, which rounds once more; then activation and gate by torch."""
    from qbert.ops.table import run

    inner = a.x.dtype if a.s is None else torch.float32
    y = run(a._replace(activation=Activation.NONE, gated=False, out=inner, zero=0)).to(torch.float32)
    return reference.to_out(reference.activated(y, a.activation, a.gated), a.out, a.zero)


def _sums(problem: Problem) -> Problem:
    """The problem of a linear without activation and gate."""
    float32 = problem.scheme is not None and problem.scheme.activation is not None
    return problem._replace(
        activation=Activation.NONE, gated=False, dtype=torch.float32 if float32 else problem.dtype
    )  # fmt: skip


def _linear_obstacle(problem: Problem, target: Target) -> str | None:
    if problem.gated or problem.activation not in _EVERYWHERE:
        return None
    return "every kernel of a linear does all of it"


def _linear_reason(problem: Problem, target: Target) -> str:
    from qbert.ops.table import select

    sums = _sums(problem)
    row = select("linear", sums, target)
    return f"{row.name} ({row.reason(sums, target)}), then activation and gate by torch"


KERNELS = (
    Kernel("linear", LINEAR_THEN_ACTIVATION, _linear, _linear_obstacle, _linear_reason),
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
