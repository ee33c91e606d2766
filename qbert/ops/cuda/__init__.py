"""Kernels of the compiled extension for GPUs, `qbert._cuda` (csrc/cuda), a room for each family: for H100.

A launcher takes an operation's record, whose checks were made, and computes it: what its kernels cannot compute, or leave to
Triton's, its row's `obstacle` says before.
"""

from __future__ import annotations

from torch import Tensor

from qbert.formats import INT8, Scheme
from qbert.ops.cuda import layer, lowbit, rows, w8a8, weight_only
from qbert.ops.cuda.choice import compiled_obstacle, missing_extension, prefers_extension
from qbert.ops.cuda.launch import Family, end_obstacle, extension
from qbert.ops.cuda.layer import linear_add_norm
from qbert.ops.cuda.rows import add_norm
from qbert.ops.kernel import Kernel, Problem
from qbert.ops.operations import Linear
from qbert.target import Target
from qbert.target import cuda_missing as missing
from qbert.tiles import tile_key
from qbert.weight import Layout
from qbert.weight.layout import layouts_of

__all__ = [
    "KERNELS", "add_norm", "compiled_obstacle", "extension", "linear", "linear_add_norm", "missing", "missing_extension",
    "own_layout", "prefers_extension", "why_not",
]  # fmt: skip


def _family(scheme: Scheme | None) -> Family:
    assert scheme is not None
    if scheme.activation is None:
        return weight_only.FAMILY
    return w8a8.FAMILY if scheme.weight == INT8 else lowbit.FAMILY


def linear(a: Linear, *, tile: str = "") -> Tensor:
    """`tile` is one of the extension's for such a weight; by default what it chooses (for tests and measurements)."""
    return _family(a.weight.scheme).call(a, tile=tile)


def own_layout(scheme: Scheme) -> Layout | None:
    """The layout that only the compiled kernels read a scheme's weight in; None where they read Triton's."""
    own = _family(scheme).layout
    return own if own in layouts_of(scheme) else None


def _layout(scheme: Scheme, target: Target) -> Layout | None:
    own = own_layout(scheme)
    return own if own is not None and prefers_extension(tile_key(scheme), target) else None


_LINEAR = Kernel(
    "linear",
    "cuda linear",
    linear,
    obstacle=lambda problem, target: end_obstacle(problem) or _family(problem.scheme).obstacle(problem, target),
    reason=lambda problem, target: _family(problem.scheme).reason(problem, target),
    layout=_layout,
)
KERNELS = (_LINEAR, rows.KERNEL, layer.KERNEL)
_BY_OPERATION = {row.operation: row for row in KERNELS}


def why_not(operation: str, problem: Problem, target: Target) -> str:
    """The beginning of another kernel's reason where QBERT_KERNEL asks for the extension's; else nothing."""
    row = _BY_OPERATION.get(operation)
    obstacle = None if row is None or target.prefer != "cuda" else row.obstacle(problem, target)
    return "" if obstacle is None else f"QBERT_KERNEL=cuda, but {obstacle}; "
