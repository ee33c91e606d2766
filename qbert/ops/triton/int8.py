"""Launcher of the int8 linears, `kernels/int8_gemm.py`: the tile of `tiles`, or one for any shape where that cannot run."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from qbert.ops import checks
from qbert.ops.abi import Activation
from qbert.ops.kernel import Problem
from qbert.ops.operands import require_operands
from qbert.ops.operations import Linear
from qbert.ops.triton.arguments import End, Int8Meta, end_of
from qbert.ops.triton.launch import descriptor, layout_obstacle, require_weight, target_for
from qbert.target import Target
from qbert.tiles import TMA_SM, TileConfig, select_tile
from qbert.weight import Layout

LAYOUTS = frozenset({Layout.INT8_ROWS, Layout.PLAIN})
_KEY = "w8a8_linear"  # of the tiles' table
# What the copy engine asks of a row, in bytes.
_ROW_MULTIPLE = 16
# For shapes that no descriptor can say, and for GPUs with too little shared memory for the table's tile. Eight warps and short
# steps, because rows that start anywhere are loaded byte by byte, and a thread keeps an address for each.
ANY_SHAPE = TileConfig("pointer", block_t=64, block_n=64, block_k=64, warps=8, stages=3)
_THREADS_A_WARP = 32
_LOGISTIC = (Activation.GELU_TANH, Activation.SILU)
_SUMS_BESIDE_LOGISTIC = 64
MORE_WARPS = TileConfig("tma", block_t=128, block_n=128, block_k=128, warps=8, stages=3)  # 64 sums a thread
# Of the result's staging buffer: a 128 x 256 tile of bfloat16 in two parts leaves room for four stages of copies ahead.
_STAGED_BYTES_A_WARP = 4096
_BARRIER_BYTES = 128  # more than a barrier for each stage
_RESERVED_BYTES = 1024  # of shared memory, that each resident program costs besides its own
# Programs of that many warps fill the register file, at 255 registers a thread.
_RESIDENT_WARPS = 8


def linear(a: Linear) -> Tensor:
    q, weight, activation, out = a.x, a.weight, a.activation, a.out
    assert a.s is not None
    require_operands("linear", q.device, q=q, s=a.s, bias=a.bias)
    require_weight("linear", q.device, weight)
    target = target_for(q)
    (t, k), n = q.shape, weight.n
    y = q.new_empty(t, n, dtype=checks.out_type(out))
    if y.numel():
        tile = tile_for(t, n, k, y.element_size(), target, activation)
        # Without fused multiply-adds: the reference rounds the product with a scale before it adds the bias.
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
        meta = Int8Meta(tile.block_t, tile.block_n, tile.block_k, int(activation))
        _LAUNCH[tile.road](_Operands(q, weight.qdata, y, end_of(a)), tile, meta, target, options)
    return y


def obstacle(problem: Problem) -> str | None:
    """Why not this problem on a GPU that the kernels run on; None where they compute it."""
    return layout_obstacle(problem, LAYOUTS)


def spills(tile: TileConfig, out_bytes: int, activation: Activation) -> bool:
    """Whether the sums of a thread, a logistic function of them and their rounding to codes need more registers than it has."""
    sums = tile.block_t * tile.block_n // (_THREADS_A_WARP * tile.warps)
    return out_bytes == 1 and activation in _LOGISTIC and tile.road == "tma" and sums > _SUMS_BESIDE_LOGISTIC


def tile_for(
    t: int, n: int, k: int, out_bytes: int, target: Target, activation: Activation = Activation.NONE
) -> TileConfig:
    """The tile that runs t tokens, n output and k input channels with results of `out_bytes` each."""
    tile = select_tile(_KEY, t, n, k, target)
    if spills(tile, out_bytes, activation):
        tile = MORE_WARPS
    fits = shared_bytes(tile, out_bytes) <= target.shared_memory
    if tile.road != "pointer":
        rows = (k, n * out_bytes) if tile.road == "tma" else (k,)  # bytes of a row of what is copied by descriptor
        fits &= target.sm >= TMA_SM and all(row > 0 and row % _ROW_MULTIPLE == 0 for row in rows)
    return tile if fits else ANY_SHAPE


def subtiles(tile: TileConfig, out_bytes: int) -> int:
    """In how many parts a `tma` tile is stored."""
    return max(1, tile.block_t * tile.block_n * out_bytes // (_STAGED_BYTES_A_WARP * tile.warps))


def shared_bytes(tile: TileConfig, out_bytes: int) -> int:
    """An upper bound of a program's shared memory."""
    copies = tile.stages * (tile.block_t + tile.block_n) * tile.block_k
    result = tile.block_t * tile.block_n * out_bytes
    if tile.road != "tma":
        return max(copies, result) + _BARRIER_BYTES  # the result goes where the copies were
    scales = 4 * max(tile.block_t, tile.block_n)  # on their way from one register layout to another
    return copies + result // subtiles(tile, out_bytes) + scales + _BARRIER_BYTES


def programs(tile: TileConfig, t: int, n: int, out_bytes: int, target: Target) -> int:
    """Persistent programs of a `tma` launch: as many as are resident, one a tile at most."""
    resident = (target.shared_memory + _RESERVED_BYTES) // (shared_bytes(tile, out_bytes) + _RESERVED_BYTES)
    resident = max(1, min(resident, _RESIDENT_WARPS // tile.warps))
    return min(_tiles(tile, t, n), target.sm_count * resident)


def _tiles(tile: TileConfig, t: int, n: int) -> int:
    return -(-t // tile.block_t) * -(-n // tile.block_n)


class _Operands(NamedTuple):
    """What a product is of: tokens (t, k), rows of codes (n, row), the result (t, n), and how it ends."""

    q: Tensor
    qdata: Tensor
    y: Tensor
    end: End


def _launch_tma(a: _Operands, tile: TileConfig, meta: Int8Meta, target: Target, options: dict[str, Any]) -> None:
    from qbert.kernels.int8_gemm import int8_gemm_tma

    (t, n), k, out_bytes = a.y.shape, a.q.shape[1], a.y.element_size()
    parts = subtiles(tile, out_bytes)
    int8_gemm_tma[(programs(tile, t, n, out_bytes, target),)](
        descriptor(a.q, tile.block_t, tile.block_k), descriptor(a.qdata, tile.block_n, tile.block_k),
        descriptor(a.y, tile.block_t, tile.block_n // parts), a.end, t, (n, k),
        META=meta._replace(GROUP=tile.group, SUBTILES=parts), **options,
    )  # fmt: skip


def _launch_few(a: _Operands, tile: TileConfig, meta: Int8Meta, target: Target, options: dict[str, Any]) -> None:
    from qbert.kernels.int8_gemm import int8_gemm_few

    (t, n), k = a.y.shape, a.q.shape[1]
    int8_gemm_few[(-(-n // tile.block_n), -(-t // tile.block_t))](
        descriptor(a.q, tile.block_t, tile.block_k), descriptor(a.qdata, tile.block_n, tile.block_k), a.y, a.end, t,
        (n, k), META=meta, **options,
    )  # fmt: skip


def _launch_pointer(a: _Operands, tile: TileConfig, meta: Int8Meta, target: Target, options: dict[str, Any]) -> None:
    from qbert.kernels.int8_gemm import int8_gemm_pointer

    (t, n), k = a.y.shape, a.q.shape[1]
    meta = meta._replace(GROUP=tile.group, EVEN_K=k % tile.block_k == 0)
    int8_gemm_pointer[(_tiles(tile, t, n),)](
        a.q, a.qdata, a.y, a.end, t, (n, k, a.qdata.shape[1]), META=meta, **options
    )  # fmt: skip


_LAUNCH = {"tma": _launch_tma, "few": _launch_few, "pointer": _launch_pointer}
