"""L5. CPU implementations by the compiled extension: integer linears. Everything is checked before an address is taken.

A function returns `NotImplemented` for a layout that the kernels do not read; torch's implementation runs then, and
`dispatch.select_kernel` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.layout import Layout
from qbert.ops import checks
from qbert.reference import ACTIVATIONS
from qbert.target import native_cpu

_cpu: Any = native_cpu()

# As the enums of csrc/cpu/kernels.h count them.
FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT8_PANELS, _INT8_ROWS, _INT4_PANELS, _DICT4_PANELS, _DICT3_PANELS = range(5)
_W8A8_FORMATS = {Layout.INT8_PANELS.value: _INT8_PANELS, Layout.PLAIN.value: _INT8_ROWS}
# An expanded operand is an int8 matrix with a scale per row, whatever it came from.
_W4A8_FORMATS = {Layout.INT4_PANELS.value: _INT4_PANELS, Layout.INT8_EXPANDED.value: _INT8_ROWS}
_GOBO_FORMATS = {Layout.INT4_PANELS.value: _DICT4_PANELS, Layout.INT3_PANELS.value: _DICT3_PANELS}
_GROUP_MULTIPLE = 8  # input channels in a row of int4 panels: a group ends with a row


def activation_code(activation: str) -> int:
    """Number of an activation in the extension."""
    if activation not in ACTIVATIONS:
        raise QBertError(f"unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(activation)


def dense(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor itself where it is contiguous and of that type, as it nearly always is."""
    if dtype is not None and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _linear(
    q: Tensor, s: Tensor, n: int, fmt: int, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out: torch.dtype | float, codebook: Tensor | None = None, group_scale: Tensor | None = None,
    outliers: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`out` is the type of the result, or the static scale of an int8 one."""
    t, k = q.shape
    # Kept in names: a temporary would be freed before the kernel reads it.
    q, s, qdata, scale = dense(q), dense(s), dense(qdata), dense(scale)
    bias = None if bias is None else dense(bias, torch.float32)
    codebook = None if codebook is None else dense(codebook)
    group_scale = None if group_scale is None else dense(group_scale)
    rowptr, col, delta = (None, None, None) if outliers is None else (dense(each) for each in outliers)
    y = q.new_empty(t, n, dtype=checks.out_type(out))
    _cpu.linear(
        t, n, k, q.data_ptr(), s.data_ptr(), fmt, qdata.data_ptr(),
        0 if codebook is None else codebook.data_ptr(),
        1 if codebook is None or codebook.dim() == 1 else codebook.shape[0],
        0 if group_scale is None else group_scale.data_ptr(),
        0 if group_scale is None else group_scale.shape[1],
        scale.data_ptr(),
        0 if rowptr is None else rowptr.data_ptr(),
        0 if col is None else col.data_ptr(),
        col is not None and col.dtype == torch.int32,
        0 if delta is None else delta.data_ptr(),
        0 if col is None else col.numel(),
        0 if bias is None else bias.data_ptr(),
        activation_code(activation), y.data_ptr(),
        FLOAT_TYPES.get(y.dtype, -1), 0.0 if isinstance(out, torch.dtype) else 1.0 / out,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def w8a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out: torch.dtype | float,
    layout: str,
) -> Tensor:  # fmt: skip
    """Also of `w8a8_linear_requant`."""
    n = checks.w8a8_linear(q, s, qdata, scale, bias, layout)
    fmt = _W8A8_FORMATS.get(layout)
    if fmt is None:
        return NotImplemented
    return _linear(q, s, n, fmt, qdata, scale, bias, activation, out)


def w4a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out: torch.dtype | float, layout: str,
) -> Tensor:  # fmt: skip
    """Also of `w4a8_linear_requant`."""
    n = checks.w4a8_linear(q, s, qdata, group_scale, scale, bias, layout)
    fmt = _W4A8_FORMATS.get(layout)
    if fmt is None or (fmt == _INT4_PANELS and q.shape[1] // max(1, group_scale.shape[1]) % _GROUP_MULTIPLE):
        return NotImplemented
    groups = group_scale if fmt == _INT4_PANELS else None
    return _linear(q, s, n, fmt, qdata, scale, bias, activation, out, group_scale=groups)


def gobo_linear(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor,
    outlier_delta: Tensor, bias: Tensor | None, activation: str, out: torch.dtype | float, layout: str,
) -> Tensor:  # fmt: skip
    """Also of `gobo_linear_requant`."""
    outliers = (outlier_rowptr, outlier_col, outlier_delta)
    n = checks.gobo_linear(q, s, qdata, codebook, scale, *outliers, bias, layout)
    fmt = _GOBO_FORMATS.get(layout)
    if fmt is None:
        return NotImplemented
    return _linear(q, s, n, fmt, qdata, scale, bias, activation, out, codebook=codebook, outliers=outliers)


NATIVE_LINEAR: dict[str, Callable[..., Any]] = {
    f"{operation}{suffix}": function
    for operation, function in (
        ("w8a8_linear", w8a8_linear),
        ("w4a8_linear", w4a8_linear),
        ("gobo_linear", gobo_linear),
    )
    for suffix in ("", "_requant")
}
