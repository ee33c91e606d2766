"""Classifiers both ways: equal logits, tables, refusals."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_readers
from benchmarks.problems import SHAPES, Shape
from qbert import QBertError
from qbert.encoder import forward

TINY = Shape(2, 64, 2, 128, 50)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_one_way_computes_first_tokens_and_the_other_all(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    for name in ("_first_tokens", "_states"):
        inner = getattr(forward, name)
        monkeypatch.setattr(forward, name, lambda *given, name=name, inner=inner: (ways.append(name), inner(*given))[1])
    found = bench_readers.rows(Shape(2, 64, 2, 128, 50, family), [(3, 7)], seconds=0.0)
    assert [(row.scales, row.case) for row in found] == [("static", "3x7"), ("dynamic", "3x7")]
    assert all(row.first.median > 0 and row.factor > 0 for row in found)
    assert "_states" in ways  # and calibration took that way, too
    assert ways.count("_first_tokens") >= 2


def test_logits_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_first_tokens", lambda encoder, batch: [torch.zeros(3, 1, 64)])
    with pytest.raises(QBertError, match="logits of 3x7 differ"):
        bench_readers.rows(TINY, [(3, 7)], seconds=0.0)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SHAPES, "base", TINY)
    before = torch.get_num_threads()
    bench_readers.main(model="base", cases="2x5,1x3", seconds=0.0, threads=before)
    text = capsys.readouterr().out
    for word in ("Classifier of base", "static", "dynamic", "2x5", "1x3", "faster by", "equal bit for bit"):
        assert word in text
    for wrong, message in (
        ({"model": "minilm"}, "'minilm' is no shape"),
        ({"cases": "8*128"}, "case '8\\*128'; allowed: BATCHx"),
    ):
        with pytest.raises(QBertError, match=message):
            bench_readers.main(**{"model": "base", "cases": "1x3", "seconds": 0.0, "threads": before, **wrong})
