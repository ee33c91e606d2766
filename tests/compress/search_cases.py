"""A small encoder, a labelled task, a clock and judges for tests of the search and of the guide."""

from __future__ import annotations

from typing import Any

import pytest
from compress_cases import make_texts, tokenizer
from small_encoders import float_model
from torch import nn

from qbert.compress import Searched, Size, steps
from qbert.compress import search as searching
from qbert.compress.judge import Change, Parts
from qbert.compress.workshop import Workshop
from qbert.evaluate import Dataset, TaskData
from qbert.evaluate.datasets import text_key
from qbert.explain import explain

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256, "num_hidden_layers": 4}
QUANTIZED = 3.0  # times as fast, by the clock of these tests


def model(name: str = "BertModel", **changes: Any) -> Any:
    return float_model(name, pad_token_id=1, **SIZES, **changes)


def search(subject: Any, **wanted: Any) -> Searched:
    return searching(subject, **{"batch": 2, "seq": 16, "tokenizer": tokenizer(), **wanted})


def labelled(count: int, seed: int) -> Dataset:
    """Texts with one of two classes by their first letters."""
    texts = tuple({text_key(text): text for text in make_texts(count, seed)}.values())
    return Dataset("made", texts, tuple(int(text[0] in "klmt") for text in texts), ("no", "yes"))


TASK = TaskData("made", "classification", labelled(240, 1), labelled(60, 2))


def set_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that are multiply-adds, so that no test depends on the machine; only pruning's own table is measured."""

    def speedup(shop: Workshop, small: nn.Module) -> float:
        shop.original_ms = 100.0
        quantized = QUANTIZED if explain(small).quantized else 1.0
        return quantized * Size.of(shop.model).macs / Size.of(small).macs

    monkeypatch.setattr(Workshop, "_speedup", speedup)
    monkeypatch.setattr(steps, "CALIBRATED_BY", 16)


def losing(monkeypatch: pytest.MonkeyPatch, points: Any) -> None:
    """Judges that say what a model loses by its shapes."""

    class Judge:
        def __call__(self, small: nn.Module, its: Any) -> list[Change]:
            drop = points(small)
            return [Change(on="made", n=100, score=90 - drop, change=-drop, interval=(-drop - 1, 1 - drop))]

    monkeypatch.setattr(Parts, "judge", lambda *_: Judge())
    monkeypatch.setattr(Parts, "final_judge", lambda *_: Judge())


def layers_of(small: nn.Module) -> int:
    return len(small.encoder.layer)  # type: ignore[union-attr,arg-type]
