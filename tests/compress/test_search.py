"""The search for a recipe: what is kept and why, on which texts, budgets that cannot be met, and what is written down."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_cases import make_texts, same_state, tokenizer
from search_cases import QUANTIZED, TASK, layers_of, losing, model, search, set_clock
from small_encoders import hidden_of

from qbert import QBertError
from qbert.compress import BudgetNotMet, Compression, SearchReport, Size, compress
from qbert.compress.judge import Parts
from qbert.compress.ladders import LADDERS, Asked
from qbert.compress.picture import plot
from qbert.compress.workshop import Workshop
from qbert.evaluate.datasets import text_key
from qbert.explain import explain


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch)


def test_every_step_is_measured_and_the_budget_is_met(tmp_path: Path) -> None:
    original = model()
    found = search(
        original, tasks=[TASK], speedup=1.9 * QUANTIZED / 1.5, max_drop=60, steps=["quantize", "layers"]
    )  # fmt: skip
    report = found.report
    assert report.met
    assert same_state(original, model())
    assert [row.step for row in report.rows if row.kept] == ["original", "quantize w8a8", "layers 3"]
    assert report.found.speedup == pytest.approx(QUANTIZED * 4 / 3, rel=0.05)
    assert report.found.megabytes < report.rows[1].megabytes < report.rows[0].megabytes  # type: ignore[operator]
    assert [change.n for change in report.found.changes] == [len(TASK.train) // 3]
    assert [change.n for change in report.test] == [len(TASK.test)]
    assert explain(found.model).encoders[0].fused == "static"
    assert SearchReport.model_validate_json(report.model_dump_json()) == report
    path = tmp_path / "found.toml"
    assert report.recipe is not None
    path.write_text(report.recipe.toml())
    assert Compression.read(path) == report.recipe
    parts = Parts.of(original, [TASK], None, seed=0)
    again = compress(original, report.recipe, texts=parts.texts, tokenizer=tokenizer(), measure=False)
    assert layers_of(again.model) == layers_of(found.model) == 3


def test_the_same_seed_finds_the_same_model() -> None:
    wanted: dict[str, Any] = {
        "tasks": [TASK],
        "tokenizer": tokenizer(),
        "max_drop": 90,
        "steps": ["quantize", "layers"],
    }
    first, second = (search(model(), seed=3, speedup=3.5, **wanted) for _ in range(2))
    inputs = tokenizer()(TASK.test.texts[:3], padding=True, return_tensors="pt")
    assert torch.equal(hidden_of(first.model, **inputs), hidden_of(second.model, **inputs))
    untimed = [[row.model_dump(exclude={"seconds"}) for row in each.report.rows] for each in (first, second)]
    assert untimed[0] == untimed[1]
    other = search(model(), seed=4, speedup=1.5, **wanted)
    assert other.report.rows[1].changes != first.report.rows[1].changes


def test_what_loses_too_much_is_dropped_and_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is too much; of heads and neurons as much goes as the points allow."""
    losing(
        monkeypatch,
        lambda small: 5.0 * (4 - layers_of(small)) + 2.0 * (1 - Size.of(small).macs / Size.of(model()).macs),
    )
    found = search(
        model(),
        tasks=[TASK],
        tokenizer=tokenizer(),
        goal="size",
        max_drop=0.7,
        steps=["layers", "prune"],
        pooling="cls",
    )
    rows = {row.step: row for row in found.report.rows}
    assert not rows["layers 3"].kept
    assert "loses 5.5" in rows["layers 3"].why
    kept = [row for row in found.report.rows if row.kept]
    assert all(row.drop <= 0.7 for row in kept)
    assert len(kept) > 2
    assert layers_of(found.model) == 4
    assert found.report.recipe is not None
    assert found.report.recipe.pruning is not None
    assert found.report.recipe.pruning.ffn == [each.ffn for each in kept[-1].plan.layers]  # type: ignore[union-attr]


def test_a_step_that_saves_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, lambda small: 0.0)
    monkeypatch.setattr(Workshop, "_speedup", lambda *_: 1.0)
    with pytest.raises(BudgetNotMet, match="nothing pays") as caught:
        search(model(), tasks=[TASK], steps=["quantize", "layers"])
    assert {row.kept for row in caught.value.report.rows[1:]} == {False}
    assert all("does not pay" in row.why for row in caught.value.report.rows[1:])
    assert caught.value.report.recipe is None


def test_a_budget_that_cannot_be_met_says_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, lambda small: 1.0 * (4 - layers_of(small)))
    wanted: dict[str, Any] = {
        "tasks": [TASK], "speedup": 11.0, "max_drop": 1.5, "steps": ["quantize", "layers"],
    }  # fmt: skip
    said = r"x11 of the float model's speed at a loss of at most 1.5 points cannot be met here: .* layers 3, is x4\.\d\d at"
    with pytest.raises(BudgetNotMet, match=said):
        search(model(), **wanted)
    found = search(model(), **wanted, best_effort=True)
    assert not found.report.met
    assert layers_of(found.model) == 3
    assert "NOT met" in found.report.lines()[0]


def test_size_trims_words_and_keeps_the_speed_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, lambda small: 0.1)
    found = search(
        model(vocab_size=1024), tasks=[TASK], goal="size", max_drop=1, quantize=["w8a8"],
        steps=["quantize", "vocabulary"], speedup=2.0,
    )  # fmt: skip
    fields = found.report.found.fields
    assert fields["quantize"] == "w8a8"
    assert fields["vocabulary"] in (64, 128)
    assert found.report.met
    assert found.report.found.megabytes < found.report.rows[1].megabytes  # type: ignore[operator]


def test_no_text_is_in_two_parts() -> None:
    parts = Parts.of(model(), [TASK], None, seed=0)
    groups = [parts.texts, parts.selection[0].test.texts, TASK.test.texts]
    keys = [{text_key(text) for text in group} for group in groups]
    assert not keys[0] & keys[1]
    assert not keys[1] & keys[2] - {text_key(text) for text in TASK.train.texts}
    assert len(keys[0] | keys[1]) == len(TASK.train)
    assert parts.selection[0].train.texts == tuple(parts.texts)
    mine = [*TASK.train.texts, *make_texts(50, seed=9)]
    given = Parts.of(model(), [TASK], mine, seed=0)
    assert not {text_key(text) for text in given.texts} & (keys[1] | keys[2])
    assert given.left_out == len(mine) - len(given.texts) >= len(keys[1])


def test_a_classifiers_labels_are_the_models_own_indexes() -> None:
    classifier = model("BertForSequenceClassification", num_labels=2)
    classifier.config.id2label = {0: "YES", 1: "no"}
    parts = Parts.of(classifier, [TASK], None, seed=0)
    assert parts.labels == [1 - label for label in parts.selection[0].train.labels]
    assert Parts.of(classifier, [TASK], ["a b c"], seed=0).labels is None
    assert Parts.of(model(), [TASK], None, seed=0).labels is None


def test_without_labels_agreement_judges() -> None:
    texts = make_texts(240)
    found = search(model(), texts=texts, max_drop=50, speedup=2.0, steps=["quantize"])
    assert [change.on for change in found.report.found.changes] == ["agreement"]
    assert found.report.found.changes[0].n == 60
    assert -5 < found.report.found.changes[0].change < 0
    assert found.report.test == []
    with pytest.raises(QBertError, match="one in four judges"):
        search(model(), texts=texts[:100])


def asked(now: Any = None, gap: float | None = None, refused: Any = (), **changes: Any) -> Asked:
    return replace(Asked("latency", 6, 30_522, now, gap, refused, None), **changes)


def test_ladders() -> None:
    following = {name: ladder.next for name, ladder in LADDERS.items()}
    assert following["layers"](asked()) == 5
    assert following["layers"](asked(5, refused=[4])) is None
    assert following["layers"](asked(1)) is None
    assert following["vocabulary"](asked()) == 15_232
    assert following["vocabulary"](asked(refused=[15_232])) == 21_568
    assert following["vocabulary"](asked(64)) is None
    assert following["prune"](asked()) == {"speedup": 1.25}
    assert following["prune"](asked(gap=2.0)) == {"speedup": 2.0}
    assert following["prune"](asked(gap=2.0, refused=[{"speedup": 2.0}])) == {"speedup": round(math.sqrt(2), 3)}
    assert following["prune"](asked({"speedup": 1.3}, refused=[{"speedup": 1.35}])) is None
    assert following["prune"](asked(goal="size")) == {"macs": 0.8}
    assert following["rank"](asked()) == "auto"
    assert following["rank"](asked("auto")) is None
    assert following["rank"](asked(refused=["auto"])) is None
    assert following["quantize"](asked()) == "w8a8"
    assert following["quantize"](asked(refused=["w8a8"])) == "w8a8+none"
    assert following["quantize"](asked("w8a8")) is None
    assert following["quantize"](asked("w8a8", goal="size")) == "w4a8+w4"
    assert following["quantize"](asked("gobo3a8+gobo3", goal="size")) is None
    assert following["quantize"](asked(quantize=["none"])) is None


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"goal": "speed"}, "goal 'speed'"),
        ({"speedup": 0.5}, "speedup is 0.5"),
        ({"max_drop": -1}, "max_drop is -1"),
        ({"steps": ["layer"]}, "step 'layer'"),
        ({"steps": []}, "no steps"),
        ({"tasks": []}, "nothing to search by"),
        ({"tasks": ["lee"]}, "0 training texts"),
        ({"seq": 4096}, "seq is 4096"),
        ({"pooling": "max"}, "pooling 'max'"),
    ],
)
def test_bad_input_is_said(wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(QBertError, match=said):
        search(model(), **{"tasks": [TASK], **wanted})


def test_the_picture_and_the_table_show_every_row(tmp_path: Path) -> None:
    found = search(model(), tasks=[TASK], max_drop=90, speedup=4, steps=["quantize", "layers"])
    plot(found.report, tmp_path / "search.svg")
    drawn = (tmp_path / "search.svg").read_text()
    for row in found.report.rows:
        assert row.step in drawn
    assert "on test texts" in drawn
    assert found.report.table().row_count == len(found.report.rows)
