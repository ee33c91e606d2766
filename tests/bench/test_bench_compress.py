"""The table of plans: every plan is a recipe, and a row shows what it cost."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from benchmarks import bench_compress
from benchmarks.bench_compress import PLANS, fields_of, header, line, run_plan
from qbert import Compression, QBertError
from qbert.compress import latency
from qbert.evaluate import TASKS, Task, load_tokenizer, prepare_baseline, task_data
from qbert.evaluate.datasets import labelled_dataset
from qbert.zoo import resolve_model


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_a_recipe(plan: str) -> None:
    assert Compression.of(**{"quantize": "w8a8", **PLANS[plan]}).scheme is not None


def test_a_row_shows_what_a_plan_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_ROUNDS", 1)
    monkeypatch.setitem(PLANS, "1 layer", {"layers": 1, "batch": 1, "seq": 16})
    tokenizer = load_tokenizer(resolve_model("minilm"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).eval()
    texts = [f"the {word} is {index}" for index in range(24) for word in ("red", "blue", "dog", "cat")]
    rows = [(text, "animal" if "dog" in text or "cat" in text else "colour") for text in texts]
    baseline = prepare_baseline(model, tokenizer, task_data(labelled_dataset("toy", rows)))
    row = run_plan(model, tokenizer, "1 layer", "w8a8", [baseline], texts)
    assert [step.method for step in row.report.steps] == ["original", "drop layers", "quantize w8a8"]
    shown = line(row)
    assert shown.startswith("| 1 layer | x0.50 |")
    assert shown.count("|") == header(["toy"]).split("\n")[0].count("|")


def test_budgets_of_multiply_adds_are_the_same_everywhere() -> None:
    assert fields_of("prune x2, Kwon", macs=True) == {"prune": {"macs": 0.5, "method": "fisher", "refit": "scales"}}
    assert fields_of("prune x2, Kwon", macs=False) == PLANS["prune x2, Kwon"]
    assert fields_of("5 layers", macs=True) == {"layers": 5}
    for plan in PLANS:
        if fields_of(plan, macs=True):
            assert Compression.of(**fields_of(plan, macs=True)).batch == 8


def test_labels_are_counted_as_the_classifier_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"text {index}", "yes" if index % 3 else "no") for index in range(30)]
    task = Task("made", lambda: labelled_dataset("made", rows), "classification", 5, "", "", "")
    monkeypatch.setitem(TASKS, "made", task)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    names = {0: "YES", 1: "other", 2: "No"}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, id2label=names, **sizes))
    texts, labels = bench_compress.labelled(model, "made", 12)
    assert len(texts) == len(labels) == 12
    assert all(label == (0 if int(text.split()[1]) % 3 else 2) for text, label in zip(texts, labels, strict=True))
    with pytest.raises(QBertError, match="no classes of that task"):
        bench_compress.labelled(BertModel(BertConfig(vocab_size=50, **sizes)), "made", 12)


def test_an_unknown_plan_is_named() -> None:
    with pytest.raises(QBertError, match="plan 'all'; allowed: quantized only"):
        bench_compress.main(plan=["all"])
