"""L5. Integer linears of packed weights in `Layout.FRAGMENTS_S8`: csrc/cuda/lowbit.h says what the arguments mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.formats import DICT3
from qbert.ops import checks
from qbert.ops.cuda import launch
from qbert.ops.triton.launch import require_operands
from qbert.reference import REFERENCES


def w4a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out: torch.dtype | float, layout: str, *, tile: str = "",
) -> Tensor:  # fmt: skip
    """Also of `w4a8_linear_requant`.

    Args:
        tile: one of `extension().lowbit_tiles()`; by default what the extension chooses (for tests and measurements).
    """
    n = checks.w4a8_linear(q, s, qdata, group_scale, scale, bias, layout)
    groups = group_scale.shape[1] if q.shape[1] else 1
    if _obstacle("w4a8_linear", q, groups, layout) is not None:
        return NotImplemented
    if q.shape[1] == 0:
        return _empty_sums("w4a8_linear", q, s, qdata, group_scale, scale, bias, activation, out, layout)
    tensors = {"codes": qdata, "group_scale": group_scale, "scale": scale.to(torch.float32), "codebook": None}
    weight = launch.PackedWeight("int4", n, tensors, {"groups": groups, "matrices": 1})
    return _linear("w4a8_linear", q, s, weight, bias, activation, out, tile)


def gobo_linear(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor,
    outlier_delta: Tensor, bias: Tensor | None, activation: str, out: torch.dtype | float, layout: str, *, tile: str = "",
) -> Tensor:  # fmt: skip
    """Also of `gobo_linear_requant`. `tile` as in `w4a8_linear`."""
    outliers = outlier_rowptr, outlier_col, outlier_delta
    n = checks.gobo_linear(q, s, qdata, codebook, scale, *outliers, bias, layout)
    if _obstacle("gobo_linear", q, 1, layout) is not None:
        return NotImplemented
    if q.shape[1] == 0:
        return _empty_sums("gobo_linear", q, s, qdata, codebook, scale, *outliers, bias, activation, out, layout)
    tensors = {
        "codes": qdata, "group_scale": None, "scale": scale, "codebook": codebook, "rowptr": outlier_rowptr,
        "col": outlier_col, "delta": outlier_delta,
    }  # fmt: skip
    code = "dict3" if codebook.shape[-1] == DICT3.codes else "dict4"
    weight = launch.PackedWeight(code, n, tensors, {"groups": 1, "matrices": scale.numel()})
    return _linear("gobo_linear", q, s, weight, bias, activation, out, tile)


KERNELS: dict[str, Callable[..., Any]] = {
    "w4a8_linear": w4a8_linear,
    "w4a8_linear_requant": w4a8_linear,
    "gobo_linear": gobo_linear,
    "gobo_linear_requant": gobo_linear,
}


def _obstacle(operation: str, q: Tensor, groups: int, layout: str) -> str | None:
    return launch.fragments_obstacle(operation, q.shape[1], groups, layout, launch.target_of(q.device))


def _empty_sums(operation: str, *arguments: Any) -> Tensor:
    """Without input channels there is nothing to multiply."""
    out = arguments[-2]
    result: Tensor = REFERENCES[operation if isinstance(out, torch.dtype) else f"{operation}_requant"](*arguments)
    return result


def _linear(
    operation: str, q: Tensor, s: Tensor, weight: launch.PackedWeight, bias: Tensor | None, activation: str,
    out: torch.dtype | float, tile: str,
) -> Tensor:  # fmt: skip
    require_operands(operation, q.device, s=s, bias=bias, **weight.tensors)
    (t, k), n = q.shape, weight.n
    q, pitch = launch.aligned_rows(q)
    y = q.new_empty(t, n, dtype=checks.out_type(out))
    if y.numel() == 0:
        return y
    extension, multiprocessors = launch.extension(), launch.target_of(q.device).sm_count
    nbytes = extension.lowbit_columns_bytes(t, n, k, weight.outliers, multiprocessors, tile)
    columns = q.new_empty(nbytes) if nbytes else None
    extension.lowbit_linear(
        t=t, n=n, k=k, q=q.data_ptr(), q_pitch=pitch, s=s.data_ptr(), columns=launch.pointer(columns), tile=tile,
        **weight.arguments, **launch.finish(y, bias, activation), **launch.out_of(out),
    )  # fmt: skip
    return y
