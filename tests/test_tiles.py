"""Tiles: every problem gets one, the most particular row wins, no device is asked, tables are read with suspicion."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from qbert import tiles
from qbert.devices import GPUS
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.ops.cuda import own_layout
from qbert.target import Target
from qbert.testing import schemes_of
from qbert.tiles import (
    LAYOUT_BOUND,
    ROADS,
    TileConfig,
    forced,
    is_forced,
    prefers_compiled,
    select_tile,
    table,
    tile_key,
    tiles_of,
)

H100 = Target(**GPUS["h100"].limits)
A100 = Target(**GPUS["a100"].limits)
B200 = Target("cuda", "", 100, 148, 232_448)
OPERATIONS = ("w8a8_linear", "w4a8_linear", "gobo_linear", "w8a16_linear", "w4a16_linear", "gobo_a16_linear")
SHAPES = list(itertools.product((768, 1024, 2304, 3072, 4096), repeat=2))
TOKENS = [1, 2, 3, 16, 17, 64, 65, 100, *(2**i for i in range(7, 17)), 65_536]
TILE = TileConfig("pointer", 128, 128, 128, 8, 3)


@pytest.mark.parametrize("target", [H100, A100, B200], ids=["h100", "a100", "b200"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_bert_shape_has_a_tile_that_fits(operation: str, target: Target) -> None:
    for (n, k), t in itertools.product(SHAPES, TOKENS):
        tile = select_tile(operation, t, n, k, target)
        assert tile.road in ROADS
        assert tile.road != "tma" or target.sm >= 90
        assert tile.warps in (1, 2, 4, 8, 16)
        assert tile.stages >= 1
        assert tile.split_k >= 1
        assert tile.block_t % 8 == 0
        for block in (tile.block_t, tile.block_n, tile.block_k):
            assert block & (block - 1) == 0, f"{tile}: tl.arange takes powers of two"
        assert select_tile(f"{operation}_requant", t, n, k, target) == tile


def test_choosing_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    monkeypatch.setattr(torch.cuda, "is_available", None)
    assert select_tile("w8a8_linear", 77, 771, 779, H100) == select_tile("w8a8_linear", 77, 771, 779, H100)


def test_shapes_that_nobody_tuned_have_a_rule() -> None:
    for operation, (t, n, k) in itertools.product(OPERATIONS, [(0, 1, 1), (1, 1, 1), (10**6, 17, 33), (5, 10**6, 31)]):
        assert select_tile(operation, t, n, k, H100)


def _table(
    monkeypatch: pytest.MonkeyPatch, folder: Path, rows: list[dict[str, object]], others: Mapping[str, object] = {}
) -> None:
    (folder / "nvidia_h100.json").write_text(json.dumps({"w8a8_linear": rows, **others}))
    monkeypatch.setattr(tiles, "TUNED", folder)
    tiles.table.cache_clear()
    tiles._select.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_tables() -> object:
    yield
    tiles.table.cache_clear()
    tiles._select.cache_clear()


def test_the_most_particular_row_for_the_fewest_tokens_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = {"road": "pointer", "block_t": 64, "block_n": 64, "block_k": 64, "warps": 4, "stages": 2}
    rows = [
        {**plain, "source": "rule"},
        {**plain, "tokens": 64, "source": "rule to 64"},
        {**plain, "n": 768, "k": 768, "tokens": 256, "source": "768 to 256"},
        {**plain, "n": 768, "k": 768, "tokens": 128, "source": "768 to 128"},
    ]
    _table(monkeypatch, tmp_path, rows)
    source = lambda t, n, k: select_tile("w8a8_linear", t, n, k, H100).source
    assert source(64, 512, 512) == "rule to 64"
    assert source(65, 512, 512) == "rule"
    assert source(1, 768, 768) == source(128, 768, 768) == "768 to 128"
    assert source(129, 768, 768) == "768 to 256"
    assert source(257, 768, 768) == "rule"
    assert source(1, 768, 512) == "rule to 64"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"road": "scenic", "block_t": 1}, "has no known road; allowed: .*roads: tma, pointer, few"),
        ({"road": "tma", "block_q": 1}, r"has unknown fields \['block_q'\]"),
        ({"block_t": 1}, "has no known road"),
    ],
)
def test_a_table_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, record: dict[str, object], message: str
) -> None:
    _table(monkeypatch, tmp_path, [record])
    with pytest.raises(QBertError, match=message):
        table("nvidia_h100")


@pytest.mark.parametrize("where", [{"n": 768}, {"tokens": 64}, {"n": 768, "k": 768, "tokens": 64}], ids=str)
@pytest.mark.parametrize("operation", ["w4a8_linear", "gobo_linear", "gobo_a16_linear"])
def test_a_weight_s_layout_cannot_depend_on_the_problem(
    operation: str, where: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A row that sends some problems to kernels of another layout contradicts the others."""
    row = {"road": "cuda", "block_t": 128, "block_n": 128, "block_k": 128, "warps": 12, "stages": 4}
    _table(monkeypatch, tmp_path, [], {operation: [{**row, **where}]})
    with pytest.raises(QBertError, match=rf"{operation} takes road cuda for n = .*allowed: for no problem, or for all"):
        table("nvidia_h100")
    _table(monkeypatch, tmp_path, [{**row, **where}], {operation: [row]})
    assert prefers_compiled(f"{operation}_requant", H100)
    assert prefers_compiled("w8a8_linear", H100)
    assert not prefers_compiled("add_norm", H100)


def test_operations_whose_layout_decides_are_those_with_a_layout_of_the_compiled_kernels() -> None:
    schemes = [SCHEMES[name] for name in schemes_of("linear")]
    assert {tile_key(scheme) for scheme in schemes if own_layout(scheme) is not None} == LAYOUT_BOUND
    assert {tile_key(scheme) for scheme in schemes} == set(OPERATIONS)


def test_a_gpu_that_is_too_old_is_named() -> None:
    with pytest.raises(QBertError, match=r"compute capability 7\.5; qbert's kernels need 8\.0 or newer"):
        select_tile("w8a8_linear", 1, 768, 768, Target("cuda", "", 75, 40, 65_536))


def test_an_operation_without_a_table_is_a_mistake() -> None:
    with pytest.raises(KeyError, match="w2a2_linear"):
        select_tile("w2a2_linear", 1, 768, 768, H100)


def test_a_tile_can_be_forced_for_a_while() -> None:
    before = select_tile("w8a8_linear", 4096, 768, 768, H100)
    assert not is_forced()
    odd = replace(TILE, block_t=32)
    with forced("w8a8_linear", TILE):
        with forced("w8a8_linear", odd):
            assert select_tile("w8a8_linear_requant", 4096, 768, 768, H100) == odd
        assert select_tile("w8a8_linear", 1, 1, 1, H100) == TILE
        assert is_forced()
    assert not is_forced()
    assert select_tile("w8a8_linear", 4096, 768, 768, H100) == before


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tiles_to_compile_are_listed_once(operation: str) -> None:
    listed = tiles_of(operation)
    assert listed
    assert len(set(listed)) == len(listed)
