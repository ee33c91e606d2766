"""Launchers of the integer linears with packed weights: int4 with group scales, and dictionaries with outliers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qbert.ops import checks
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import Linear
from qbert.ops.triton.arguments import Dictionaries, Groups, LowbitMeta, Shape, end_of
from qbert.ops.triton.launch import (
    INTERPRETED,
    descriptor,
    layout_obstacle,
    require_weight,
    target_for,
)
from qbert.tiles import TMA_SM, TileConfig, select_tile, tile_key
from qbert.weight import Layout
from qbert.weight.layout.rows import HALF, K_BLOCK, ROW_ALIGNMENT

# Whether a scheme has a dictionary -> layouts.
LAYOUTS = {False: frozenset({Layout.NIBBLE_HALVES}), True: frozenset({Layout.SELECT_HALVES})}
# Registers of a thread such that a multiprocessor holds sixteen warps, two of the largest programs: the matrix unit works
# for one program while the other expands weights or ends a tile, for Triton lets neither overlap with its own program's.
MAX_REGISTERS = 65_536 // (16 * 32)
# NVIDIA's byte permutation, in inline assembly, which neither other GPUs nor Triton's interpreter have.
_PRMT = torch.version.hip is None and not INTERPRETED
_TURNED_TOKENS = 128  # of a tile whose outliers read tokens column by column; see `kernels/outliers.py`
_FINISH_T, _FINISH_N = 16, 128  # tile of the kernel that adds partial sums up


def linear(a: Linear) -> Tensor:
    """`kernels/int4_gemm.py` or, of dictionaries, `kernels/gobo_gemm.py`."""
    assert a.s is not None
    require_operands("linear", a.x.device, q=a.x, s=a.s, bias=a.bias)
    require_weight("linear", a.x.device, a.weight)
    y = a.x.new_empty(a.x.shape[0], a.weight.n, dtype=checks.out_type(a.out))
    if y.numel():
        plan = _plan(a)
        (_dictionary if a.weight.scheme.has_dictionary else _int4)(a, y, plan)
    return y


def obstacle(problem: Problem) -> str | None:
    """Why not this problem on a GPU that the kernels run on; None where they compute it."""
    assert problem.scheme is not None
    group = problem.scheme.group_size
    if group is not None and group not in (HALF // 2, HALF) and group % K_BLOCK:
        return f"groups of {group}; it takes groups of {HALF // 2}, {HALF} or multiples of {K_BLOCK}"
    return layout_obstacle(problem, LAYOUTS[problem.scheme.has_dictionary])


def _int4(a: Linear, y: Tensor, plan: _Plan) -> None:
    from qbert.kernels.int4_gemm import int4_finish_kernel, int4_gemm_kernel

    group_scale = a.weight.tensors["group_scale"]
    (t, n), groups = y.shape, Groups(group_scale, group_scale.shape[1])
    end, shape = end_of(a), Shape(t, n, plan.q.shape[1])
    meta = plan.meta._replace(GROUP_SIZE=a.weight.scheme.group_size or 0)
    int4_gemm_kernel[plan.grid](plan.tokens, plan.codes, groups, plan.out(y), end, shape, META=meta, **plan.options)
    if plan.sums is not None:
        int4_finish_kernel[_finish_grid(t, n)](plan.sums, y, end, shape, META=plan.finish_meta, enable_fp_fusion=False)


def _dictionary(a: Linear, y: Tensor, plan: _Plan) -> None:
    from qbert.kernels.gobo_gemm import gobo_finish_kernel, gobo_gemm_kernel

    (t, n), weight = y.shape, a.weight
    outliers = weight.sparse if weight.outliers else None
    turned = outliers is not None and plan.sums is None and _turns(plan.tile)
    books = weight.tensors["codebook"].view(torch.int32)
    dictionaries = Dictionaries(books, weight.matrices, outliers, _columns(plan.q) if turned else plan.q)
    end, shape = end_of(a), Shape(t, n, plan.q.shape[1])
    meta = plan.meta._replace(BITS=weight.scheme.weight_bits, TURNED=turned, WARPS=plan.tile.warps)
    gobo_gemm_kernel[plan.grid](
        plan.tokens, plan.codes, dictionaries, plan.out(y), end, shape, META=meta, **plan.options
    )  # fmt: skip
    if plan.sums is not None:
        gobo_finish_kernel[_finish_grid(t, n)](
            plan.sums, dictionaries._replace(codebook=None), y, end, shape, META=plan.finish_meta, enable_fp_fusion=False
        )  # fmt: skip


class _Plan(NamedTuple):
    """How a product is launched.

    Attributes:
        tile: of the table.
        q: (t, k) codes, k a multiple of 16.
        tokens, codes: q and the packed weight as the kernel takes them.
        sums: (split, t, n) int32 where programs share a tile's input channels, else None.
        grid, options: of the launch.
        meta: what the kernel is compiled for, without what its codes are.
    """

    tile: TileConfig
    q: Tensor
    tokens: Any
    codes: Any
    sums: Tensor | None
    grid: tuple[int, int]
    options: dict[str, Any]
    meta: LowbitMeta

    @property
    def finish_meta(self) -> LowbitMeta:
        """Of the kernel that adds partial sums up."""
        return LowbitMeta(_FINISH_T, _FINISH_N, self.meta.SPLIT_K, self.meta.ACTIVATION)

    def out(self, y: Tensor) -> Tensor:
        """Where the product goes."""
        return y if self.sums is None else self.sums


def _plan(a: Linear) -> _Plan:
    q, qdata, n, target = a.x, a.weight.qdata, a.weight.n, target_for(a.x)
    # Rows of 16 bytes, as copies want them: a copy of q costs less than copying it byte by byte.
    q = q if q.shape[1] % ROW_ALIGNMENT == 0 else torch.nn.functional.pad(q, (0, -q.shape[1] % ROW_ALIGNMENT))
    t, k = q.shape
    tile = select_tile(tile_key(a.weight.scheme), t, n, k, target)
    tma = tile.road != "pointer" and target.sm >= TMA_SM and k > 0
    split = max(1, min(tile.split_k, -(-k // K_BLOCK)))
    launch = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    if tile.road == "tma" and tile.block_t * tile.block_n <= MAX_REGISTERS // 2 * 32 * tile.warps:
        launch["maxnreg"] = MAX_REGISTERS  # half of them hold sums
    return _Plan(
        tile,
        q,
        descriptor(q, tile.block_t, K_BLOCK) if tma else q,
        descriptor(qdata, tile.block_n, HALF) if tma else qdata,
        q.new_empty(split, t, n, dtype=torch.int32) if split > 1 else None,
        (-(-t // tile.block_t) * -(-n // tile.block_n), split),
        launch,
        LowbitMeta(tile.block_t, tile.block_n, split, int(a.activation), tile.group, TMA=tma, PRMT=_PRMT),
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
    return -(-t // _FINISH_T), -(-n // _FINISH_N)
