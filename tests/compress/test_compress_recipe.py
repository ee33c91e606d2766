"""The whole recipe: order, what is left, what every step cost, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress_cases import make_texts, same_state, tokenizer
from small_encoders import float_model, hidden_of

import qbert
from qbert import Compression, QBertError, compress
from qbert.compress import latency
from qbert.recipe import as_recipe
from qbert.shapes import plan_of

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 3}
TEXTS = make_texts(150)


def test_everything_in_order_on_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency, "_ROUNDS", 1)
    model, tok = float_model(pad_token_id=1, **SIZES), tokenizer()
    recipe = Compression(vocabulary=64, layers=2, prune={"macs": 0.7}, quantize="w8a8", embedding="w8", batch=1, seq=16)
    small = compress(model, recipe, texts=TEXTS, tokenizer=tok, after_step=lambda small, its: len(its))
    assert same_state(model, float_model(pad_token_id=1, **SIZES))
    assert len(tok) > 64
    methods = ["original", "trim vocabulary", "drop layers", "prune", "quantize w8a8"]
    assert [step.method for step in small.report.steps] == methods
    assert [step.scores for step in small.report.steps[1:]] == [64] * 4
    assert small.report.steps[0].agreement.mean == pytest.approx(1)
    assert small.report.steps[0].agreement.n == len(TEXTS) // 8
    assert [step.size.macs for step in small.report.steps] == sorted(
        (step.size.macs for step in small.report.steps), reverse=True
    )
    assert all(step.ms is not None and step.ms > 0 for step in small.report.steps)
    assert "over the float original" in str(small.report)
    explanation = qbert.explain(small.model)
    assert explanation.encoders[0].fused == "static"
    assert "vocabulary 64 of 97" in str(explanation)
    small.model.save_pretrained(tmp_path)
    inputs = small.tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    again = qbert.load(tmp_path)
    assert torch.equal(hidden_of(again, **inputs), hidden_of(small.model, **inputs))


def test_a_compressed_model_is_compressed_again() -> None:
    model, tok = float_model(**SIZES), tokenizer()
    first = compress(model, Compression(layers=2), texts=TEXTS, tokenizer=tok, measure=False)
    second = compress(
        first.model, Compression(prune={"ffn": 64}), texts=TEXTS, tokenizer=first.tokenizer, measure=False
    )
    plan = plan_of(second.model)
    assert (len(plan.layers), plan.layers[0].ffn, plan.of.layers) == (2, 64, 3)
    assert second.report.steps[-1].ms is None


def test_a_recipe_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text('vocabulary = 64\nlayers = [0, 2]\nquantize = "w8a8"\n[prune]\nspeedup = 1.5\n')
    recipe = Compression.read(path)
    assert recipe == Compression(vocabulary=64, layers=[0, 2], prune={"speedup": 1.5}, quantize="w8a8")
    assert recipe.pruning == Compression(prune=1.5).pruning
    path.write_text("vocabulary = ")
    with pytest.raises(QBertError, match=r"small\.toml"):
        Compression.read(path)
    with pytest.raises(QBertError, match=r"none\.toml"):
        Compression.read(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "nothing to do"),
        ({"words": 3}, "words"),
        ({"layers": 0}, "layers"),
        ({"vocabulary": 1.5}, "vocabulary"),
        ({"quantize": "w9"}, "w9"),
        ({"quantize": "none"}, "nothing to do"),
        ({"quantize": "w8a8+w8", "embedding": "w8"}, "allowed: one that says"),
        ({"prune": {"faster": 2}}, "faster"),
    ],
)
def test_recipes_that_do_not_fit_are_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(QBertError, match=said):
        Compression.of(**fields)
    with pytest.raises(QBertError, match=said):
        Compression(**fields)


def test_bad_input_is_said() -> None:
    recipe = Compression(layers=1)
    with pytest.raises(QBertError, match="comes before quantizing"):
        compress(qbert.quantize_(float_model()), recipe, texts=TEXTS, tokenizer=tokenizer())
    with pytest.raises(QBertError, match="2 texts; compressing"):
        compress(float_model(), recipe, texts=TEXTS[:20], tokenizer=tokenizer())
    with pytest.raises(QBertError, match="pooling 'max'"):
        compress(float_model(), recipe, texts=TEXTS, tokenizer=tokenizer(), pooling="max")
    with pytest.raises(QBertError, match="size is '80'"):
        qbert.trim_vocabulary_(float_model(), tokenizer(), TEXTS, size="80")
    with pytest.raises(QBertError, match="1 labels for 150 texts"):
        compress(float_model(), recipe, texts=TEXTS, tokenizer=tokenizer(), labels=[0])


def test_a_pipeline_encodes_and_saves_with_its_trimmed_tokenizer(tmp_path: Path) -> None:
    """It went on with the old tokenizer, whose numbers are rows of other words by then, or of none."""
    st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers; requirements.txt has it")
    base, tok = float_model(pad_token_id=1), tokenizer()
    base.save_pretrained(tmp_path / "float")
    tok.save_pretrained(tmp_path / "float")
    pipeline, texts = st.SentenceTransformer(str(tmp_path / "float"), device="cpu"), TEXTS
    floats, recipe = pipeline.encode(texts), Compression(vocabulary=64)
    small = compress(pipeline, recipe, texts=texts, measure=False)
    assert len(pipeline.tokenizer) == len(tok) > 64
    assert np.array_equal(pipeline.encode(texts), floats)
    assert small.model.tokenizer is small.tokenizer
    assert len(small.tokenizer) == 64
    kept = [place for place, text in enumerate(texts) if tok.tokenize(text) == small.tokenizer.tokenize(text)]
    assert 0 < len(kept) < len(texts)
    encoded = small.model.encode([texts[place] for place in kept])
    assert np.allclose(encoded, floats[kept], atol=1e-5)
    small.model.save_pretrained(str(tmp_path / "small"))
    again = st.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert len(again.tokenizer) == 64
    assert np.array_equal(again.encode([texts[place] for place in kept]), encoded)
    with pytest.raises(QBertError, match="a tokenizer of its own"):
        compress(pipeline, recipe, texts=texts, tokenizer=tok, measure=False)
    with pytest.raises(QBertError, match="a tokenizer of its own"):
        qbert.trim_vocabulary_(pipeline, tok, texts, size=64)
    assert np.array_equal(pipeline.encode(texts), floats)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantize": "w8a8"},
        {"quantize": "w8a8+none"},
        {"quantize": "w8a8", "embedding": "none"},
        {"quantize": "none", "embedding": "gobo4"},
    ],
)
def test_a_word_means_what_it_means_to_quantize(fields: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model and in the milliseconds: what is measured is quantized as the finished model is."""
    made: list[Any] = []
    quantize = latency.quantize_
    monkeypatch.setattr(latency, "_ROUNDS", 1)
    monkeypatch.setattr(latency, "quantize_", lambda model, recipe: made.append(recipe) or quantize(model, recipe))
    recipe = Compression(**fields, batch=1, seq=16)
    small = compress(float_model(), recipe, texts=TEXTS, tokenizer=tokenizer())
    wanted = qbert.quantize_(float_model(), recipe.word)
    kinds = {name: getattr(module, "scheme", None) for name, module in wanted.named_modules()}
    assert {name: getattr(module, "scheme", None) for name, module in small.model.named_modules()} == kinds
    assert set(map(str, made)) == {str(as_recipe(recipe.word))}


@pytest.mark.parametrize("fields", [{"quantize": "w8a16"}, {"quantize": "gobo4", "embedding": "gobo4"}])
def test_float_activations_are_refused_with_what_is_allowed(fields: dict[str, str]) -> None:
    with pytest.raises(QBertError, match=r"leaves activations float.* allowed: w8a8, w4a8, gobo3a8, gobo4a8, none"):
        Compression.of(**fields)
    with pytest.raises(QBertError, match="leaves activations float"):
        latency.Load(8, 128, fields["quantize"])
