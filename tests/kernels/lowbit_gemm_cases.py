"""What `test_lowbit_gemm` runs in Triton's interpreter and on GPUs: launchers of packed linears against the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from launchers import bind_with, is_left_to_others, launch, obstacle_of
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import INT4, INT8, SCHEMES, PerGroup, Role, Scheme
from qbert.ops.abi import Activation
from qbert.ops.operations import Linear
from qbert.testing import assert_matches_reference, random_problem
from qbert.tiles import TileConfig, forced, tile_key
from qbert.weight import Layout, Weight
from qbert.weight.layout import rows
from qbert.weight.tensor import OUTLIER_TENSORS

# Small tiles, so that small problems have several. In the first, outliers read tokens column by column.
TILES = {
    "turned": TileConfig("tma", 128, 64, 128, warps=4, stages=2, group=2),
    "tma": TileConfig("tma", 64, 64, 128, warps=4, stages=2, group=2),
    "few": TileConfig("few", 16, 64, 128, warps=4, stages=2, split_k=3),
    "pointer": TileConfig("pointer", 64, 64, 128, warps=4, stages=2, group=2),
}


def layout_of(scheme: str) -> Layout:
    """The layout that the kernel of a scheme reads."""
    return Layout.SELECT_HALVES if SCHEMES[scheme].has_dictionary else Layout.NIBBLE_HALVES


def problem(scheme: str, t: int, n: int, k: int, dtype: str = "float32", **more: Any) -> Linear:
    """A packed linear in the layout that its kernel reads."""
    dtype_ = getattr(torch, dtype)
    return random_problem("linear", t, n, k, scheme=scheme, layout=layout_of(scheme), dtype=dtype_, **more)


def run(a: Linear, tile: str | None = None) -> Tensor:
    """The launcher's result, with a tile of `TILES`, or by default the table's."""
    with forced(tile_key(a.weight.scheme), TILES[tile]) if tile else contextlib.nullcontext():
        return launch(a)


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
    scheme: str, t: int, n: int, k: int, tile: str | None = None, more: dict[str, Any] | None = None
) -> None:  # fmt: skip
    """The launcher's result is the reference's; `more` are further arguments of `problem`."""
    a = problem(scheme, t, n, k, **(more or {}))
    with poisoned():
        result = run(a, tile)
    assert_matches_reference(a, result)


def check_every_code(tile: str, device: str = "cpu") -> None:
    """Every int4 code with every group scale gives exact products."""
    n, k, group = 34, 256, 64
    codes = torch.arange(n * k).view(n, k) * 7 % 15 - 7
    scales = torch.arange(n * k // group).view(n, -1) % 18 + 1
    tensors = rows.pack_nibble_halves((codes & 15).to(torch.uint8)), torch.ones(n), scales.to(torch.uint8)
    _check_exact("w4a8", tile, device, tensors, codes * scales.repeat_interleave(group, dim=1))


def check_every_centroid(bits: int, tile: str, device: str = "cpu") -> None:
    """Every code of dictionaries that hold -128 and 127, of two matrices whose bound lies within a tile."""
    n, k, entries = 34, 256, 1 << bits
    codes = torch.arange(n * k).view(n, k) * 5 % entries
    books = torch.stack([torch.linspace(-128, 127, entries), torch.linspace(-20, 100, entries)]).to(torch.int8)
    tensors = rows.pack_select_halves(codes.to(torch.uint8)), books, torch.ones(2), *_no_outliers(n).values()
    operand = books.repeat_interleave(n // 2, dim=0).gather(1, codes)
    _check_exact(f"gobo{bits}a8", tile, device, tensors, operand.to(torch.int64))


def _no_outliers(n: int) -> dict[str, Tensor]:
    none = torch.zeros(n + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int16), torch.zeros(0)
    return dict(zip(OUTLIER_TENSORS, none, strict=True))


def _check_exact(scheme: str, tile: str, device: str, tensors: tuple[Tensor, ...], operand: Tensor) -> None:
    q = torch.randint(-128, 128, (3, operand.shape[1]), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    held = [each.to(device) for each in tensors]
    weight = Weight.of(held, SCHEMES[scheme], layout_of(scheme), operand.shape[1])
    a = Linear(q.to(device), torch.ones(3, device=device), weight, None, Activation.NONE, False, torch.float32)
    assert torch.equal(run(a, tile).cpu().to(torch.int64), q.to(torch.int64) @ operand.t())


def check_empty(scheme: str, t: int, n: int, k: int, tile: str) -> None:
    """Without tokens or channels there is nothing; without inputs there is the bias."""
    a = problem(scheme, max(t, 1), max(n, 1), k or 64, activation="gelu")
    held = dict(a.weight.tensors)
    if "group_scale" in held:
        held |= {"scale": held["scale"][:n], "group_scale": held["group_scale"][:n, : k and None].contiguous()}
    else:
        held |= _no_outliers(n)
    held["qdata"] = held["qdata"][:n, : k and None].contiguous()
    weight, bias = Weight(a.weight.scheme, (n, k), a.weight.layout, held), a.bias[:n]
    with poisoned():
        result = run(a._replace(x=a.x[:t, :k].contiguous(), s=a.s[:t], weight=weight, bias=bias), tile)
    wanted = torch.nn.functional.gelu(bias).expand(t, n)
    torch.testing.assert_close(result, wanted, rtol=1e-6, atol=1e-7)


def check_nan(scheme: str, int8_out: bool, tile: str) -> None:
    """A token whose scale is NaN is NaN, or int8 codes 0, and no other is touched."""
    a = problem(scheme, 20, 70, 192, int8_out=int8_out)
    a.s[7] = torch.nan
    assert_matches_reference(a, run(a, tile))


def check_batch(scheme: str, device: str = "cpu") -> None:
    """A token's bits are the same alone and among others, whatever the road."""
    whole = problem(scheme, 130, 70, 256, activation="gelu", device=device)
    wanted = run(whole, "turned")
    for tile, first, last in [("few", 0, 1), ("few", 100, 130), ("tma", 60, 130), ("pointer", 3, 80), (None, 0, 130)]:
        part = whole._replace(x=whole.x[first:last].clone(), s=whole.s[first:last].clone())
        assert torch.equal(run(part, tile), wanted[first:last]), f"{tile} {first} ... {last}"


def check_refusals() -> None:
    """Other layouts and group sizes are somebody else's; an unknown activation is an error."""
    for layout in (Layout.PLAIN, Layout.BYTES, Layout.INT8_EXPANDED):
        for scheme in ("w4a8", "gobo3a8"):
            a = random_problem("linear", 2, 4, 64, scheme=scheme, layout=layout)
            assert f"weights in layout {layout.value}" in str(obstacle_of(a))
            assert is_left_to_others(a)
    a = problem("w4a8", 2, 4, 192)
    coarse = Scheme("w4a8-g96", INT4, PerGroup(96), INT8, frozenset({Role.LINEAR}), "")
    held = {**a.weight.tensors, "group_scale": torch.ones(4, 2, dtype=torch.uint8)}
    a = a._replace(weight=Weight(coarse, (4, 192), a.weight.layout, held))
    a.check()
    assert str(obstacle_of(a)).startswith("groups of 96")
    assert is_left_to_others(a)
    with pytest.raises(QBertError, match="unknown activation 'tanh'"):
        bind_with(problem("w4a8", 2, 4, 192), "none", "tanh")
