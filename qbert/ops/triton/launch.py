"""L5. What every launcher does before a launch: where the tensors are, that a kernel may read them, which tile it takes."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.target import Target, target_of
from qbert.tiles import require_supported

_ALIGNMENT = 16  # bytes: the widest load, and what the copy engine asks of an address
# Triton's interpreter runs kernels on CPU tensors; they choose tiles as an H100 would.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_H100 = Target("cuda", "", sm=90, sm_count=132, shared_memory=232_448)


def target_for(tensor: Tensor) -> Target:
    """The target that a launch on a tensor's device chooses its tile for.

    Raises:
        QBertError: a device that the kernels do not run on.
    """
    if tensor.device.type == "cuda":
        target = replace(target_of(tensor.device), native=False)  # the compiled extension's tiles are not Triton's
    elif INTERPRETED and tensor.device.type == "cpu":
        target = _H100
    else:
        raise QBertError(f"a Triton kernel was given a tensor on {tensor.device}; allowed: cuda")
    require_supported(target)
    return target


def require_operands(operation: str, device: torch.device, **operands: Tensor | None) -> None:
    """
    Raises:
        QBertError: an operand on another device, not contiguous, or not aligned to 16 bytes: a kernel would read what is not
            there, or fault.
    """
    for name, tensor in operands.items():
        if tensor is None or tensor.numel() == 0:
            continue
        if tensor.device != device:
            raise QBertError(f"{operation}: {name} is on {tensor.device}, the activations are on {device}")
        if not tensor.is_contiguous():
            raise QBertError(f"{operation}: {name} has strides {tensor.stride()}; allowed: contiguous")
        if tensor.data_ptr() % _ALIGNMENT:
            raise QBertError(
                f"{operation}: {name} starts at an address {tensor.data_ptr() % _ALIGNMENT} bytes past a multiple of "
                f"{_ALIGNMENT}; allowed: multiples of {_ALIGNMENT}"
            )
