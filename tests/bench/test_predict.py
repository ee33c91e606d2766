"""The static model: floors that follow from the tile, the bytes and the data sheet, counted by hand here."""

from __future__ import annotations

import itertools

import pytest
from typer.testing import CliRunner

from benchmarks import predict as prediction
from benchmarks.problems import LINEARS
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.tiles import TileConfig, forced

TILE = TileConfig("tma", 128, 256, 128, 8, 4)


def test_waves_and_bytes_by_hand() -> None:
    """4096 x 768 outputs are 96 tiles of 128 x 256: one wave of 132, 96/132 of whose arithmetic is needed."""
    with forced("w8a8_linear", TILE):
        row = prediction.predict(SCHEMES["w8a8"], 4096, 768, 768, "h100")
    assert (row.tiles, row.waves) == (96, 1)
    assert row.busy == pytest.approx(96 / 132)
    assert row.math_s == pytest.approx(2 * 4096 * 768 * 768 / 1978.9e12 * 132 / 96)
    moved = 4096 * 768 + 4 * 4096 + 768 * 768 + 4 * 768 + 2 * 4096 * 768
    assert row.bytes_s == pytest.approx(moved / 3350e9)
    assert row.floor_s == row.math_s
    assert row.bound == "arithmetic"
    assert row.tops == pytest.approx(1978.9 * 96 / 132)


def test_ragged_edges_and_split_k_are_counted() -> None:
    with forced("w8a8_linear", TileConfig("few", 16, 64, 256, 4, 4, split_k=2)):
        row = prediction.predict(SCHEMES["w8a8"], 17, 65, 768, "h100")
    assert row.tiles == 2 * 2 * 2
    assert row.waves == 1
    assert row.math_s == pytest.approx(
        2 * 16 * 64 * 512 * 132 / 1978.9e12
    )  # the longer of the two programs: two of three blocks


@pytest.mark.parametrize(("scheme", "bits"), [("w8a16", 8), ("w4a16", 4.25), ("gobo4", 4)])
def test_few_tokens_are_bound_by_weight_bytes(scheme: str, bits: float) -> None:
    row = prediction.predict(SCHEMES[scheme], 1, 4096, 4096, "h100")
    weight = 4096 * 4096 * bits / 8
    assert row.bound == "bytes"
    assert row.bytes_s * 3350e9 == pytest.approx(weight, rel=0.01)
    assert row.bf16_s / row.bytes_s == pytest.approx(16 / bits, rel=0.02)


@pytest.mark.parametrize("gpu", list(prediction.GPUS))
@pytest.mark.parametrize("model", list(LINEARS))
def test_every_gpu_scheme_and_shape_has_a_floor(gpu: str, model: str) -> None:
    rows = prediction.predictions(gpu, shapes=LINEARS[model])
    assert len({(row.scheme, row.t, row.n, row.k) for row in rows}) == len(rows)
    for row, (attribute, top) in itertools.product(rows, [("busy", 1.0), ("floor_s", 1.0)]):
        assert 0 < getattr(row, attribute) <= top + 1e-9


def test_the_command_prints_tiles_beside_floors() -> None:
    import typer

    app = typer.Typer()
    app.command()(prediction.main)
    done = CliRunner().invoke(app, ["--target", "h100", "--scheme", "w8a8", "--tokens", "4096"])
    assert done.exit_code == 0, done.output
    assert "computed, not measured" in done.output
    assert done.output.count("w8a8") == 4
    for bad in (["--target", "tpu"], ["--scheme", "w2a2"], ["--model", "huge"]):
        assert CliRunner().invoke(app, bad).exit_code == 2


def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(QBertError, match="unknown target 'tpu'; allowed: b200, h100, h200"):
        prediction.predictions("tpu")


def test_packed_weights_are_ahead_only_while_weights_are_what_takes_time() -> None:
    """3 bits for 8 at few tokens; nothing once W8A8 keeps the matrix units busy: both compute the same products."""
    w8a8, gobo3 = SCHEMES["w8a8"], SCHEMES["gobo3a8"]
    ratio = {t: prediction.bound(w8a8, t, 4096, 4096, "h100") / prediction.bound(gobo3, t, 4096, 4096, "h100")
             for t in prediction.OVER_W8A8_TOKENS}  # fmt: skip
    assert list(ratio.values()) == sorted(ratio.values(), reverse=True)
    assert 2.5 < ratio[16] < 8 / 3
    assert ratio[144] > 2 > ratio[192]
    assert ratio[384] == 1.0
    assert prediction.over_w8a8("h100").row_count == len(ratio)
