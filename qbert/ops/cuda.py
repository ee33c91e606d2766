"""L5. Launchers of the compiled GPU kernels, `qbert._cuda` (csrc/cuda): for H100, where they beat Triton's.

As in `qbert.ops.triton`, a launcher takes the operator's arguments and checks them. A problem that its kernels do not compute
gives `NotImplemented`, and a Triton kernel runs; `linear_obstacle` and `row_obstacle` say why.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.errors import MissingDependency
from qbert.layout import Layout
from qbert.ops import checks
from qbert.ops.cpu_native import FLOAT_TYPES, activation_code
from qbert.ops.triton.launch import require_operands
from qbert.target import Target, target_of

SM = 90  # code for sm_90a runs on nothing newer either
# Bytes: the copy engine (TMA) takes rows that lie multiples of this apart.
_ROW_MULTIPLE = 16
# What a warp keeps of a row, and how many neighbours a lane takes of it: csrc/cuda/rows.h.
_MAX_ROW_COLUMNS, _LANE_COLUMNS = 2048, 8
_LAYOUTS = (Layout.INT8_ROWS.value, Layout.PLAIN.value)


@functools.cache
def extension() -> Any:
    """The module `qbert._cuda`.

    Raises:
        MissingDependency: it was not built, or does not load; the message says which.
    """
    try:
        return importlib.import_module("qbert._cuda")
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "qbert was installed without its CUDA kernels (qbert._cuda); to build them: CUDA's nvcc, QBERT_CUDA=1, and "
            "install again (docs/cuda.md)"
        ) from error
    except ImportError as error:
        raise MissingDependency(f"qbert._cuda does not load: {error}") from error


def missing() -> str | None:
    """Why there is no `qbert._cuda` here; None where there is one."""
    try:
        extension()
    except MissingDependency as error:
        return str(error)
    return None


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
    return _device_obstacle(target)


def row_obstacle(k: int, target: Target) -> str | None:
    """Why the compiled kernels cannot run an operation on rows of k columns; None where they can."""
    if k % _LANE_COLUMNS or not 0 < k <= _MAX_ROW_COLUMNS:
        return f"k is {k}; the CUDA row kernels take multiples of {_LANE_COLUMNS} up to {_MAX_ROW_COLUMNS}"
    return _device_obstacle(target)


def _device_obstacle(target: Target) -> str | None:
    if target.sm != SM:
        return f"the CUDA kernels are compiled for compute capability {SM / 10:.1f}, this GPU has {target.sm / 10:.1f}"
    return None


def w8a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out: torch.dtype | float,
    layout: str, *, tile: str = "",
) -> Tensor:  # fmt: skip
    """Also of `w8a8_linear_requant`.

    Args:
        tile: one of `extension().tiles()`; by default what the extension chooses (for tests and measurements).
    """
    n = checks.w8a8_linear(q, s, qdata, scale, bias, layout)
    (t, k), out_dtype = q.shape, checks.out_type(out)
    if linear_obstacle(n, k, out_dtype, layout, target_of(q.device)) is not None:
        return NotImplemented
    if bias is not None:
        checks.float_dtype("bias is", bias.dtype)
    scale = scale.to(torch.float32)
    require_operands("w8a8_linear", q.device, q=q, s=s, weight=qdata, scale=scale, bias=bias)
    y = q.new_empty(t, n, dtype=out_dtype)
    if y.numel():
        _launch_w8a8(q, s, qdata, scale, bias, activation, out, y, tile)
    return y


def _launch_w8a8(
    q: Tensor, s: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out: torch.dtype | float,
    y: Tensor, tile: str,
) -> None:  # fmt: skip
    """What the arguments mean says `W8a8Linear` in csrc/cuda/w8a8.h."""
    cuda = extension()
    t, n = y.shape
    cuda.w8a8_linear(
        t=t, n=n, k=q.shape[1],
        q=q.data_ptr(), q_pitch=q.stride(0), s=s.data_ptr(),
        weight=weight.data_ptr(), weight_pitch=weight.stride(0), scale=scale.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        bias_type=0 if bias is None else FLOAT_TYPES[bias.dtype],
        activation=activation_code(activation),
        out=y.data_ptr(), out_pitch=n,
        out_type=FLOAT_TYPES.get(y.dtype, cuda.REQUANTIZE),
        inverse_out_scale=0.0 if isinstance(out, torch.dtype) else 1.0 / out,
        stream=torch.cuda.current_stream(q.device).cuda_stream,
        tile=tile,
    )  # fmt: skip


def add_layer_norm_quantize(
    y: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Float norm of residual's type, its codes and their scales, in one pass over memory."""
    checks.add_layer_norm_quantize(y, residual, gamma, beta)
    t, k = residual.shape
    if row_obstacle(k, target_of(residual.device)) is not None:
        return NotImplemented
    operands = {"y": y, "residual": residual, "gamma": gamma, "beta": beta}
    for name, operand in operands.items():
        checks.float_dtype(f"{name} is", operand.dtype)
    require_operands("add_layer_norm_quantize", residual.device, **operands)
    normed, scale = torch.empty_like(residual), residual.new_empty(t, dtype=torch.float32)
    codes = residual.new_empty(t, k, dtype=torch.int8)
    if t:
        extension().add_layer_norm_quantize(
            t=t, k=k, eps=eps, normed=normed.data_ptr(), codes=codes.data_ptr(), scale=scale.data_ptr(),
            stream=torch.cuda.current_stream(residual.device).cuda_stream,
            **{name: operand.data_ptr() for name, operand in operands.items()},
            **{f"{name}_type": FLOAT_TYPES[operand.dtype] for name, operand in operands.items()},
        )  # fmt: skip
    return normed, codes, scale


KERNELS: dict[str, Callable[..., Any]] = {
    "w8a8_linear": w8a8_linear,
    "w8a8_linear_requant": w8a8_linear,
    "add_layer_norm_quantize": add_layer_norm_quantize,
}
