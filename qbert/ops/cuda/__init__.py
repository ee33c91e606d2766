"""L5. Launchers of the compiled GPU kernels, `qbert._cuda` (csrc/cuda), a room for each family: for H100.

As in `qbert.ops.triton`, a launcher takes the operator's arguments and checks them. A problem that its kernels do not compute
gives `NotImplemented`, and a Triton kernel or the reference runs; `linear_obstacle` and `row_obstacle` say why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qbert.ops.cuda import layer, linear, lowbit, rows, weight_only
from qbert.ops.cuda.launch import extension
from qbert.ops.cuda.linear import linear_obstacle, w8a8_linear
from qbert.ops.cuda.rows import add_layer_norm_quantize, row_obstacle
from qbert.target import cuda_missing as missing

__all__ = [
    "KERNELS", "add_layer_norm_quantize", "extension", "linear_obstacle", "missing", "row_obstacle", "w8a8_linear",
]  # fmt: skip

KERNELS: dict[str, Callable[..., Any]] = {
    operation: launcher
    for room in (layer, linear, rows, lowbit, weight_only)
    for operation, launcher in room.KERNELS.items()
}
