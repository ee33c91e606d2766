"""L5. W8A8 by CUTLASS's collectives: csrc/cuda/w8a8.h says what the arguments mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.dispatch import compiled_obstacle
from qbert.layout import Layout
from qbert.ops import checks
from qbert.ops.cuda import launch
from qbert.ops.triton.launch import require_operands
from qbert.target import Target

# Bytes: the copy engine (TMA) takes rows that lie multiples of this apart.
_ROW_MULTIPLE = 16
_LAYOUTS = (Layout.INT8_ROWS.value, Layout.PLAIN.value)


def linear_obstacle(n: int, k: int, out: torch.dtype, layout: str, target: Target) -> str | None:
    """Why the compiled kernels cannot run a W8A8 linear; None where they can. Pure: for machines that are not here.

    Args:
        n, k: output and input channels.
        out: type of the result.
        layout: of the weight.
    """
    if layout not in _LAYOUTS:
        return f"the CUDA kernels do not read layout {layout}; they read {', '.join(_LAYOUTS)}"
    if k % _ROW_MULTIPLE or k == 0:
        return f"k is {k}; the CUDA kernels take multiples of {_ROW_MULTIPLE}, above 0"
    if n * out.itemsize % _ROW_MULTIPLE:
        return f"a row of the result is {n * out.itemsize} bytes; the CUDA kernels store multiples of {_ROW_MULTIPLE}"
    return compiled_obstacle("w8a8_linear", target)


def w8a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out: torch.dtype | float,
    layout: str, *, tile: str = "",
) -> Tensor:  # fmt: skip
    """Also of `w8a8_linear_requant`.

    Args:
        tile: one of `extension().tiles()`; by default what the extension chooses (for tests and measurements).
    """
    n = checks.w8a8_linear(q, s, qdata, scale, bias, layout)
    t, k = q.shape
    out_dtype = checks.out_type(out)
    if linear_obstacle(n, k, out_dtype, layout, launch.target_of(q.device)) is not None:
        return NotImplemented
    scale = scale.to(torch.float32)
    require_operands("w8a8_linear", q.device, q=q, s=s, weight=qdata, scale=scale, bias=bias)
    y = q.new_empty(t, n, dtype=out_dtype)
    if y.numel():
        launch.extension().w8a8_linear(
            t=t, n=n, k=k, q=q.data_ptr(), q_pitch=k, s=s.data_ptr(), weight=qdata.data_ptr(),
            weight_pitch=qdata.stride(0), scale=scale.data_ptr(), tile=tile, **launch.finish(y, bias, activation),
            **launch.out_of(out),
        )  # fmt: skip
    return y


KERNELS: dict[str, Callable[..., Any]] = {
    "w8a8_linear": w8a8_linear,
    "w8a8_linear_requant": w8a8_linear,
}
