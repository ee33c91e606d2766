"""W8A8 by CUTLASS's collectives and by small tiles: csrc/cuda/w8a8.h says what the arguments mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qbert.ops import checks
from qbert.ops.cuda import launch
from qbert.ops.cuda.choice import chosen_reason, compiled_obstacle
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import Linear
from qbert.target import Target
from qbert.tiles import select_tile, tile_key
from qbert.weight import Layout, Weight

# Bytes: the copy engine (TMA) takes rows that lie multiples of this apart.
_ROW_MULTIPLE = 16
_LAYOUTS = (Layout.INT8_ROWS, Layout.PLAIN)


def shape_obstacle(problem: Problem, target: Target) -> str | None:
    """Why no compiled kernel computes a W8A8 linear, wherever else it could run; None where one can."""
    n, k, layout = problem.n, problem.k, problem.layout
    if layout not in _LAYOUTS:
        lies, read = layout.value if layout else "none", " and ".join(each.value for each in _LAYOUTS)
        return f"the weight lies in {lies}, the CUDA kernels read {read}"
    if k % _ROW_MULTIPLE or k == 0:
        return f"k is {k}; the CUDA kernels take multiples of {_ROW_MULTIPLE}, above 0"
    width = n * problem.dtype.itemsize
    if width % _ROW_MULTIPLE:
        return f"a row of the result is {width} bytes; the CUDA kernels store multiples of {_ROW_MULTIPLE}"
    return compiled_obstacle("linear", target)


def obstacle(problem: Problem, target: Target) -> str | None:
    """`shape_obstacle`, or that QBERT_KERNEL or the tile of the problem is Triton's."""
    found = compiled_obstacle("linear", target) or shape_obstacle(problem, target)
    if found is not None or target.prefer == "cuda":
        return found
    if target.prefer:
        return f"QBERT_KERNEL={target.prefer}"
    assert problem.scheme is not None
    if problem.n and select_tile(tile_key(problem.scheme), problem.t or 0, problem.n, problem.k, target).road == "cuda":
        return None
    return "the table of tiles names Triton's kernel for this problem"


def rows(weight: Weight) -> dict[str, Any]:
    """A weight in the words of the bindings that take int8 rows: made once, for addresses do not change."""
    require_operands("linear", weight.device, **weight.tensors)
    scale = weight.tensors["scale"]
    return {"weight": weight.qdata.data_ptr(), "weight_pitch": weight.qdata.stride(0), "scale": scale.data_ptr()}


def linear(a: Linear, *, tile: str = "") -> Tensor:
    """`tile` is one of `extension().tiles()`; by default what the extension chooses."""
    x, s, weight = a.x, a.s, a.weight
    assert s is not None
    require_operands("linear", x.device, x=x, s=s, qdata=weight.qdata, bias=a.bias)
    (t, k), n = x.shape, weight.n
    y = x.new_empty(t, n, dtype=checks.out_type(a.out))
    if y.numel():
        launch.extension().w8a8_linear(
            t=t, n=n, k=k, q=x.data_ptr(), q_pitch=k, s=s.data_ptr(), tile=tile, **weight.prepared(rows),
            **launch.end(a, y), **launch.out_of(a),
        )  # fmt: skip
    return y


FAMILY = launch.Family(linear, obstacle, lambda problem, target: chosen_reason(target), layout=None)
