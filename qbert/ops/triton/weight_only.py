"""L5. Launchers of the weight-only linears: float activations, packed weights.

Two roads, chosen by `streams`, before anything is launched:

    streamed    `kernels/weight_only.py`: the weights are read as they are packed, once for at most 64 tokens
    expanded    `kernels/dequantize.py` writes the weight in x's type, torch's linear multiplies: what torch's own settings say
                about float32 (TF32) and float16 products holds there
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qbert.formats import DICT3, DICT4, INT4, INT8, Format
from qbert.layout import Layout
from qbert.ops import checks
from qbert.ops.cpu_native import activation_code
from qbert.ops.triton.launch import INTERPRETED, require_operands, target_for
from qbert.tiles import TileConfig, select_tile

STREAMED_LAYOUTS = frozenset({Layout.INT8_ROWS, Layout.NIBBLE_HALVES, Layout.SELECT_HALVES, Layout.DICT3_WORDS})
EXPANDED_LAYOUTS = STREAMED_LAYOUTS | {Layout.PLAIN}
FEW_TOKENS = 64  # that share a reading of the weights
# With more, mma.sync would be the bound and not bytes: torch's product runs on faster instructions.
MOST_STREAMED_TOKENS = 256
# Without a matrix unit two tokens share a decoding of the weights, and torch's product soon makes up for the expansion.
MOST_STREAMED_FLOAT32_TOKENS = 16
GROUP_MULTIPLE = 32  # input channels of a scale that the streaming kernel can tell apart
_FLOAT32_TOKENS = 2  # of a program
_GROUPS_OF_32_TOKENS = 32  # of a program that loads each activation for two groups: registers have no room for more
_OUTLIERS = {8: 8, 16: 4}  # of a row at a time, by a program's tokens; two where there are other numbers of tokens
_EXPAND_BLOCK, _EXPAND_WARPS = 1024, 4
# NVIDIA's byte permutation, in inline assembly, which neither other GPUs nor Triton's interpreter have.
_PRMT = torch.version.hip is None and not INTERPRETED


@dataclass(frozen=True)
class _Weight:
    """A packed (n, k) weight: its codes, and what makes weights of them."""

    fmt: Format
    layout: Layout
    n: int
    qdata: Tensor
    scale: Tensor | None = None
    group: int = 0
    codebook: Tensor | None = None
    outliers: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)

    @property
    def has_outliers(self) -> bool:
        return self.outliers[1] is not None and self.outliers[1].numel() > 0


def streams(t: int, fmt: Format, layout: Layout, group: int, dtype: torch.dtype) -> bool:
    """Whether t tokens of `dtype` multiply the packed weights themselves, rather than a weight that is expanded first.

    By bytes a weight: streaming reads the codes once for `FEW_TOKENS` tokens; expanding reads them once, writes a weight of
    `dtype` and reads it.
    """
    if layout not in STREAMED_LAYOUTS or group % GROUP_MULTIPLE:
        return False
    most = MOST_STREAMED_FLOAT32_TOKENS if dtype == torch.float32 else MOST_STREAMED_TOKENS
    readings = -(-t // FEW_TOKENS)
    return t <= most and readings * fmt.bits / 8 <= fmt.bits / 8 + 2 * dtype.itemsize


def tokens_of(tile: TileConfig, t: int, group: int, dtype: torch.dtype) -> int:
    """Tokens of a program: the tile's, less where its registers have no room for them."""
    if dtype == torch.float32:
        return min(t, _FLOAT32_TOKENS)
    return min(tile.block_t, _GROUPS_OF_32_TOKENS) if group % (2 * GROUP_MULTIPLE) else tile.block_t


def outliers_of(tokens: int) -> int:
    """Outliers of a row that a program of so many tokens adds at a time."""
    return _OUTLIERS.get(tokens, 2)


def w8a16_linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str) -> Tensor:
    """`w8a16_linear`; layouts: int8 rows, and expanded, plain. Others give `NotImplemented`."""
    n = checks.w8a16_linear(x, qdata, scale, bias, layout)
    return _linear("w8a16_linear", x, _Weight(INT8, Layout(layout), n, qdata, scale), bias, activation)


def w4a16_linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, layout: str) -> Tensor:
    """`w4a16_linear`; layouts: nibble halves, and expanded, plain. Others give `NotImplemented`.

    Groups of other than multiples of 32 input channels are expanded, too.
    """
    n = checks.w4a16_linear(x, qdata, scale, bias, layout)
    group = x.shape[1] // max(1, scale.shape[1])
    return _linear("w4a16_linear", x, _Weight(INT4, Layout(layout), n, qdata, scale, group), bias, activation)


def gobo_a16_linear(
    x: Tensor, qdata: Tensor, codebook: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor, outlier_delta: Tensor,
    bias: Tensor | None, activation: str, layout: str,
) -> Tensor:  # fmt: skip
    """`gobo_a16_linear`; layouts: words of 3 bits, select halves, and expanded, plain. Others give `NotImplemented`."""
    outliers = outlier_rowptr, outlier_col, outlier_delta
    n = checks.gobo_a16_linear(x, qdata, codebook, *outliers, bias, layout)
    fmt = DICT3 if codebook.numel() == DICT3.codes else DICT4
    weight = _Weight(fmt, Layout(layout), n, qdata, codebook=codebook, outliers=outliers)
    return _linear("gobo_a16_linear", x, weight, bias, activation)


KERNELS: dict[str, Callable[..., Any]] = {
    "w8a16_linear": w8a16_linear,
    "w4a16_linear": w4a16_linear,
    "gobo_a16_linear": gobo_a16_linear,
}


def _linear(operation: str, x: Tensor, weight: _Weight, bias: Tensor | None, activation: str) -> Tensor:
    gelu = bool(activation_code(activation))
    if weight.layout not in EXPANDED_LAYOUTS:
        return NotImplemented
    rowptr, col, delta = weight.outliers
    require_operands(
        operation, x.device, qdata=weight.qdata, scale=weight.scale, codebook=weight.codebook, outlier_rowptr=rowptr,
        outlier_col=col, outlier_delta=delta, bias=bias,
    )  # fmt: skip
    t, k = x.shape
    if k and streams(t, weight.fmt, weight.layout, weight.group, x.dtype):
        return _streamed(operation, x.contiguous(), weight, bias, gelu)
    y = torch.nn.functional.linear(x, _expanded(x, weight), None if bias is None else bias.to(x.dtype))
    return torch.nn.functional.gelu(y) if gelu else y


def _streamed(operation: str, x: Tensor, weight: _Weight, bias: Tensor | None, gelu: bool) -> Tensor:
    import triton

    from qbert.kernels.weight_only import ROWS, weight_only_kernel

    (t, k), n = x.shape, weight.n
    y = x.new_empty(t, n)
    tile = select_tile(operation, min(t, FEW_TOKENS), n, k, target_for(x))
    block_t, repeats = tokens_of(tile, t, weight.group, x.dtype), tile.block_n // ROWS.value
    if y.numel():
        weight_only_kernel[(triton.cdiv(t, block_t) * triton.cdiv(n, ROWS.value * repeats),)](
            x, weight.qdata.view(torch.int32), weight.codebook, weight.scale, *weight.outliers, bias, y, t, n, k,
            weight.qdata.shape[1] // 16, LAYOUT=weight.layout.value, BITS=weight.fmt.bits, GROUP=weight.group,
            OUTLIERS=outliers_of(block_t) if weight.has_outliers else 0, HAS_BIAS=bias is not None, GELU=gelu,
            BLOCK_T=block_t, REPEATS=repeats, WARPS=tile.warps, PRMT=_PRMT, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def _expanded(x: Tensor, weight: _Weight) -> Tensor:
    """The weight (n, k) in x's type."""
    from qbert.kernels.dequantize import dequantize_kernel

    n, k = weight.n, x.shape[1]
    out = x.new_empty(n, k)
    target_for(x)
    if out.numel():
        dequantize_kernel[(n,)](
            weight.qdata.view(torch.uint8), weight.codebook, weight.scale, *weight.outliers, out, k, weight.qdata.shape[1],
            LAYOUT=weight.layout.value, BITS=weight.fmt.bits, DICTIONARY=weight.codebook is not None, GROUP=weight.group,
            OUTLIERS=weight.has_outliers, BLOCK_K=_EXPAND_BLOCK, num_warps=_EXPAND_WARPS,
        )  # fmt: skip
    return out
