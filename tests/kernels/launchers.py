"""Triton's launchers as `ops` calls them: the record is checked, and the row of the table has no obstacle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from qbert.ops import table
from qbert.ops.kernel import problem_of
from qbert.ops.operations import OPERATIONS, operation_of
from qbert.ops.triton import KERNELS
from qbert.target import Target
from qbert.weight import Weight

H100 = Target("cuda", "", sm=90, sm_count=132, shared_memory=232_448)
ROWS = {row.operation: row for row in KERNELS}


def checked(launcher: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The launcher behind the checks of its record."""

    def call(a: Any) -> Any:
        a.check()
        return launcher(a)

    return call


def launch(a: Any) -> Any:
    """The result of Triton's kernel for a record."""
    obstacle = obstacle_of(a)
    assert obstacle is None, obstacle
    return checked(ROWS[operation_of(a).name].call)(a)


def obstacle_of(a: Any, target: Target = H100) -> str | None:
    """Why Triton's kernel does not compute a record there."""
    return ROWS[operation_of(a).name].obstacle(problem_of(a), target)


def is_left_to_others(a: Any) -> bool:
    """Whether another row of the table computes a record on an H100."""
    name = operation_of(a).name
    return obstacle_of(a) is not None and table.select(name, problem_of(a), H100) is not ROWS[name]


def changed(weight: Weight, **tensors: Tensor) -> Weight:
    """The weight with other tensors."""
    return Weight(weight.scheme, weight.shape, weight.layout, {**weight.tensors, **tensors})


def bind_with(a: Any, old: str, new: str) -> Any:
    """The record through its torch operator's arguments, where one of them is another text."""
    operation = OPERATIONS[operation_of(a).name]
    flat = operation.flatten(a)
    return operation.bind(*(new if isinstance(each, str) and each == old else each for each in flat))
