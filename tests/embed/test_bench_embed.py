"""The benchmark of `qbert embed` runs on a small model, and its figures are of the same vectors."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from embed_cases import texts
from rich.console import Console

from benchmarks import bench_embed
from qbert import QBertError


def test_both_are_measured_on_the_same_sentences(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers; requirements.txt has it")
    printed = io.StringIO()
    monkeypatch.setattr(bench_embed, "out", Console(file=printed, width=160))
    monkeypatch.setattr(bench_embed, "sentences", texts)
    bench_embed.main(model=str(encoder), texts=60, scheme="w8a8", calibrate="none")
    assert "60 sentences, " in printed.getvalue()
    assert re.search(r"ratio: \d+\.\d\d \(.* in 10 slices\)", printed.getvalue())
    least = re.search(r"cosine to float32: \S+ \(least (\S+)\)", printed.getvalue())
    assert least is not None
    assert float(least[1]) > 0.99


def test_more_sentences_than_there_are_is_an_error() -> None:
    try:
        found = bench_embed.sentences(50)
    except QBertError as error:
        pytest.skip(str(error))
    assert len(set(found)) == 50
    with pytest.raises(QBertError, match=r"texts 10000000; allowed: 1 \.\.\. 1\d{5}$"):
        bench_embed.sentences(10**7)
