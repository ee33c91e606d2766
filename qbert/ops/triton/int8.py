"""L5. Launchers of the int8 linears: the tile of `tiles`, or one for any shape where the tile's road cannot be taken."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.layout import Layout
from qbert.ops import checks
from qbert.ops.cpu_native import activation_code
from qbert.ops.triton.launch import require_operands, target_for
from qbert.target import Target
from qbert.tiles import TMA_SM, TileConfig, select_tile

_LAYOUTS = (Layout.INT8_ROWS.value, Layout.PLAIN.value)
# What the copy engine asks of a row, in bytes.
_ROW_MULTIPLE = 16
# For shapes that no descriptor can say, and for GPUs with too little shared memory for the table's tile. Eight warps and short
# steps, because rows that start anywhere are loaded byte by byte, and a thread keeps an address for each.
ANY_SHAPE = TileConfig("pointer", block_t=64, block_n=64, block_k=64, warps=8, stages=3)
# Of the result's staging buffer: a 128 x 256 tile of bfloat16 in two parts leaves room for four stages of copies ahead.
_STAGED_BYTES_A_WARP = 4096
_BARRIER_BYTES = 128  # more than a barrier for each stage
_RESERVED_BYTES = 1024  # of shared memory, that each resident program costs besides its own
# Programs of that many warps fill the register file, at 255 registers a thread.
_RESIDENT_WARPS = 8


def w8a8_linear(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype,
    layout: str,
) -> Tensor:  # fmt: skip
    """`w8a8_linear` by `kernels/int8_gemm.py`; `NotImplemented` for a layout other than rows of codes."""
    return _linear(q, s, qdata, scale, bias, activation, checks.out_type(out_dtype), 1.0, layout)


def w8a8_linear_requant(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, out_scale: float, layout: str
) -> Tensor:  # fmt: skip
    """`w8a8_linear_requant`, likewise."""
    return _linear(q, s, qdata, scale, bias, activation, torch.int8, 1.0 / out_scale, layout)


def _linear(
    q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype,
    inverse_out_scale: float, layout: str,
) -> Tensor:  # fmt: skip
    n = checks.w8a8_linear(q, s, qdata, scale, bias, layout)
    gelu = bool(activation_code(activation))
    if layout not in _LAYOUTS:
        return NotImplemented
    require_operands("w8a8_linear", q.device, q=q, s=s, qdata=qdata, scale=scale, bias=bias)
    target = target_for(q)
    t, k = q.shape
    out = q.new_empty(t, n, dtype=dtype)
    if t and n:
        tile = tile_for(t, n, k, dtype.itemsize, target)
        # Without fused multiply-adds: the reference rounds the product with a scale before it adds the bias.
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
        vectors = (s, scale, bias, inverse_out_scale)
        blocks = {"BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        epilogue = {"HAS_BIAS": bias is not None, "GELU": gelu}
        _LAUNCH[tile.road](q, qdata, out, vectors, tile, target, **blocks, **epilogue, **options)
    return out


def tile_for(t: int, n: int, k: int, out_bytes: int, target: Target) -> TileConfig:
    """The tile that runs t tokens, n output and k input channels with results of `out_bytes` each."""
    tile = select_tile("w8a8_linear", t, n, k, target)
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


def _launch_tma(
    q: Tensor, qdata: Tensor, out: Tensor, vectors: tuple[Any, ...], tile: TileConfig, target: Target, **options: Any
) -> None:
    from qbert.kernels.int8_gemm import int8_gemm_tma

    (t, n), k, out_bytes = out.shape, q.shape[1], out.element_size()
    parts = subtiles(tile, out_bytes)
    int8_gemm_tma[(programs(tile, t, n, out_bytes, target),)](
        _descriptor(q, tile.block_t, tile.block_k), _descriptor(qdata, tile.block_n, tile.block_k),
        _descriptor(out, tile.block_t, tile.block_n // parts), *vectors, t, n, k,
        GROUP=tile.group, SUBTILES=parts, **options,
    )  # fmt: skip


def _launch_few(
    q: Tensor, qdata: Tensor, out: Tensor, vectors: tuple[Any, ...], tile: TileConfig, target: Target, **options: Any
) -> None:
    from qbert.kernels.int8_gemm import int8_gemm_few

    (t, n), k = out.shape, q.shape[1]
    int8_gemm_few[(-(-n // tile.block_n), -(-t // tile.block_t))](
        _descriptor(q, tile.block_t, tile.block_k), _descriptor(qdata, tile.block_n, tile.block_k), out, *vectors, t, n, k,
        **options,
    )  # fmt: skip


def _launch_pointer(
    q: Tensor, qdata: Tensor, out: Tensor, vectors: tuple[Any, ...], tile: TileConfig, target: Target, **options: Any
) -> None:
    from qbert.kernels.int8_gemm import int8_gemm_pointer

    (t, n), k = out.shape, q.shape[1]
    int8_gemm_pointer[(_tiles(tile, t, n),)](
        q, qdata, out, *vectors, t, n, k, qdata.shape[1], GROUP=tile.group, EVEN_K=k % tile.block_k == 0, **options
    )


_LAUNCH = {"tma": _launch_tma, "few": _launch_few, "pointer": _launch_pointer}


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """How the copy engine reads or writes blocks (rows, columns) of a contiguous matrix."""
    (height, width) = matrix.shape
    return _descriptor_class()(matrix, [height, width], [width, 1], [rows, columns])


@functools.cache
def _descriptor_class() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


KERNELS: dict[str, Callable[..., Any]] = {"w8a8_linear": w8a8_linear, "w8a8_linear_requant": w8a8_linear_requant}
