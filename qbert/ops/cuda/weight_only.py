"""L5. Weight-only linears of `Layout.FRAGMENTS_F16`: csrc/cuda/weight_only.h says what the arguments mean.

Two roads: few tokens of 16 bits multiply the packed weight itself, which is read once for all of them; what is left multiplies
an expanded copy of it in torch, whose own settings then say how float32 (TF32) and float16 are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.formats import DICT3
from qbert.ops import checks
from qbert.ops.cpu_native import FLOAT_TYPES, activation_code
from qbert.ops.cuda import launch
from qbert.ops.triton.launch import require_operands

FEW_TOKENS = 64  # that share a reading of the weight


def w8a16_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str, *, tile: str = ""
) -> Tensor:
    """Float activations, int8 weights.

    Args:
        tile: for tests and measurements; by default what the extension chooses.
    """
    n = checks.w8a16_linear(x, qdata, scale, bias, layout)
    tensors = {"codes": qdata, "scale": scale.to(torch.float32), "codebook": None}
    return _linear(
        "w8a16_linear", x, launch.PackedWeight("int8", n, tensors, {"groups": 1}), bias, activation, layout, tile
    )


def w4a16_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str, *, tile: str = ""
) -> Tensor:
    """Float activations, int4 weights with a scale a group. `tile` as in `w8a16_linear`."""
    n = checks.w4a16_linear(x, qdata, scale, bias, layout)
    groups = scale.shape[1] if x.shape[1] else 1
    tensors = {"codes": qdata, "scale": scale, "codebook": None}
    weight = launch.PackedWeight("int4", n, tensors, {"groups": groups})
    return _linear("w4a16_linear", x, weight, bias, activation, layout, tile)


def gobo_a16_linear(
    x: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    bias: Tensor | None, activation: str, layout: str, *, tile: str = "",
) -> Tensor:  # fmt: skip
    """Float activations, dictionary weights. `tile` as in `w8a16_linear`."""
    outliers = outlier_rowptr, outlier_col, outlier_delta
    n = checks.gobo_a16_linear(x, qdata, codebook, *outliers, bias, layout)
    tensors = {
        "codes": qdata, "scale": None, "codebook": codebook, "rowptr": outlier_rowptr, "col": outlier_col,
        "delta": outlier_delta,
    }  # fmt: skip
    code = "dict3" if codebook.numel() == DICT3.codes else "dict4"
    weight = launch.PackedWeight(code, n, tensors, {"groups": 1})
    return _linear("gobo_a16_linear", x, weight, bias, activation, layout, tile)


KERNELS: dict[str, Callable[..., Any]] = {
    "w8a16_linear": w8a16_linear,
    "w4a16_linear": w4a16_linear,
    "gobo_a16_linear": gobo_a16_linear,
}


def _linear(
    operation: str, x: Tensor, weight: launch.PackedWeight, bias: Tensor | None, activation: str, layout: str, tile: str
) -> Tensor:
    (t, k), target = x.shape, launch.target_of(x.device)
    if launch.fragments_obstacle(operation, k, weight.counts["groups"], layout, target) is not None:
        return NotImplemented
    require_operands(operation, x.device, bias=bias, **weight.tensors)
    if not (t <= FEW_TOKENS and k and x.dtype != torch.float32):
        return _expanded(x, weight, bias, activation)
    (x, pitch), y = launch.aligned_rows(x), x.new_empty(t, weight.n)
    if y.numel():
        launch.extension().weight_only_linear(
            t=t, n=weight.n, k=k, x=x.data_ptr(), x_pitch=pitch, x_type=FLOAT_TYPES[x.dtype], tile=tile,
            **weight.arguments, **launch.finish(y, bias, activation),
        )  # fmt: skip
    return y


def _expanded(x: Tensor, weight: launch.PackedWeight, bias: Tensor | None, activation: str) -> Tensor:
    """torch's product with the weight (n, k) in x's type."""
    gelu = bool(activation_code(activation))
    dense = x.new_empty(weight.n, x.shape[1])
    if x.shape[0] and dense.numel():
        launch.extension().expand_weight(
            n=weight.n, k=x.shape[1], out=dense.data_ptr(), out_type=FLOAT_TYPES[x.dtype],
            stream=launch.stream_of(x.device), **weight.arguments,
        )  # fmt: skip
    y = torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    return torch.nn.functional.gelu(y) if gelu else y
