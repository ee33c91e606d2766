"""Launchers of the weight-only linears: float activations, packed weights.

Two roads, chosen by `streams`, before anything is launched:

    streamed    `kernels/weight_only.py`: the weights are read as they are packed, once for at most 64 tokens
    expanded    `kernels/dequantize.py` writes the weight in x's type, torch's linear multiplies: what torch's own settings say
                about float32 (TF32) and float16 products holds there
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.formats import Format
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import Linear
from qbert.ops.reference import activated
from qbert.ops.triton.arguments import ExpandMeta, Packed, Shape, WeightOnlyMeta
from qbert.ops.triton.launch import INTERPRETED, layout_obstacle, require_weight, target_for
from qbert.tiles import TileConfig, select_tile, tile_key
from qbert.weight import Layout, Weight

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


def streams(t: int, fmt: Format, layout: Layout, group: int, dtype: torch.dtype) -> bool:
    """Whether t tokens of `dtype` multiply the packed weights themselves, rather than a weight that is expanded first.

    By bytes a weight: streaming reads the codes once for `FEW_TOKENS` tokens; expanding reads them once, writes a weight of
    `dtype` and reads it.

    Args:
        group: weights that share a scale, 0 where a row or none has one.
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


def linear(a: Linear) -> Tensor:
    x, weight, bias = a.x, a.weight, a.bias
    require_operands("linear", x.device, bias=bias)
    require_weight("linear", x.device, weight)
    t, k = x.shape
    if k and streams(t, weight.scheme.weight, weight.layout, weight.scheme.group_size or 0, x.dtype):
        return _streamed(a._replace(x=x.contiguous()))
    y = torch.nn.functional.linear(x, _expanded(x, weight), None if bias is None else bias.to(x.dtype))
    return activated(y, a.activation, gated=False)


def obstacle(problem: Problem) -> str | None:
    """Why not this problem on a GPU that the kernels run on; None where they compute it."""
    return layout_obstacle(problem, EXPANDED_LAYOUTS)


def _streamed(a: Linear) -> Tensor:
    import triton

    from qbert.kernels.weight_only import ROWS, weight_only_kernel

    x, weight, scheme = a.x, a.weight, a.weight.scheme
    (t, k), n, group = x.shape, weight.n, scheme.group_size or 0
    y = x.new_empty(t, n)
    tile = select_tile(tile_key(scheme), min(t, FEW_TOKENS), n, k, target_for(x))
    block_t, repeats = tokens_of(tile, t, group, x.dtype), tile.block_n // ROWS.value
    meta = WeightOnlyMeta(
        weight.layout.value, scheme.weight_bits, group, outliers_of(block_t), int(a.activation), block_t, repeats,
        tile.warps, _PRMT,
    )  # fmt: skip
    if y.numel():
        weight_only_kernel[(triton.cdiv(t, block_t) * triton.cdiv(n, ROWS.value * repeats),)](
            x, weight.prepared(_in_words), a.bias, y, Shape(t, n, k), META=meta, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    return y


def _expanded(x: Tensor, weight: Weight) -> Tensor:
    """The weight (n, k) in x's type."""
    from qbert.kernels.dequantize import dequantize_kernel

    n, k = weight.shape
    out = x.new_empty(n, k)
    target_for(x)
    if out.numel():
        meta = ExpandMeta(weight.layout.value, weight.scheme.weight_bits, weight.scheme.group_size or 0, _EXPAND_BLOCK)
        dequantize_kernel[(n,)](weight.prepared(_in_bytes), out, k, META=meta, num_warps=_EXPAND_WARPS)
    return out


def _in_words(weight: Weight) -> Packed:
    """As `weight_only_kernel` takes a weight."""
    return _packed(weight, weight.qdata.view(torch.int32), weight.qdata.shape[1] // 16)


def _in_bytes(weight: Weight) -> Packed:
    """As `dequantize_kernel` takes a weight."""
    return _packed(weight, weight.qdata.view(torch.uint8), weight.qdata.shape[1])


def _packed(weight: Weight, codes: Tensor, pitch: int) -> Packed:
    return Packed(codes, pitch, weight.codebook, weight.scale, weight.sparse if weight.outliers else None)
