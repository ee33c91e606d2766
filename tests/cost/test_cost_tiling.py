"""Tiles, waves and traffic, counted by hand."""

from __future__ import annotations

import pytest

from qbert.cost.tiling import Matrices, array_operations, array_traffic, level_traffic, tiles_of

EVEN = Matrices(64, 32, 128, 1.0, 2.0, 4.0)


def test_full_tiles_do_nothing_in_vain() -> None:
    for dataflow in ("output", "weight", "activation"):
        assert array_operations(EVEN, (16, 16, 16), 1, dataflow) == EVEN.operations == 2 * 64 * 32 * 128


@pytest.mark.parametrize(
    ("dataflow", "waves", "streams"),
    [("output", 3, 8), ("weight", 6, 4), ("activation", 11, 2)],  # 4 x 2, 2 x 8 and 4 x 8 tiles on 3 units
)
def test_the_last_wave_is_not_full(dataflow: str, waves: int, streams: int) -> None:
    assert array_operations(EVEN, (16, 16, 16), 3, dataflow) == 2 * waves * 3 * streams * 16**3


def test_edges_fill_no_tile() -> None:
    ragged = Matrices(17, 16, 16, 1.0, 1.0, 1.0)
    assert array_operations(ragged, (16, 16, 16), 1, "output") == 2 * 2 * 16**3
    assert tiles_of(ragged, (16, 16, 16)) == 2


def test_units_can_share_input_channels() -> None:
    narrow = Matrices(16, 16, 1024, 1.0, 1.0, 1.0)
    alone = array_operations(narrow, (16, 16, 16), 4, "output")
    assert alone == 4 * narrow.operations  # three of four units wait
    assert array_operations(narrow, (16, 16, 16), 4, "output", split_k=4) == narrow.operations


def test_what_stays_is_read_once() -> None:
    """8 tiles of results; each weight tile meets 4 of tokens, each activation tile 2 of channels."""
    results, weights, activations = 64 * 32 * 4, 32 * 128, 64 * 128 * 2
    assert array_traffic(EVEN, (16, 16, 16), "output") == 2 * activations + 4 * weights + results
    sums = 2 * 64 * 32 * 4 * 7
    assert array_traffic(EVEN, (16, 16, 16), "weight") == 2 * activations + weights + sums + results
    assert array_traffic(EVEN, (16, 16, 16), "activation") == activations + 4 * weights + sums + results


def test_traffic_grows_as_a_level_shrinks() -> None:
    large = Matrices(4096, 4096, 4096, 1.0, 1.0, 2.0)
    moved = [level_traffic(large, capacity) for capacity in (1e9, 1e7, 1e6, 1e5)]
    assert moved[0] == large.weights + large.activations  # both fit: each once
    assert moved == sorted(moved)
    assert moved[-1] > 4 * moved[0]
    assert level_traffic(Matrices(16, 64, 64, 1.0, 0.0, 1.0), 1e6) == 64 * 64  # activations that lie further in
