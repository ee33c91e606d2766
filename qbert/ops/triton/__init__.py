"""L5. Launchers of the Triton kernels, which `torch.ops.qbert.*` runs on CUDA: a room for each family of kernels.

A launcher takes the operator's arguments, checks them (`checks`, `launch.require_operands`), asks `tiles` for the tile, and
launches; on CPU tensors it works in Triton's interpreter only. Layouts that no kernel reads give `NotImplemented`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qbert.ops.triton import attention, int8, lowbit, rows, weight_only

TRITON: dict[str, Callable[..., Any]] = {
    operation: launcher
    for room in (rows, int8, lowbit, weight_only, attention)
    for operation, launcher in room.KERNELS.items()
}
