"""The table of plans: every plan is a recipe, and a row shows what it cost."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import bench_compress
from benchmarks.bench_compress import PLANS, header, line, run_plan
from qbert import Compression, QBertError
from qbert.compress import latency
from qbert.evaluate import load_tokenizer, prepare_baseline, task_data
from qbert.evaluate.datasets import labelled_dataset
from qbert.zoo import resolve_model


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_a_recipe(plan: str) -> None:
    assert Compression.of(**PLANS[plan], quantize="w8a8").scheme is not None


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


def test_an_unknown_plan_is_named() -> None:
    with pytest.raises(QBertError, match="plan 'all'; allowed: quantized only"):
        bench_compress.main(plan=["all"])
