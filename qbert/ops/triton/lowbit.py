"""L5. Launchers of the integer linears with packed weights: int4 with group scales, and dictionaries with outliers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qbert.formats import DICT4
from qbert.layout import Layout
from qbert.layout.rows import HALF, K_BLOCK, ROW_ALIGNMENT
from qbert.ops import checks
from qbert.ops.cpu_native import activation_code
from qbert.ops.triton.launch import INTERPRETED, require_operands, target_for
from qbert.tiles import TMA_SM, TileConfig, select_tile

# Registers of a thread such that a multiprocessor holds sixteen warps, two of the largest programs: the matrix unit works
# for one program while the other expands weights or ends a tile, for Triton lets neither overlap with its own program's.
MAX_REGISTERS = 65_536 // (16 * 32)
# NVIDIA's byte permutation, in inline assembly, which neither other GPUs nor Triton's interpreter have.
_PRMT = torch.version.hip is None and not INTERPRETED
_TURNED_TOKENS = 128  # of a tile whose outliers read tokens column by column; see `kernels/outliers.py`
_FINISH_TILE = {"BLOCK_T": 16, "BLOCK_N": 128}


def w4a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out_dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    """`w4a8_linear` by `kernels/int4_gemm.py`.

    `NotImplemented` for another layout than nibble halves, and for groups that are neither 32 or 64 weights nor whole blocks.
    """
    out_type = checks.out_type(out_dtype)
    return _w4a8(q, s, qdata, group_scale, scale, bias, activation, out_type, 1.0, layout)


def w4a8_linear_requant(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out_scale: float, layout: str,
) -> Tensor:  # fmt: skip
    """`w4a8_linear_requant`, likewise."""
    return _w4a8(q, s, qdata, group_scale, scale, bias, activation, torch.int8, 1.0 / out_scale, layout)


def gobo_linear(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor,
    outlier_delta: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype, layout: str,
) -> Tensor:  # fmt: skip
    """`gobo_linear` by `kernels/gobo_gemm.py`; `NotImplemented` for another layout than select halves."""
    outliers, out_type = (outlier_rowptr, outlier_col, outlier_delta), checks.out_type(out_dtype)
    return _gobo(q, s, qdata, codebook, scale, outliers, bias, activation, out_type, 1.0, layout)


def gobo_linear_requant(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outlier_rowptr: Tensor, outlier_col: Tensor,
    outlier_delta: Tensor, bias: Tensor | None, activation: str, out_scale: float, layout: str,
) -> Tensor:  # fmt: skip
    """`gobo_linear_requant`, likewise."""
    outliers = outlier_rowptr, outlier_col, outlier_delta
    return _gobo(q, s, qdata, codebook, scale, outliers, bias, activation, torch.int8, 1.0 / out_scale, layout)


KERNELS: dict[str, Callable[..., Any]] = {
    "w4a8_linear": w4a8_linear,
    "w4a8_linear_requant": w4a8_linear_requant,
    "gobo_linear": gobo_linear,
    "gobo_linear_requant": gobo_linear_requant,
}


def _w4a8(
    q: Tensor, s: Tensor, qdata: Tensor, group_scale: Tensor, scale: Tensor, bias: Tensor | None, activation: str,
    out_type: torch.dtype, inverse_out_scale: float, layout: str,
) -> Tensor:  # fmt: skip
    n = checks.w4a8_linear(q, s, qdata, group_scale, scale, bias, layout)
    gelu = bool(activation_code(activation))
    if layout != Layout.NIBBLE_HALVES.value:
        return NotImplemented
    groups = group_scale.shape[1]
    group_size = q.shape[1] // groups if q.shape[1] else K_BLOCK
    if group_size not in (HALF // 2, HALF) and group_size % K_BLOCK:
        return NotImplemented
    require_operands("w4a8_linear", q.device, q=q, s=s, qdata=qdata, group_scale=group_scale, scale=scale, bias=bias)
    y = q.new_empty(q.shape[0], n, dtype=out_type)
    if y.numel() == 0:
        return y
    from qbert.kernels.int4_gemm import int4_finish_kernel, int4_gemm_kernel

    plan = _plan("w4a8_linear", q, qdata, n)
    (t, k), vectors, flags = plan.q.shape, (scale, bias), {"HAS_BIAS": bias is not None, "GELU": gelu}
    int4_gemm_kernel[plan.grid](
        plan.tokens, s, plan.codes, group_scale, *vectors, plan.out(y), inverse_out_scale, t, n, k, groups,
        GROUP_SIZE=group_size, **flags, **plan.options,
    )  # fmt: skip
    if plan.sums is not None:
        int4_finish_kernel[_finish_grid(t, n)](
            plan.sums, s, *vectors, y, inverse_out_scale, t, n, **flags, **plan.finish_options
        )
    return y


def _gobo(
    q: Tensor, s: Tensor, qdata: Tensor, codebook: Tensor, scale: Tensor, outliers: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None, activation: str, out_type: torch.dtype, inverse_out_scale: float, layout: str,
) -> Tensor:  # fmt: skip
    n = checks.gobo_linear(q, s, qdata, codebook, scale, *outliers, bias, layout)
    gelu = bool(activation_code(activation))
    if layout != Layout.SELECT_HALVES.value:
        return NotImplemented
    rowptr, col, delta = outliers
    require_operands(
        "gobo_linear", q.device, q=q, s=s, qdata=qdata, codebook=codebook, scale=scale, outlier_rowptr=rowptr,
        outlier_col=col, outlier_delta=delta, bias=bias,
    )  # fmt: skip
    y = q.new_empty(q.shape[0], n, dtype=out_type)
    if y.numel() == 0:
        return y
    from qbert.kernels.gobo_gemm import gobo_finish_kernel, gobo_gemm_kernel

    plan = _plan("gobo_linear", q, qdata, n)
    (t, k), bits = plan.q.shape, 4 if codebook.shape[-1] == DICT4.codes else 3
    turned = bool(col.numel()) and plan.sums is None and _turns(plan.tile)
    flags = {"OUTLIERS": bool(col.numel()), "HAS_BIAS": bias is not None, "GELU": gelu}
    gobo_gemm_kernel[plan.grid](
        plan.tokens, s, plan.codes, codebook.view(torch.int32), scale, *outliers, _columns(plan.q) if turned else plan.q,
        bias, plan.out(y), inverse_out_scale, t, n, k, scale.numel(),
        BITS=bits, TURNED=turned, WARPS=plan.tile.warps, **flags, **plan.options,
    )  # fmt: skip
    if plan.sums is not None:
        gobo_finish_kernel[_finish_grid(t, n)](
            plan.sums, s, scale, *outliers, plan.q, bias, y, inverse_out_scale, t, n, k, scale.numel(),
            **flags, **plan.finish_options,
        )  # fmt: skip
    return y


class _Plan(NamedTuple):
    """How a product is launched.

    Attributes:
        tile: of the table.
        q: (t, k) codes, k a multiple of 16.
        tokens, codes: q and the packed weight as the kernel takes them.
        sums: (split, t, n) int32 where programs share a tile's input channels, else None.
        grid, options, finish_options: of the launches.
    """

    tile: TileConfig
    q: Tensor
    tokens: Any
    codes: Any
    sums: Tensor | None
    grid: tuple[int, int]
    options: dict[str, Any]
    finish_options: dict[str, Any]

    def out(self, y: Tensor) -> Tensor:
        """Where the product goes."""
        return y if self.sums is None else self.sums


def _plan(operation: str, q: Tensor, qdata: Tensor, n: int) -> _Plan:
    target = target_for(q)
    # Rows of 16 bytes, as copies want them: a copy of q costs less than copying it byte by byte.
    q = q if q.shape[1] % ROW_ALIGNMENT == 0 else torch.nn.functional.pad(q, (0, -q.shape[1] % ROW_ALIGNMENT))
    t, k = q.shape
    tile = select_tile(operation, t, n, k, target)
    tma = tile.road != "pointer" and target.sm >= TMA_SM and k > 0
    split = max(1, min(tile.split_k, -(-k // K_BLOCK)))
    launch = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    if tile.road == "tma" and tile.block_t * tile.block_n <= MAX_REGISTERS // 2 * 32 * tile.warps:
        launch["maxnreg"] = MAX_REGISTERS  # half of them hold sums
    options = {"BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n, "GROUP": tile.group, "TMA": tma, "PRMT": _PRMT}
    return _Plan(
        tile,
        q,
        _descriptor(q, tile.block_t, K_BLOCK) if tma else q,
        _descriptor(qdata, tile.block_n, HALF) if tma else qdata,
        q.new_empty(split, t, n, dtype=torch.int32) if split > 1 else None,
        (-(-t // tile.block_t) * -(-n // tile.block_n), split),
        {**options, "SPLIT_K": split, **launch},
        {**_FINISH_TILE, "SPLIT_K": split, "enable_fp_fusion": False},
    )


def _turns(tile: TileConfig) -> bool:
    """Whether outliers read tokens column by column: in tiles that `add_outliers_turned` is written for."""
    return tile.block_t == _TURNED_TOKENS and tile.block_n % (16 * tile.warps) == 0


def _columns(q: Tensor) -> Tensor:
    """q (t, k) column by column, as `add_outliers_turned` reads it: whole tiles of tokens."""
    from qbert.kernels.outliers import columns_kernel

    (t, k), blocks = q.shape, -(-q.shape[0] // _TURNED_TOKENS) * (_TURNED_TOKENS // HALF)
    columns = q.new_empty(blocks, k, HALF)
    columns_kernel[(blocks, -(-k // K_BLOCK))](q, columns, t, k, BLOCK_K=K_BLOCK)
    return columns


def _finish_grid(t: int, n: int) -> tuple[int, int]:
    return -(-t // _FINISH_TILE["BLOCK_T"]), -(-n // _FINISH_TILE["BLOCK_N"])


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """How the copy engine reads blocks (rows, columns) of a contiguous matrix."""
    (height, width) = matrix.shape
    return _descriptor_class()(matrix, [height, width], [width, 1], [rows, columns])


@functools.cache
def _descriptor_class() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor
