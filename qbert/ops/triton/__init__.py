"""Triton kernels for GPUs: a room for each family of launchers, and their rows of the table.

A launcher takes an operation's record, whose checks were made. It looks that the kernel may read the tensors where they lie
(`operands.require_operands`), asks `tiles` for the tile, and launches; on CPU tensors it works in Triton's interpreter only.
What it does not compute its row's obstacle says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qbert.formats import Scheme
from qbert.ops.kernel import Kernel, Problem
from qbert.ops.triton import attention, linear, rows
from qbert.ops.triton.launch import asked_for_other, gpu_obstacle
from qbert.target import Target
from qbert.weight import Layout

_ROWS_REASON = "one pass over memory"


def _row(
    operation: str, call: Callable[[Any], Any], obstacle_of: Callable[[Problem], str | None],
    reason_of: Callable[[Problem], str] = lambda problem: _ROWS_REASON,
    layout: Callable[[Scheme, Target], Layout | None] = lambda scheme, target: None,
) -> Kernel:  # fmt: skip
    def obstacle(problem: Problem, target: Target) -> str | None:
        return gpu_obstacle(target) or obstacle_of(problem)

    def reason(problem: Problem, target: Target) -> str:
        return asked_for_other(operation, problem, target) + reason_of(problem)

    return Kernel(operation, f"triton {operation}", call, obstacle, reason, layout)


KERNELS: tuple[Kernel, ...] = (
    _row("linear", linear.linear, linear.obstacle, linear.reason, linear.layout),
    _row("quantize_rows", rows.quantize_rows, rows.width_obstacle),
    _row("embedding", rows.embedding, rows.embedding_obstacle),
    _row(
        "attention",
        attention.attention,
        attention.obstacle,
        lambda problem: "int8 matrix units for the scores, float16 ones for the values",
    ),
    _row("add_norm", rows.add_norm, rows.norm_obstacle),
    _row("embed_norm", rows.embed_norm, rows.embed_norm_obstacle),
)
