"""L5. What every launcher of the compiled extension needs: the module, the machine, the stream, arguments of all kernels.

Launchers reach these through this module, so a test that stands another extension or machine in does it in one place.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbert.dispatch import COMPILED_LAYOUTS, compiled_obstacle
from qbert.ops import checks
from qbert.ops.cpu_native import FLOAT_TYPES, activation_code
from qbert.target import Target, load_cuda, target_of

__all__ = [
    "PackedWeight", "aligned_rows", "extension", "finish", "fragments_obstacle", "out_of", "pointer", "stream_of", "target_of",
]  # fmt: skip

_ALIGNMENT = 16  # bytes: what the copy engine asks of addresses and of the distance of rows

# Groups must not cut what a thread expands at once, or be whole blocks: csrc/cuda/lowbit.cpp.
_GROUP_SIZES, _BLOCK_COLUMNS = (32, 64), 128

extension = functools.cache(load_cuda)


def fragments_obstacle(operation: str, k: int, groups: int, layout: str, target: Target) -> str | None:
    """Why the compiled kernels cannot run a linear of packed weights; None where they can. Pure, as `linear_obstacle`.

    Args:
        operation: of `COMPILED_LAYOUTS`.
        k: input channels.
        groups: scales of a row's groups; 1 where there are no groups.
        layout: of the weight.
    """
    own = COMPILED_LAYOUTS[operation].value
    if layout != own:
        return f"the CUDA kernels do not read layout {layout}; they read {own}"
    size = k // max(1, groups)
    if size * groups != k or (groups > 1 and size not in _GROUP_SIZES and size % _BLOCK_COLUMNS):
        return f"{groups} groups of {size}; the CUDA kernels take one, or groups of 32, 64 or multiples of 128"
    return compiled_obstacle(operation, target)


def stream_of(device: torch.device) -> int:
    """The stream that torch works on there."""
    return torch.cuda.current_stream(device).cuda_stream


def pointer(tensor: Tensor | None) -> int:
    """The tensor's address; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


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


def finish(y: Tensor, bias: Tensor | None, activation: str) -> dict[str, Any]:
    """How a linear ends and where its result `y` (t, n) goes, in the words of every linear's binding.

    Raises:
        QBertError: an unknown activation, or a bias that is no float.
    """
    if bias is not None:
        checks.float_dtype("bias is", bias.dtype)
    return {
        "bias": pointer(bias),
        "bias_type": 0 if bias is None else FLOAT_TYPES[bias.dtype],
        "activation": activation_code(activation),
        "out": y.data_ptr(),
        "out_pitch": y.shape[1],
        "stream": stream_of(y.device),
    }


def out_of(out: torch.dtype | float) -> dict[str, Any]:
    """The type of a result, or one over its static scale, which says that it is int8."""
    return {
        "out_type": FLOAT_TYPES[out] if isinstance(out, torch.dtype) else extension().REQUANTIZE,
        "inverse_out_scale": 0.0 if isinstance(out, torch.dtype) else 1.0 / out,
    }


@dataclass(frozen=True)
class PackedWeight:
    """A weight (n, k) in fragments, in the words of the bindings that take one.

    Attributes:
        code: ``"int8"``, ``"int4"``, ``"dict4"`` or ``"dict3"``.
        n: output channels.
        tensors: the arguments that are addresses.
        counts: the arguments that are numbers.
    """

    code: str
    n: int
    tensors: dict[str, Tensor | None]
    counts: dict[str, int]

    @property
    def outliers(self) -> int:
        """How many weights are kept exactly."""
        col = self.tensors.get("col")
        return 0 if col is None else col.numel()

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of a binding."""
        col = self.tensors.get("col")
        outliers = {"rowptr": 0, "col": 0, "delta": 0, "col_bytes": 0 if col is None else col.itemsize}
        addresses = {name: pointer(tensor) for name, tensor in self.tensors.items()}
        return {"code": self.code, **outliers, "outliers": self.outliers, **addresses, **self.counts}
