"""What every launcher of the compiled extension needs: the module, the machine, the stream, arguments of all kernels.

Launchers reach these through this module, so a test that stands another extension or machine in does it in one place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qbert.ops import abi, checks
from qbert.ops.abi import FLOAT_TYPES, Activation, pointer
from qbert.ops.cuda.choice import compiled_obstacle
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import Linear
from qbert.target import Target, load_cuda, target_of
from qbert.weight import Layout, Weight

__all__ = [
    "Family", "aligned_rows", "asked", "end", "end_obstacle", "extension", "fragments_obstacle", "out_of", "packed",
    "stream_of", "target_of",
]  # fmt: skip

_ALIGNMENT = 16  # bytes: what the copy engine asks of addresses and of the distance of rows

_ACTIVATIONS = (Activation.NONE, Activation.GELU)  # csrc/cuda/common/finish.cuh

# Groups must not cut what a thread expands at once, or be whole blocks: csrc/cuda/sm90/lowbit.cpp.
_GROUP_SIZES, _BLOCK_COLUMNS = (32, 64), 128


@functools.cache
def extension() -> Any:
    """The compiled extension `qbert._cuda`.

    Raises:
        MissingDependency: it was not built, or does not load.
        ImportError: it was built by another version.
    """
    module = load_cuda()
    abi.require_same_enums(module)
    return module


class Family(NamedTuple):
    """Linears of one kind of weight.

    Attributes:
        call: computes one; `tile`, one of the extension's, is for tests and measurements.
        obstacle, reason: as of a `Kernel`.
        layout: its own for weights, where it has one.
    """

    call: Callable[..., Tensor]
    obstacle: Callable[[Problem, Target], str | None]
    reason: Callable[[Problem, Target], str]
    layout: Layout | None


def end_obstacle(problem: Problem) -> str | None:
    """Why the compiled kernels cannot end a linear as asked; None where they can."""
    if problem.gated:
        return "the CUDA kernels do not gate"
    if problem.activation not in _ACTIVATIONS:
        known = ", ".join(each.text for each in _ACTIVATIONS)
        return f"the activation is {problem.activation.text}; the CUDA kernels have {known}"
    return None


def fragments_obstacle(own: Layout, problem: Problem, target: Target) -> str | None:
    """Why the compiled kernels of a layout of their own cannot run a linear; None where they can."""
    scheme, layout, k = problem.scheme, problem.layout, problem.k
    assert scheme is not None
    assert layout is not None
    missing, size = compiled_obstacle("linear", target), scheme.group_size
    if layout is not own:
        return missing or f"the weight lies in {layout.value}, the CUDA kernels read {own.value}"
    if size is not None and k > size and size not in _GROUP_SIZES and size % _BLOCK_COLUMNS:
        return f"{k // size} groups of {size}; the CUDA kernels take one, or groups of 32, 64 or multiples of {_BLOCK_COLUMNS}"
    return missing


def asked(target: Target) -> str:
    """The beginning of a reason where QBERT_KERNEL asks for the extension."""
    return "QBERT_KERNEL=cuda; " if target.prefer == "cuda" else ""


def stream_of(device: torch.device) -> int:
    """The stream that torch works on there."""
    return torch.cuda.current_stream(device).cuda_stream


def aligned_rows(matrix: Tensor) -> tuple[Tensor, int]:
    """`matrix` (t, k) as the copy engine takes it, and the distance of its rows in elements.

    Itself, or a copy whose rows have zeros beyond k, so that its address and the distance are multiples of 16 bytes.
    """
    t, k = matrix.shape
    multiple = _ALIGNMENT // matrix.itemsize
    pitch = -(-k // multiple) * multiple
    if pitch == k and matrix.is_contiguous() and matrix.data_ptr() % _ALIGNMENT == 0:
        return matrix, pitch
    padded = matrix.new_zeros(t, pitch)
    padded[:, :k] = matrix
    return padded, pitch


def end(a: Linear, y: Tensor) -> dict[str, Any]:
    """How a linear ends and where its result `y` (t, n) goes, in the words of every linear's binding.

    Raises:
        QBertError: a bias that is no float.
    """
    bias = a.bias
    if bias is not None:
        checks.float_dtype("bias is", bias.dtype)
    return {
        "bias": pointer(bias),
        "bias_type": 0 if bias is None else FLOAT_TYPES[bias.dtype],
        "activation": a.activation,
        "out": y.data_ptr(),
        "out_pitch": y.shape[1],
        "stream": stream_of(y.device),
    }


def out_of(a: Linear) -> dict[str, Any]:
    """The type of a result, or one over its static scale and the code of 0."""
    return {"out_type": abi.out_type(a.out), "inverse_out_scale": abi.inverse_scale(a.out), "zero": a.zero}


def packed(weight: Weight) -> dict[str, Any]:
    """A weight in fragments, in the words of the bindings that take one: made once, for addresses do not change."""
    tensors = weight.tensors
    require_operands("linear", weight.device, **tensors)
    size, column = weight.scheme.group_size, tensors.get("outlier_col")
    held = {
        "code": weight.scheme.weight.name,
        "codes": pointer(weight.qdata),
        "scale": pointer(weight.scale),
        "groups": max(1, weight.k // size) if size else 1,
        "codebook": pointer(weight.codebook),
        "rowptr": pointer(tensors.get("outlier_rowptr")),
        "col": pointer(column),
        "col_bytes": 0 if column is None else column.itemsize,
        "delta": pointer(tensors.get("outlier_delta")),
        "outliers": weight.outliers,
    }
    if weight.scheme.activation is not None:
        held |= {"group_scale": pointer(weight.group_scale), "matrices": weight.matrices}
    return held
