"""Zeros by second-order scores: exact where they are, made up for by the rest, nearer than by magnitude; and no time saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_cases import make_texts, same_state, tokenizer
from small_encoders import float_model, hidden_of, padded_batch
from torch import Tensor, nn

import qbert
from qbert import Compression, QBertError, compress, factorize_, sparsify_
from qbert.compress import latency, sparsify
from qbert.compress.removal import Moments
from qbert.compress.sparsify import TWO_OF_FOUR, by_magnitude, by_refit, inverse_root
from qbert.shapes import recorded_plan
from qbert.workflow import inspect_checkpoint

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
TEXTS = make_texts(80)


def model_of(name: str = "BertModel") -> Any:
    if name.startswith("DistilBert"):
        return float_model(name, dim=64, n_heads=2, hidden_dim=128)
    return float_model(name, **SIZES)


def problem(n: int = 24, k: int = 64) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that say much of one another."""
    generator = torch.Generator().manual_seed(n + k)
    mixed = torch.randn(k // 4, k, generator=generator, dtype=torch.float64)
    inputs = torch.randn(1000, k // 4, generator=generator, dtype=torch.float64) @ mixed + 2
    inputs += 0.3 * torch.randn(1000, k, generator=generator, dtype=torch.float64)
    return torch.randn(n, k, generator=generator, dtype=torch.float64), inputs


def error_of(weight: Tensor, other: Tensor, inputs: Tensor) -> float:
    centred = inputs - inputs.mean(0)
    return float(((centred @ (weight - other).T).pow(2).sum() / (centred @ weight.T).pow(2).sum()).sqrt())


# ---- one matrix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [TWO_OF_FOUR, 0.5, 0.8])
@pytest.mark.parametrize("k", [64, 100])
def test_the_rest_makes_up_for_what_is_zero(sparsity: Any, k: int) -> None:
    weight, inputs = problem(k=k)
    refitted = by_refit(weight, inverse_root(Moments.of(inputs)), sparsity, block=32)
    plain = by_magnitude(weight, sparsity)
    for each in (refitted, plain):
        share = float((each == 0).double().mean())
        assert share == pytest.approx(0.5 if sparsity == TWO_OF_FOUR else sparsity, abs=0.01)
    assert error_of(weight, refitted, inputs) < (0.97 if sparsity == 0.8 else 0.75) * error_of(weight, plain, inputs)
    if sparsity == TWO_OF_FOUR:
        assert all(bool(((each == 0).view(24, -1, 4).sum(2) == 2).all()) for each in (refitted, plain))


def test_blocks_change_nothing_where_zeros_are_chosen_in_fours() -> None:
    weight, inputs = problem()
    root = inverse_root(Moments.of(inputs))
    found = [by_refit(weight, root, TWO_OF_FOUR, block=block) for block in (4, 16, 64)]
    assert all(torch.allclose(found[0], each, atol=1e-9) for each in found[1:])


def test_one_column_at_a_time_is_optimal_brain_surgeon() -> None:
    """The first zero of a row: the others move by the textbook's step."""
    weight, inputs = problem(n=1, k=8)
    moments = Moments.of(inputs)
    inverse = torch.linalg.inv(moments.damped(sparsify.RIDGES[0]))
    root = inverse_root(moments)
    assert torch.allclose(root.T @ root, inverse)
    found = by_refit(weight, root, 0.125, block=8)
    gone = int((found == 0).flatten().nonzero())
    left = torch.linalg.inv(torch.linalg.inv(inverse)[gone:, gone:])  # columns before it are settled
    step = weight[0, gone] / left[0, 0] * left[0]
    assert torch.allclose(found[0, gone:], weight[0, gone:] - step, atol=1e-9)
    assert torch.equal(found[0, :gone], weight[0, :gone])


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sparsity"), [("BertModel", "2:4"), ("MPNetModel", 0.6), ("DistilBertModel", "2:4")])
def test_nearer_than_by_magnitude_and_zero_after_quantization(name: str, sparsity: Any, tmp_path: Path) -> None:
    model, other, tok = model_of(name), model_of(name), tokenizer(name)
    report = sparsify_(model, TEXTS, sparsity=sparsity, tokenizer=tok)
    plain = sparsify_(other, TEXTS, sparsity=sparsity, method="magnitude", tokenizer=tok)
    assert 1 - report.agreement.mean < 0.7 * (1 - plain.agreement.mean)
    assert len(report.rows) == 12
    assert all(row.refitted and row.error < row.magnitude for row in report.rows)
    assert all(row.error == row.magnitude and not row.refitted for row in plain.rows)
    assert report.zeros == pytest.approx(0.5 if sparsity == "2:4" else sparsity, abs=0.01)
    assert report.macs == 1
    assert "0 ms saved: no kernel here skips zeros" in str(report)
    assert recorded_plan(model) is None
    model.save_pretrained(tmp_path / "float")  # a plain model of transformers
    assert torch.equal(
        hidden_of(type(model).from_pretrained(tmp_path / "float"), **padded_batch()), hidden_of(model, **padded_batch())
    )
    zero = {name: each.weight == 0 for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    qbert.quantize_(model, "w8a8", fuse=True)
    for name, module in model.named_modules():
        if name in zero:
            assert bool((module.weight[zero[name]] == 0).all())
    qbert.save(model, tmp_path / "small")
    assert torch.equal(hidden_of(qbert.load(tmp_path / "small"), **padded_batch()), hidden_of(model, **padded_batch()))
    assert any(
        "MB saved in the file, 0 ms saved, because" in note for note in inspect_checkpoint(tmp_path / "small").notes
    )


def test_parts_of_linears_of_low_rank_get_zeros_too() -> None:
    model, tok = model_of(), tokenizer()
    factorize_(model, TEXTS, tokenizer=tok, rank=32, linears=["ffn_out"], scheme=None, batch=1, seq=8)
    report = sparsify_(model, TEXTS, sparsity="2:4", tokenizer=tok)
    assert all(layer.output.dense.first.bias is None for layer in model.encoder.layer)
    assert qbert.explain(qbert.quantize_(model, "w8a8", fuse=True)).encoders[0].fused == "dynamic"
    assert [row.path for row in report.rows if "output.dense." in row.path] == [
        "output.dense.first",
        "output.dense.second",
    ] * 2


def test_in_a_recipe_after_all_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency, "_ROUNDS", 1)
    path = tmp_path / "small.toml"
    path.write_text('quantize = "w8a8"\nsparsity = "2:4"\nbatch = 1\nseq = 16\n[prune]\nffn = 64\n')
    small = compress(model_of(), Compression.read(path), texts=TEXTS, tokenizer=tokenizer())
    assert [step.method for step in small.report.steps] == ["original", "prune", "2:4 zeros", "quantize w8a8"]
    assert any("0 ms saved" in note for note in small.report.steps[2].notes)
    assert any("(2:4)" in note for note in qbert.explain(small.model).notes)
    assert Compression(sparsity=0.5).zeros == Compression(sparsity={"sparsity": 0.5, "method": "refit"}).zeros
    for wrong in (0.01, 0.99, 1, "1:4", {"sparsity": 0.5, "method": "wanda"}):
        with pytest.raises(QBertError, match="sparsity"):
            Compression(sparsity=wrong)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"sparsity": 0.1}, r"sparsity is 0.1; allowed: '2:4', or 0.2 \.\.\. 0.95"),
        ({"sparsity": 1}, "sparsity is 1"),
        ({"sparsity": True}, "sparsity is True"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparsity": "4:8"}, "sparsity is '4:8'"),
        ({"sparsity": 0.5, "method": "wanda"}, "method is 'wanda'; allowed: refit, magnitude"),
        ({"sparsity": 0.5, "pooling": "max"}, "pooling 'max'"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(wanted: dict[str, Any], said: str) -> None:
    model = model_of()
    with pytest.raises(QBertError, match=said):
        sparsify_(model, TEXTS, tokenizer=tokenizer(), **wanted)
    assert same_state(model, model_of())


def test_too_few_texts_odd_sides_and_quantized_models_are_refused() -> None:
    with pytest.raises(QBertError, match="5 texts; making weights zero needs"):
        sparsify_(model_of(), TEXTS[:5], sparsity=0.5, tokenizer=tokenizer())
    with pytest.raises(QBertError, match="columns by"):
        sparsify_(float_model(intermediate_size=1024), TEXTS[:32], sparsity=0.5, tokenizer=tokenizer())
    with pytest.raises(QBertError, match=r"output.dense of layer 0 has 126 inputs; 2:4 needs a multiple of 4"):
        sparsify_(float_model(intermediate_size=126), TEXTS, sparsity="2:4", tokenizer=tokenizer())
    with pytest.raises(QBertError, match="is quantized already"):
        sparsify_(qbert.quantize_(model_of()), TEXTS, sparsity=0.5, tokenizer=tokenizer())


def test_an_error_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before, calls = model_of(), copy.deepcopy(model_of()), []

    def fails(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise QBertError("stop")
        original(*given)

    original = sparsify._set
    monkeypatch.setattr(sparsify, "_set", fails)
    with pytest.raises(QBertError, match="stop"):
        sparsify_(model, TEXTS, sparsity=0.5, tokenizer=tokenizer())
    assert same_state(model, before)
