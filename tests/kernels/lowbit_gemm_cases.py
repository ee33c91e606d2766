"""What `test_lowbit_gemm` runs in Triton's interpreter and on GPUs: launchers of packed linears against the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.layout import Layout, rows
from qbert.ops.triton import lowbit
from qbert.testing import Arguments, assert_matches_reference, random_arguments
from qbert.tiles import TileConfig, forced

LAYOUTS = {"w4a8_linear": Layout.NIBBLE_HALVES, "gobo_linear": Layout.SELECT_HALVES}
# Small tiles, so that small problems have several. In the first, outliers read tokens column by column.
TILES = {
    "turned": TileConfig("tma", 128, 64, 128, warps=4, stages=2, group=2),
    "tma": TileConfig("tma", 64, 64, 128, warps=4, stages=2, group=2),
    "few": TileConfig("few", 16, 64, 128, warps=4, stages=2, split_k=3),
    "pointer": TileConfig("pointer", 64, 64, 128, warps=4, stages=2, group=2),
}


def arguments_of(operation: str, scheme: str, t: int, n: int, k: int, dtype: str = "float32", **more: Any) -> Arguments:
    """Arguments of a packed linear in the layout that its kernel reads."""
    layout = LAYOUTS[operation.removesuffix("_requant")]
    return random_arguments(operation, t, n, k, scheme=scheme, layout=layout, dtype=getattr(torch, dtype), **more)


def run(operation: str, arguments: Arguments, tile: str | None = None) -> Tensor:
    """The launcher's result, with a tile of `TILES`, or by default the table's."""
    chosen = forced(operation.removesuffix("_requant"), TILES[tile]) if tile else contextlib.nullcontext()
    with chosen:
        return lowbit.KERNELS[operation](*arguments)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within the block new tensors hold a value that no result has: an element that is not written is seen."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *size: Any, **options: Any) -> Tensor:
        return new_empty(self, *size, **options).fill_(-77)

    with mock.patch.object(Tensor, "new_empty", filled):
        yield


def call(name: str, *arguments: Any) -> None:
    """Calls a function of this module."""
    globals()[name](*arguments)


def check(
    operation: str, scheme: str, t: int, n: int, k: int, tile: str | None = None, more: dict[str, Any] | None = None
) -> None:
    """The launcher's result is the reference's; `more` are further arguments of `arguments_of`."""
    arguments = arguments_of(operation, scheme, t, n, k, **(more or {}))
    with poisoned():
        result = run(operation, arguments, tile)
    assert_matches_reference(operation, arguments, result)


def check_every_code(tile: str, device: str = "cpu") -> None:
    """Every int4 code with every group scale gives exact products."""
    n, k, group = 34, 256, 64
    codes = torch.arange(n * k).view(n, k) * 7 % 15 - 7
    scales = torch.arange(n * k // group).view(n, -1) % 18 + 1
    tensors = rows.pack_nibble_halves((codes & 15).to(torch.uint8)), scales.to(torch.uint8), torch.ones(n)
    _check_exact("w4a8_linear", tile, device, tensors, codes * scales.repeat_interleave(group, dim=1))


def check_every_centroid(bits: int, tile: str, device: str = "cpu") -> None:
    """Every code of dictionaries that hold -128 and 127, of two matrices whose bound lies within a tile."""
    n, k, entries = 34, 256, 1 << bits
    codes = torch.arange(n * k).view(n, k) * 5 % entries
    books = torch.stack([torch.linspace(-128, 127, entries), torch.linspace(-20, 100, entries)]).to(torch.int8)
    outliers = torch.zeros(n + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int16), torch.zeros(0)
    tensors = rows.pack_select_halves(codes.to(torch.uint8)), books, torch.ones(2), *outliers
    operand = books.repeat_interleave(n // 2, dim=0).gather(1, codes)
    _check_exact("gobo_linear", tile, device, tensors, operand.to(torch.int64))


def _check_exact(operation: str, tile: str, device: str, tensors: tuple[Tensor, ...], operand: Tensor) -> None:
    q = torch.randint(-128, 128, (3, operand.shape[1]), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    moved = [tensor.to(device) for tensor in (q, torch.ones(3), *tensors)]
    found = run(operation, (*moved, None, "none", torch.float32, LAYOUTS[operation].value), tile)
    assert torch.equal(found.cpu().to(torch.int64), q.to(torch.int64) @ operand.t())


def check_empty(operation: str, scheme: str, t: int, n: int, k: int, tile: str) -> None:
    """Without tokens or channels there is nothing; without inputs there is the bias."""
    whole = arguments_of(operation, scheme, max(t, 1), max(n, 1), k or 64, activation="gelu")
    q, s, qdata, *tensors, bias, activation, out_dtype, layout = whole
    if operation == "w4a8_linear":
        tensors = [tensors[0][:n, : k and None].contiguous(), tensors[1][:n]]
    else:
        none = torch.zeros(n + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int16), torch.zeros(0)
        tensors = [*tensors[:2], *none]
    qdata = qdata[:n, : k and None].contiguous()
    arguments = (q[:t, :k].contiguous(), s[:t], qdata, *tensors, bias[:n], activation, out_dtype, layout)
    with poisoned():
        result = run(operation, arguments, tile)
    wanted = torch.nn.functional.gelu(bias[:n]).expand(t, n)
    torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-7)


def check_nan(operation: str, scheme: str, tile: str) -> None:
    """A token whose scale is NaN is NaN, or int8 codes 0, and no other is touched."""
    arguments = arguments_of(operation, scheme, 20, 70, 192)
    arguments[1][7] = torch.nan
    assert_matches_reference(operation, arguments, run(operation, arguments, tile))


def check_batch(operation: str, scheme: str, device: str = "cpu") -> None:
    """A token's bits are the same alone and among others, whatever the road."""
    whole = arguments_of(operation, scheme, 130, 70, 256, activation="gelu", device=device)
    wanted = run(operation, whole, "turned")
    for tile, first, last in [("few", 0, 1), ("few", 100, 130), ("tma", 60, 130), ("pointer", 3, 80), (None, 0, 130)]:
        part = (whole[0][first:last].clone(), whole[1][first:last].clone(), *whole[2:])
        assert torch.equal(run(operation, part, tile), wanted[first:last]), f"{tile} {first} ... {last}"


def check_refusals() -> None:
    """Other layouts and group sizes are somebody else's; an unknown activation is an error."""
    for layout in (Layout.PLAIN, Layout.BYTES, Layout.INT8_EXPANDED):
        for operation in ("w4a8_linear", "gobo_linear"):
            arguments = random_arguments(operation, 2, 4, 64, layout=layout)
            assert lowbit.KERNELS[operation](*arguments) is NotImplemented
    arguments = arguments_of("w4a8_linear", "w4a8", 2, 4, 192)
    coarse = torch.ones(4, 2, dtype=torch.uint8)  # groups of 96
    assert lowbit.w4a8_linear(*arguments[:3], coarse, *arguments[4:]) is NotImplemented
    with pytest.raises(QBertError, match="unknown activation 'relu'"):
        lowbit.w4a8_linear(*arguments[:6], "relu", *arguments[7:])
