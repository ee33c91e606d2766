"""Layers taken out: which, what is made up for, and that nothing is left half done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_cases import TEXTS, same_state, tokenizer
from small_encoders import float_model, hidden_of, padded_batch
from torch import nn

import qbert
from qbert import QBertError
from qbert.compress import drop_layers_, layers
from qbert.shapes import plan_of


def useless_layer(model: Any, place: int) -> None:
    """Makes a layer give back what it got."""
    layer = model.encoder.layer[place]
    with torch.no_grad():
        for linear in (layer.attention.output.dense, layer.output.dense):
            linear.weight.zero_()
            linear.bias.zero_()
        for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
            norm.weight.fill_(1)
            norm.bias.zero_()


def test_the_layers_that_are_missed_least_go() -> None:
    model = float_model(num_hidden_layers=4)
    useless_layer(model, 1)
    report = drop_layers_(model, TEXTS, keep=3, tokenizer=tokenizer(), compensate=False)
    assert [each.source for each in report.plan.layers] == [0, 2, 3]
    assert model.config.num_hidden_layers == 3
    assert report.agreement is not None
    assert report.agreement.n == len(TEXTS) // 4
    assert report.macs == pytest.approx(3 / 4)


def test_greedy_where_there_are_many_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_EXHAUSTIVE", 1)
    model = float_model(num_hidden_layers=4)
    useless_layer(model, 1)
    useless_layer(model, 2)
    seen: list[str] = []
    report = drop_layers_(
        model,
        TEXTS,
        keep=2,
        tokenizer=tokenizer(),
        compensate=False,
        progress=lambda done, total, what: seen.append(what),
    )
    assert [each.source for each in report.plan.layers] == [0, 3]
    assert len(seen) == 4 + 3


def test_named_layers_need_no_texts() -> None:
    model, before = float_model(num_hidden_layers=3), float_model(num_hidden_layers=3)
    report = drop_layers_(model, keep=[0, 2], compensate=False)
    assert report.agreement is None
    twin = copy.deepcopy(before)
    twin.encoder.layer = nn.ModuleList([before.encoder.layer[0], before.encoder.layer[2]])
    assert torch.equal(hidden_of(model, **padded_batch()), hidden_of(twin, **padded_batch()))


def test_an_offset_that_a_layer_added_is_merged_into_the_norm_before_the_gap() -> None:
    """A layer that only shifts the stream is made up for exactly."""
    model = float_model(num_hidden_layers=3)
    useless_layer(model, 1)
    norm = model.encoder.layer[1].output.LayerNorm
    with torch.no_grad():
        norm.bias.normal_(generator=torch.Generator().manual_seed(0))
    norm_before = model.encoder.layer[0].output.LayerNorm
    with torch.no_grad():  # so that the layer's own norms change nothing
        norm_before.weight.fill_(1)
        norm_before.bias.zero_()
    plain, made_up = copy.deepcopy(model), copy.deepcopy(model)
    without = drop_layers_(plain, TEXTS, keep=[0, 2], tokenizer=tokenizer(), compensate=False)
    report = drop_layers_(made_up, TEXTS, keep=[0, 2], tokenizer=tokenizer())
    assert without.agreement is not None
    assert report.agreement is not None
    assert report.agreement.mean > 0.999 > without.agreement.mean
    assert "compensated" in report.notes[0]


def test_compensation_that_does_not_help_is_undone() -> None:
    model, plain = float_model(num_hidden_layers=3), float_model(num_hidden_layers=3)
    useless_layer(model, 1)
    useless_layer(plain, 1)
    report = drop_layers_(model, TEXTS, keep=[0, 2], tokenizer=tokenizer())
    drop_layers_(plain, keep=[0, 2], compensate=False)
    if "left out" in report.notes[0]:
        assert same_state(model, plain)
    assert report.agreement is not None
    assert report.agreement.mean > 0.99


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "MPNetModel", "DistilBertModel"])
def test_of_every_kind(name: str, tmp_path: Path) -> None:
    model = float_model(name)
    report = drop_layers_(model, TEXTS, keep=1, tokenizer=tokenizer(name))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(hidden_of(again, **padded_batch()), hidden_of(model, **padded_batch()))
    assert report.plan.plain
    assert "1 of 2 layers" in str(report)


@pytest.mark.parametrize(
    ("keep", "texts", "said"),
    [
        (0, TEXTS, "keep is 0"),
        (3, TEXTS, "keep is 3; allowed: 1 ... 2"),
        (True, TEXTS, "keep is True"),
        (1.0, TEXTS, r"keep is 1.0; allowed: 1 ... 2"),
        ("1", TEXTS, "ascending indexes"),
        ([], TEXTS, "at least one"),
        ([1, 0], TEXTS, "ascending"),
        ([0, 2], TEXTS, "0 ... 1"),
        ([-1], TEXTS, "0 ... 1"),
        (1, None, "no texts"),
        ([0], None, "compensate=False"),
        (1, TEXTS[:15], "15 texts"),
        (1, "a text", "str"),
        (1, [1, 2], "list of str"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(keep: Any, texts: Any, said: str) -> None:
    model, before = float_model(), float_model()
    with pytest.raises(QBertError, match=said):
        drop_layers_(model, texts, keep=keep, tokenizer=tokenizer())
    assert same_state(model, before)
    assert plan_of(model).whole


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = float_model(num_hidden_layers=3), float_model(num_hidden_layers=3)
    model.train()

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layers, "_moments", broken)
    with pytest.raises(KeyboardInterrupt):
        drop_layers_(model, TEXTS, keep=[0, 2], tokenizer=tokenizer())
    assert same_state(model, before)
    assert all(module.training for module in model.modules())
    assert model.config.num_hidden_layers == 3
    assert torch.equal(hidden_of(model.eval(), **padded_batch()), hidden_of(before, **padded_batch()))


def test_quantizing_comes_last() -> None:
    model = qbert.quantize_(float_model(), "w8a8")
    with pytest.raises(QBertError, match="comes before quantizing"):
        drop_layers_(model, keep=[0], compensate=False)


def test_layers_that_are_shared_are_refused() -> None:
    model = float_model()
    model.encoder.layer[1] = model.encoder.layer[0]
    with pytest.raises(QBertError, match="share their weights"):
        drop_layers_(model, keep=[0], compensate=False)


def test_a_gap_behind_embeddings_that_are_narrower_is_not_compensated_for() -> None:
    """A linear stands between their norm and the stream, so no gain of the one is one of the other."""
    model = float_model("ElectraModel", num_hidden_layers=3)
    report = drop_layers_(model, TEXTS, keep=[1, 2], tokenizer=tokenizer())
    assert [each.source for each in report.plan.layers] == [1, 2]
    assert report.notes == ["no gap that a norm before it makes up for"]
    report = drop_layers_(float_model("ElectraModel", num_hidden_layers=3), TEXTS, keep=[1], tokenizer=tokenizer())
    assert "ompensat" in report.notes[0]  # of the second gap, whose norm is a layer's
