"""L5. Native CPU implementations of the weight-only linears: float activations, packed weights. For few tokens above all.

Like `cpu_native`: everything is checked before an address is taken, and a function returns `NotImplemented` for a layout
that the kernels do not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.layout import Layout
from qbert.ops import checks
from qbert.ops.cpu_native import FLOAT_TYPES, activation_code, dense
from qbert.target import native_cpu

_cpu: Any = native_cpu()  # None where it was not built: then nobody calls what follows

# WeightFormat of csrc/cpu/kernels.h.
_INT8_PANELS, _INT4_PANELS, _DICT4_PANELS, _DICT3_PANELS = 0, 2, 3, 4
_GOBO_FORMATS = {Layout.INT4_PANELS.value: _DICT4_PANELS, Layout.INT3_PANELS.value: _DICT3_PANELS}
_GROUP_MULTIPLE = 32  # input channels whose products the kernels sum up before they scale


def _weight_only(
    x: Tensor, n: int, fmt: int, qdata: Tensor, bias: Tensor | None, activation: str, *, scale: Tensor | None = None,
    group_scale: Tensor | None = None, codebook: Tensor | None = None,
    outliers: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    t, k = x.shape
    # Kept in names: a temporary would be freed before the kernel reads it.
    x = x if x.stride(1) == 1 else x.contiguous()
    qdata = dense(qdata)
    scale = None if scale is None else dense(scale, torch.float32)
    group_scale = None if group_scale is None else dense(group_scale)
    codebook = None if codebook is None else dense(codebook)
    if bias is not None:
        bias = dense(bias, None if bias.dtype in FLOAT_TYPES else torch.float32)
    rowptr, col, delta = (None, None, None) if outliers is None else (dense(each) for each in outliers)
    y = x.new_empty(t, n)
    _cpu.weight_only(
        t, n, k, x.data_ptr(), x.stride(0), FLOAT_TYPES[x.dtype], fmt, qdata.data_ptr(),
        0 if codebook is None else codebook.data_ptr(),
        0 if group_scale is None else group_scale.data_ptr(),
        0 if group_scale is None else group_scale.shape[1],
        0 if scale is None else scale.data_ptr(),
        0 if rowptr is None else rowptr.data_ptr(),
        0 if col is None else col.data_ptr(),
        col is not None and col.dtype == torch.int32,
        0 if delta is None else delta.data_ptr(),
        0 if col is None else col.numel(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else FLOAT_TYPES[bias.dtype],
        activation_code(activation), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def w8a16_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str
) -> Tensor:  # fmt: skip
    """Reads `Layout.INT8_PANELS`."""
    n = checks.w8a16_linear(x, qdata, scale, bias, layout)
    if layout != Layout.INT8_PANELS.value:
        return NotImplemented
    return _weight_only(x, n, _INT8_PANELS, qdata, bias, activation, scale=scale)


def w4a16_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str
) -> Tensor:  # fmt: skip
    """Reads `Layout.INT4_PANELS` with groups of a multiple of 32 input channels."""
    n = checks.w4a16_linear(x, qdata, scale, bias, layout)
    if layout != Layout.INT4_PANELS.value or x.shape[1] // max(1, scale.shape[1]) % _GROUP_MULTIPLE:
        return NotImplemented
    return _weight_only(x, n, _INT4_PANELS, qdata, bias, activation, group_scale=scale)


def gobo_a16_linear(
    x: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    bias: Tensor | None, activation: str, layout: str,
) -> Tensor:  # fmt: skip
    """Reads `Layout.INT4_PANELS` and `Layout.INT3_PANELS`, whichever the codebook's size asks for."""
    outliers = (outlier_rowptr, outlier_col, outlier_delta)
    n = checks.gobo_a16_linear(x, qdata, codebook, *outliers, bias, layout)
    fmt = _GOBO_FORMATS.get(layout)
    if fmt is None:
        return NotImplemented
    return _weight_only(x, n, fmt, qdata, bias, activation, codebook=codebook, outliers=outliers)


NATIVE_WEIGHT_ONLY: dict[str, Callable[..., Any]] = {
    "w8a16_linear": w8a16_linear,
    "w4a16_linear": w4a16_linear,
    "gobo_a16_linear": gobo_a16_linear,
}
