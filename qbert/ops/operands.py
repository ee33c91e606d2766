"""What every launch on a GPU asks of the tensors whose addresses it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.errors import QBertError

_ALIGNMENT = 16  # bytes: the widest load, and what the copy engine asks of an address


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
