"""Heads and neurons taken out: what goes is what matters least, budgets are kept, nothing is left half done."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_cases import make_texts, same_state, tokenizer
from small_encoders import float_model, hidden_of, padded_batch

import qbert
from qbert import QBertError, prune_
from qbert.compress import latency, prune
from qbert.compress.latency import Curve, Load, Table, ffn_levels, head_levels
from qbert.compress.sensitivity import ATTENTION, FFN, look
from qbert.compress.texts import Texts, agreement, output_of, outputs_of
from qbert.shapes import LayerShape, plan_of, shaped

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
TEXTS = make_texts(120)


def model_of(name: str = "BertModel", **changes: Any) -> Any:
    if name.startswith("DistilBert"):
        return float_model(name, dim=128, n_heads=4, hidden_dim=256, **changes)
    return float_model(name, **{**SIZES, **changes})


def pruned(name: str = "BertModel", **wanted: Any) -> tuple[Any, Any]:
    model = model_of(name)
    return model, prune_(model, TEXTS, tokenizer=tokenizer(name), **wanted)


# ---- what goes ------------------------------------------------------------------------------------------------------


def test_heads_and_neurons_that_do_nothing_go_first() -> None:
    model = model_of()
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.output.dense.weight[:, 32:96] = 0  # heads 1 and 2
            layer.output.dense.weight[:, ::2] = 0
    before = hidden_of(model, **padded_batch())
    report = prune_(model, TEXTS, tokenizer=tokenizer(), heads=2, ffn=128)
    assert [each.heads for each in report.plan.layers] == [(0, 3), (0, 3)]
    assert torch.allclose(hidden_of(model, **padded_batch()), before, atol=1e-4)
    assert report.agreement is not None
    assert report.agreement.least > 0.9999
    assert max(report.error) < 1e-3


@pytest.mark.parametrize("name", ["MPNetModel", "DistilBertModel", "BertForSequenceClassification"])
def test_of_every_kind_saved_quantized_and_fused(name: str, tmp_path: Path) -> None:
    model, report = pruned(name, heads=[2, 4], ffn=[256, 100])
    assert [(len(each.heads), each.ffn) for each in report.plan.layers] == [(2, 256), (4, 100)]
    assert report.macs < 1
    qbert.quantize_(model, "w8a8", fuse=True)
    model.save_pretrained(tmp_path)
    again = qbert.load(tmp_path)
    assert torch.equal(hidden_of(again, **padded_batch()), hidden_of(model, **padded_batch()))


def test_refitting_is_nearer_than_taking_out_alone() -> None:
    _, refitted = pruned(ffn=128)
    _, plain = pruned(ffn=128, refit=False)
    assert refitted.agreement.mean > plain.agreement.mean
    assert all(a <= b + 1e-9 for a, b in zip(refitted.error[1:2], plain.error[1:2], strict=True))


def test_a_layer_that_keeps_all_makes_up_for_those_before_it() -> None:
    names = [f"encoder.layer.1.{path}.dense.weight" for path in ("attention.output", "output")]
    texts, untouched = make_texts(600), model_of()
    refitted, plain = model_of(), model_of()
    report = prune_(refitted, texts, ffn=[64, 256], tokenizer=tokenizer())
    prune_(plain, texts, ffn=[64, 256], tokenizer=tokenizer(), refit=False)
    assert report.error[0] == 0.0
    assert all(error > 0 for error in report.error[1:])
    same = lambda model: [torch.equal(model.get_parameter(name), untouched.get_parameter(name)) for name in names]
    assert not all(same(refitted))
    assert all(same(plain))


def test_the_prediction_is_the_change_of_the_embedding() -> None:
    """To first order: for a small difference of a weight, against running the model with it."""
    model = model_of()
    given = Texts.of(model, TEXTS[:40], tokenizer())
    seen = look(model, shaped(model), given, None, "mean", 0)
    site = (1, FFN)
    linear = model.encoder.layer[1].output.dense
    difference = 1e-3 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(1))
    predicted = seen[site].change(difference)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        changed = moved.encoder.layer[1].output.dense
        changed.weight -= difference
        changed.bias += difference @ seen[site].inputs.mean(0)
        found = []
        for _, batch in given.batches(torch.device("cpu")):
            found.append((output_of(moved, batch) - output_of(model, batch)).double().pow(2).sum(1))
    assert predicted == pytest.approx(float(torch.cat(found).mean()), rel=0.3)


@pytest.mark.parametrize("kind", [ATTENTION, FFN])
def test_labels_and_drawn_classes_see_what_a_classifier_reads(kind: str) -> None:
    model = model_of("BertForSequenceClassification")
    given = Texts.of(model, TEXTS[:32], tokenizer())
    for labels in (None, [index % 2 for index in range(32)]):
        seen = look(model, shaped(model), given, labels, "mean", 0)
        assert seen[0, kind].gradients.abs().sum() > 0
    with pytest.raises(QBertError, match="31 labels for 32 texts"):
        look(model, shaped(model), given, [0] * 31, "mean", 0)
    with pytest.raises(QBertError, match=r"0 \.\.\. 1"):
        look(model, shaped(model), given, [2] * 32, "mean", 0)


# ---- budgets --------------------------------------------------------------------------------------------------------


def test_a_share_of_multiply_adds_is_kept() -> None:
    _, report = pruned(macs=0.7)
    assert 0.5 < report.macs <= 0.7 + 1e-6


def test_milliseconds_are_measured_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(Curve.of({2: -2.0, 4: 0.0}), Curve.of({64: -6.0, 256: 0.0}), layer=10.0, rest=2.0)
    monkeypatch.setattr(prune, "measure_table", lambda *_: table)
    monkeypatch.setattr(latency, "_ROUNDS", 1)
    _, report = pruned(speedup=1.5, batch=1, seq=16)
    assert report.predicted_ms is not None
    assert report.predicted_ms[0] == 22.0
    assert report.predicted_ms[1] <= 22.0 / 1.5 + 1e-6
    assert report.measured_ms is not None
    assert "predicted 22.00 ->" in str(report)


@pytest.mark.parametrize("scheme", ["w8a8", None])
def test_the_table_is_measured_with_what_will_run(scheme: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_ROUNDS", 1)
    table = latency.measure_table(model_of("MPNetModel"), Load(2, 16, scheme))
    assert table.heads.sizes == (2, 4)
    assert table.ffn.sizes == (64, 128, 192, 256)
    whole, less = (LayerShape(source=0, heads=(0, 1), ffn=width) for width in (256, 64))
    assert table.total([whole]) >= table.total([less])


def test_uniform_is_a_plain_model(tmp_path: Path) -> None:
    model, report = pruned(macs=0.8, uniform=True)
    assert report.plan.plain
    assert {each.ffn for each in report.plan.layers} == {128}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(hidden_of(again, **padded_batch()), hidden_of(model, **padded_batch()))


def test_levels_fill_the_blocks_of_kernels() -> None:
    assert head_levels(12, 32) == [12, 10, 8, 6, 4, 2]
    assert head_levels(3, 64) == [3, 2, 1]
    assert head_levels(3, 16) == [3]
    assert ffn_levels(200) == [200, 192, 128, 64]


def test_a_curve_never_falls() -> None:
    curve = Curve.of({1: 1.0, 2: 0.5, 4: 3.0})
    assert [curve.at(size) for size in (1, 2, 3, 4)] == [1.0, 1.0, 2.0, 3.0]
    with pytest.raises(QBertError, match="no time for 5"):
        curve.at(5)


# ---- composing and refusing -----------------------------------------------------------------------------------------


def test_it_composes_with_itself_and_with_layers() -> None:
    model, _ = pruned(heads=[4, 2], ffn=[256, 128])
    report = prune_(model, TEXTS, tokenizer=tokenizer(), heads=[2, 2], ffn=[128, 64])
    qbert.drop_layers_(model, keep=[1], compensate=False)
    assert report.plan.layers[0].ffn == 128
    assert plan_of(model).layers == (report.plan.layers[1],)
    assert plan_of(model).of.ffn == 256


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({}, "nothing given; allowed: one of"),
        ({"speedup": 2.0, "macs": 0.5}, "speedup and macs given"),
        ({"speedup": 1.0}, "speedup is 1.0; allowed: above 1"),
        ({"macs": 1.5}, "between 0 and 1"),
        ({"macs": float("nan")}, "macs is nan"),
        ({"macs": 0.01}, "macs 0.01 cannot be met"),
        ({"heads": 5}, "attention of layer 0: 5 to keep; allowed: 1 ... 4"),
        ({"ffn": 0}, "ffn of layer 0: 0 to keep"),
        ({"ffn": [64]}, "1 numbers for 2 layers"),
        ({"ffn": True}, "True to keep"),
        ({"heads": 2, "uniform": True}, "uniform keeps all heads"),
        ({"ffn": [64, 128], "uniform": True}, "allowed: one number"),
        ({"ffn": 64, "labels": [0] * 120}, "BertModel is none"),
        ({"ffn": 64, "labels": [0]}, "1 labels for 120 texts"),
        ({"heads": 1.0}, "1.0 to keep"),
        ({"speedup": "2"}, "speedup is '2'"),
        ({"macs": "0.5"}, "macs is '0.5'"),
        ({"ffn": 64, "pooling": "max"}, "pooling 'max': allowed are mean, cls"),
        ({"speedup": 2.0, "scheme": "w9"}, "w9"),
        ({"speedup": 2.0, "batch": 0}, "batch is 0"),
        ({"speedup": 2.0}, "seq is 128; allowed: 1 ... 40"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(wanted: dict[str, Any], said: str) -> None:
    model, before = model_of(), model_of()
    with pytest.raises(QBertError, match=said):
        prune_(model, TEXTS, tokenizer=tokenizer(), **wanted)
    assert same_state(model, before)
    assert plan_of(model).whole


def test_too_few_texts_and_tokens_are_said() -> None:
    with pytest.raises(QBertError, match="31 texts; pruning needs 32"):
        prune_(model_of(), TEXTS[:31], tokenizer=tokenizer(), ffn=64)
    with pytest.raises(QBertError, match="tokens to refit 2048 columns by"):
        prune_(model_of(intermediate_size=2048), TEXTS, tokenizer=tokenizer(), ffn=64)


def test_an_error_on_the_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = model_of("MPNetModel"), model_of("MPNetModel")
    calls = []

    def broken(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError

    monkeypatch.setattr(prune, "_set", broken)
    with pytest.raises(MemoryError):
        prune_(model, TEXTS, tokenizer=tokenizer(), heads=2, ffn=128)
    assert same_state(model, before)
    assert torch.equal(hidden_of(model, **padded_batch()), hidden_of(before, **padded_batch()))
    assert plan_of(model).whole


def test_pruning_comes_before_quantizing() -> None:
    with pytest.raises(QBertError, match="pruning comes before quantizing"):
        prune_(qbert.quantize_(model_of()), TEXTS, tokenizer=tokenizer(), ffn=64)


# ---- logits that are not those of classes ---------------------------------------------------------------------------


@pytest.mark.parametrize("said", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}])
def test_a_model_with_scores_is_judged_by_them(said: dict[str, Any]) -> None:
    """A softmax over one logit is always 1, and its gradient 0: nothing would be seen of what is taken out."""
    model = model_of("BertForSequenceClassification", **said)
    given = Texts.of(model, TEXTS[:32], tokenizer())
    before = outputs_of(model, given)
    assert float(agreement(model, before, before).min()) == 1
    assert float(agreement(model, before, before.mean(0).expand_as(before)).mean()) == pytest.approx(0, abs=1e-5)
    assert float(agreement(model, before[:1], before[:1] + 1e-3, before).min()) > 0.99
    seen = look(model, shaped(model), given, None, "mean", 0)
    assert all(float(each.gradients.abs().sum()) > 0 for each in seen.values())
    with pytest.raises(QBertError, match="labels are for classes that exclude one another"):
        look(model, shaped(model), given, [0] * 32, "mean", 0)
    report = prune_(model, TEXTS, tokenizer=tokenizer(), ffn=64)
    assert report.agreement is not None
    assert report.agreement.mean < 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around_it(mode: Any) -> None:
    """It looks at gradients itself, and what it leaves can be trained."""
    model = model_of()
    with mode():
        report = prune_(model, TEXTS, tokenizer=tokenizer(), ffn=128)
    assert report.agreement == pruned(ffn=128)[1].agreement
    model(**padded_batch())[0].sum().backward()
    with torch.inference_mode():
        made_inside = model_of()
    with pytest.raises(QBertError, match=r"was made in torch\.inference_mode"):
        prune_(made_inside, TEXTS, tokenizer=tokenizer(), ffn=128)


def test_tuples_arrays_and_tensors() -> None:
    """A configuration that asks for tuples, counts of numpy, labels in a tensor."""
    model = model_of("BertForSequenceClassification", return_dict=False)
    labels = torch.tensor([index % 2 for index in range(120)])
    report = prune_(model, TEXTS, tokenizer=tokenizer(), ffn=np.array([64, 128]), heads=np.int64(2), labels=labels)
    assert [(len(each.heads), each.ffn) for each in report.plan.layers] == [(2, 64), (2, 128)]
    qbert.drop_layers_(model, TEXTS, keep=np.int64(1), tokenizer=tokenizer())
    assert len(plan_of(model).layers) == 1
