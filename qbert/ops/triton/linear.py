"""The linear: which family of kernels a scheme's weights take, and the layout that it wants them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from qbert.formats import DICT3, DICT4, INT4, INT8, Scheme
from qbert.ops.kernel import Problem
from qbert.ops.operations import Linear
from qbert.ops.triton import int8, lowbit, weight_only
from qbert.ops.triton.launch import gpu_obstacle
from qbert.target import Target
from qbert.weight import Layout


class _Family(NamedTuple):
    """Kernels of like weights and activations.

    Attributes:
        call: computes it.
        obstacle: why not a problem.
        reason: why these kernels, for people.
    """

    call: Callable[[Linear], Tensor]
    obstacle: Callable[[Problem], str | None]
    reason: str


_INT8 = _Family(int8.linear, int8.obstacle, "int8 matrix units")
_LOWBIT = _Family(lowbit.linear, lowbit.obstacle, "codes become int8 in registers, int8 matrix units")
_WEIGHT_ONLY = _Family(
    weight_only.linear,
    weight_only.obstacle,
    f"weights decoded in registers for few tokens ({weight_only.MOST_STREAMED_TOKENS}, in float32 "
    f"{weight_only.MOST_STREAMED_FLOAT32_TOKENS}), expanded for torch's product above",
)
_LAYOUTS = {
    INT8: Layout.INT8_ROWS,
    INT4: Layout.NIBBLE_HALVES,
    DICT4: Layout.SELECT_HALVES,
    DICT3: Layout.SELECT_HALVES,
}


def linear(a: Linear) -> Tensor:
    return _family(a.weight.scheme).call(a)


def obstacle(problem: Problem) -> str | None:
    """Why not this problem on a GPU that the kernels run on; None where they compute it."""
    scheme = problem.scheme
    assert scheme is not None
    if problem.gated:
        return "it does not gate"
    if scheme.weight not in _LAYOUTS:
        return f"it does not read {scheme.weight.name} codes; it reads {', '.join(each.name for each in _LAYOUTS)}"
    if scheme.activation not in (None, INT8):
        return f"the activations are {scheme.activation.name}"
    if (scheme.group_size is not None) != (scheme.weight == INT4):
        return f"{scheme.weight.name} weights with scales of {scheme.granularity}"
    return _family(scheme).obstacle(problem)


def reason(problem: Problem) -> str:
    """Why these kernels, for people."""
    assert problem.scheme is not None
    return _family(problem.scheme).reason


def layout(scheme: Scheme, target: Target) -> Layout | None:
    """The layout that the kernels want a scheme's weights in on a target; None where they do not compute with them."""
    if gpu_obstacle(target) is not None:
        return None
    if scheme.weight == DICT3 and scheme.activation is None:
        return Layout.DICT3_WORDS  # bound by bytes, so all three bits count
    return _LAYOUTS.get(scheme.weight)


def _family(scheme: Scheme) -> _Family:
    if scheme.activation is None:
        return _WEIGHT_ONLY
    return _INT8 if scheme.weight_bits == 8 else _LOWBIT
