"""Parts of an encoder layer of few tokens in one launch: csrc/cuda/sm90/layer.h says what the arguments mean."""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.errors import MissingDependency
from qbert.formats import INT8
from qbert.ops import checks
from qbert.ops.abi import FLOAT_TYPES, pointer
from qbert.ops.cuda import launch, w8a8
from qbert.ops.cuda.choice import norms_obstacle
from qbert.ops.kernel import Kernel, Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import LinearAddNorm
from qbert.target import Target

# Channels that a block computes, and how many blocks share a row: csrc/cuda/sm90/layer.h.
_CHANNELS, _MAX_BLOCKS = 128, 8


def shape_obstacle(problem: Problem, target: Target) -> str | None:
    """Why no compiled kernel computes a linear and the norm after it at once; None where one can."""
    scheme, n = problem.scheme, problem.n
    if scheme is None or scheme.weight != INT8 or scheme.activation is None:
        return "the CUDA kernel of a linear and its norm is for W8A8"
    if n % _CHANNELS or not 2 <= n // _CHANNELS <= _MAX_BLOCKS:
        return f"n is {n}; a cluster of blocks takes multiples of {_CHANNELS}, 2 to {_MAX_BLOCKS} of them"
    return w8a8.shape_obstacle(problem, target)


def obstacle(problem: Problem, target: Target) -> str | None:
    """What `shape_obstacle` and `norms_obstacle` say, or that two launches are faster, by the extension's model."""
    found = norms_obstacle("linear_add_norm", problem, target) or shape_obstacle(problem, target)
    if found is not None:
        return found
    try:
        tile = _chosen(problem.t or 0, problem.n, problem.k, target)
    except MissingDependency as error:  # a machine that is not here, where nobody can ask the model
        return str(error)
    return None if tile else "two launches are faster, by a model"


def _chosen(t: int, n: int, k: int, target: Target) -> str:
    tile: str = launch.extension().add_norm_choose(max(t, 1), n, k, target.sm_count)
    return tile


def linear_add_norm(a: LinearAddNorm, *, tile: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """`tile` is one of `extension().add_norm_tiles()`; by default what the extension chooses."""
    x, weight, residual = a.x, a.weight, a.residual
    (t, k), n = x.shape, weight.n
    floats = {"bias": a.bias, "residual": residual, "gamma": a.norm.gamma, "beta": a.norm.beta}
    if a.bias is not None:
        checks.float_dtype("bias is", a.bias.dtype)
    require_operands("linear_add_norm", x.device, x=x, s=a.s, qdata=weight.qdata, **floats)
    normed, codes = torch.empty_like(residual), residual.new_empty(t, n, dtype=torch.int8)
    out_scale = residual.new_empty(t, dtype=torch.float32)
    if t:
        launch.extension().w8a8_linear_add_norm(
            t=t, n=n, k=k, q=x.data_ptr(), q_pitch=k, s=a.s.data_ptr(), eps=a.norm.eps, normed=normed.data_ptr(),
            codes=codes.data_ptr(), out_scale=out_scale.data_ptr(), stream=launch.stream_of(x.device),
            tile=tile or _chosen(t, n, k, launch.target_of(x.device)), **weight.prepared(w8a8.rows),
            **{name: pointer(operand) for name, operand in floats.items()},
            **{f"{name}_type": 0 if each is None else FLOAT_TYPES[each.dtype] for name, each in floats.items()},
        )  # fmt: skip
    return normed, codes, out_scale


KERNEL = Kernel(
    "linear_add_norm",
    "cuda linear_add_norm",
    linear_add_norm,
    obstacle,
    reason=lambda problem, target: "one launch where that is faster by a model, else linear and add_norm",
)
