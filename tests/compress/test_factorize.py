"""Linears of low rank: the best two of each rank, kept where they pay, saved, loaded, fused, composed with the rest."""

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
from qbert import Compression, QBertError, compress, drop_layers_, factorize_, prune_, trim_vocabulary_
from qbert.compress import factorize, latency
from qbert.compress.factorize import Spectrum
from qbert.compress.latency import Load
from qbert.compress.products import Shape, products_ms
from qbert.compress.removal import Moments
from qbert.encoder import encoders, fused_forward, unfused
from qbert.formats import SCHEMES
from qbert.modules import FactoredLinear
from qbert.quantizers import quantize
from qbert.shapes import plan_of, recorded_plan
from qbert.weight.codec import decode
from qbert.workflow import verify_checkpoint

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
TEXTS = make_texts(160)
FEW: dict[str, Any] = {"scheme": None, "batch": 2, "seq": 16}  # tokens that are timed


def model_of(name: str = "BertModel", **changes: Any) -> Any:
    if name.startswith("DistilBert"):
        return float_model(name, dim=128, n_heads=4, hidden_dim=256, **changes)
    return float_model(name, **{**SIZES, **changes})


def factorized(name: str = "BertModel", **wanted: Any) -> tuple[Any, Any]:
    model = model_of(name)
    return model, factorize_(model, TEXTS, tokenizer=tokenizer(name), **{**FEW, **wanted})


def timed(monkeypatch: pytest.MonkeyPatch, *, pays: bool) -> None:
    """What two products take is not measured but said: time is not what these tests are about."""

    def said(shape: Shape, ranks: Any, *rest: object) -> tuple[float, dict[int, float]]:
        return 2.0, dict.fromkeys(ranks, 1.0 if pays else 3.0)

    monkeypatch.setattr(factorize, "products_ms", said)
    monkeypatch.setattr(factorize, "_timed", lambda *parts: (2.0, 1.0))


def problem(n: int, k: int) -> tuple[Tensor, Tensor]:
    """A weight, and inputs that lie near a few directions and not around zero."""
    generator = torch.Generator().manual_seed(n + k)
    inputs = torch.randn(2000, k, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.logspace(0, -3, k, dtype=torch.float64) + 3
    turn = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)).Q
    return torch.randn(n, k, generator=generator, dtype=torch.float64), inputs @ turn


def error_of(weight: Tensor, other: Tensor, inputs: Tensor, root: Tensor | None = None) -> float:
    centred = inputs - inputs.mean(0)
    missing, spread = centred @ (weight - other).T, centred @ weight.T
    if root is not None:
        missing, spread = missing @ root.T, spread @ root.T
    return float((missing.pow(2).sum() / spread.pow(2).sum()).sqrt())


# ---- the best of each rank ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(96, 32), (32, 96), (64, 64)])
def test_the_inputs_tell_which_rank_is_enough(n: int, k: int) -> None:
    weight, inputs = problem(n, k)
    spectrum = Spectrum.of(weight, Moments.of(inputs))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    found, plain = spectrum.factors(8).product, (u[:, :8] * s[:8]) @ v[:8]
    assert error_of(weight, found, inputs) < 0.6 * error_of(weight, plain, inputs)
    assert spectrum.energy(8) == pytest.approx(1 - error_of(weight, found, inputs) ** 2, abs=0.02)


def test_output_channels_count_by_what_they_do() -> None:
    weight, inputs = problem(48, 32)
    root = torch.diag(torch.logspace(0, -2, 48, dtype=torch.float64))
    told = Spectrum.of(weight, Moments.of(inputs), root).factors(6).product
    untold = Spectrum.of(weight, Moments.of(inputs)).factors(6).product
    assert error_of(weight, told, inputs, root) < 0.95 * error_of(weight, untold, inputs, root)
    assert error_of(weight, told, inputs) > error_of(weight, untold, inputs)


def test_of_all_ranks_nothing_is_lost() -> None:
    weight, inputs = problem(40, 32)
    spectrum = Spectrum.of(weight, Moments.of(inputs), torch.eye(40, dtype=torch.float64))
    assert torch.allclose(spectrum.factors(32).product, weight, atol=1e-9)
    assert spectrum.energy(32) == pytest.approx(1)
    assert spectrum.rank(0.5) is None  # below the 32 there is no multiple of 64


def test_rotated_factors_lose_less_in_int8() -> None:
    """Where few tokens are far out in few directions, as in a feed-forward network."""
    weight, _ = problem(128, 128)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 128, generator=generator, dtype=torch.float64) ** 5
    inputs = inputs * torch.logspace(0, -2, 128, dtype=torch.float64)
    spectrum = Spectrum.of(weight, Moments.of(inputs))

    def loss(rotate: bool) -> float:
        factors = spectrum.factors(64, rotate=rotate)
        first, second = (
            decode(quantize(each.float(), SCHEMES["w8a8"])).double() for each in (factors.first, factors.second)
        )
        thin = (inputs - inputs.mean(0)) @ first.T
        step = thin.abs().amax(1, keepdim=True) / 127
        rounded = (thin / step).round() * step @ second.T
        exact = (inputs - inputs.mean(0)) @ factors.product.T
        return float((rounded - exact).pow(2).mean())

    assert loss(True) < 0.8 * loss(False)


def test_two_products_of_a_rank_that_pays_are_faster() -> None:
    whole, thin = products_ms(Shape(768, 768), [64], Load(4, 64), torch.device("cpu"))
    assert 0 < thin[64] < whole
    whole, thin = products_ms(Shape(768, 768), [64], Load(4, 64, None), torch.device("cpu"))
    assert 0 < thin[64] < whole
    assert Shape(768, 768).ranks == [64, 128, 192, 256, 320]
    assert Shape(64, 128).ranks == []


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "BertModel",
        "MPNetModel",
        pytest.param("DistilBertModel", marks=pytest.mark.slow),
        pytest.param("BertForSequenceClassification", marks=pytest.mark.slow),
    ],
)
def test_of_every_kind_saved_quantized_and_fused(name: str, tmp_path: Path) -> None:
    model, report = factorized(name, rank=96)
    inputs = padded_batch()
    assert report.kept == 6
    assert [dict(each.ranks) for each in report.plan.layers] == [dict.fromkeys(factorize.FACTORABLE, 96)] * 2
    assert 0 < max(row.error for row in report.rows) < 0.5
    assert report.agreement.mean > 0.9
    model.save_pretrained(tmp_path / "float")
    again = qbert.load(tmp_path / "float")
    assert torch.equal(hidden_of(again, **inputs), hidden_of(model, **inputs))
    assert plan_of(again) == plan_of(model)
    calibration = qbert.calibrate(again, TEXTS[:30], tokenizer=tokenizer(name))
    qbert.quantize_(again, "w8a8", fuse=True, calibration=calibration)
    assert qbert.explain(again).encoders[0].fused == "static"
    with unfused(again):
        expected = hidden_of(again, **inputs)
    found = hidden_of(again, **inputs)
    rows = inputs["attention_mask"].bool() if found.dim() == 3 else slice(None)
    assert float(nn.functional.cosine_similarity(found[rows], expected[rows], dim=-1).mean()) > 0.99
    again.save_pretrained(tmp_path / "fused")
    loaded = qbert.load(tmp_path / "fused")
    assert torch.equal(hidden_of(loaded, **inputs), found)
    assert "rank of ffn_in 96 96" in str(qbert.explain(loaded))
    assert loaded.config.quantization_config.record.format_version == 5


def test_the_fused_program_has_both_products_and_the_same_bits_in_every_batch() -> None:
    model, _ = factorized(rank=64)
    calibration = qbert.calibrate(model, TEXTS[:30], tokenizer=tokenizer())
    qbert.quantize_(model, "w8a8", fuse=True, calibration=calibration)
    inputs = padded_batch()
    together = hidden_of(model, **inputs)
    for row, mask in enumerate(inputs["attention_mask"]):
        alone = hidden_of(model, input_ids=inputs["input_ids"][row : row + 1, mask.bool()])
        assert torch.equal(alone[0], together[row, mask.bool()])
    fused = fused_forward(model)
    assert fused is not None
    program = fused.encoder().program
    names = [step.name for step in program.layers[0].steps]
    assert [name for name in names if "thin" in name and "codes" not in name] == [
        "attention output, thin", "feed-forward in, thin", "feed-forward out, thin",
    ]  # fmt: skip
    whole = model_of()
    qbert.quantize_(whole, "w8a8", fuse=True)
    hidden_of(whole, **inputs)
    assert program.cost([16]).macs < fused_forward(whole).encoder().program.cost([16]).macs
    watch = fused.encoder().watch
    assert watch.unchanged()
    model.encoder.layer[0].output.dense.first = copy.deepcopy(model.encoder.layer[0].output.dense.first)
    assert not watch.unchanged()


def test_overflow_neurons_find_their_way_through_two_products() -> None:
    model, _ = factorized(rank=96)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.intermediate.dense.second.bias[3] = 60.0  # a neuron ten times above all others
    calibration = qbert.calibrate(model, TEXTS[:30], tokenizer=tokenizer())
    assert any(layer.overflow for layer in calibration.layers.values())
    expected = hidden_of(model, **padded_batch())
    qbert.quantize_(model, "w8a8", fuse=True, calibration=calibration)
    rows = padded_batch()["attention_mask"].bool()
    found = hidden_of(model, **padded_batch())
    assert float(nn.functional.cosine_similarity(found[rows], expected[rows], dim=-1).mean()) > 0.97


def test_data_and_gradients_help_and_the_bias_has_the_mean() -> None:
    model, report = factorized(rank=32, linears=["ffn_out"])
    plain = model_of()
    for layer in plain.encoder.layer:
        linear = layer.output.dense
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        linear.weight = nn.Parameter((u[:, :32] * s[:32]) @ v[:32])
    before = hidden_of(model_of(), **padded_batch())
    rows = padded_batch()["attention_mask"].bool()

    def near(other: Any) -> float:
        return float(
            nn.functional.cosine_similarity(hidden_of(other, **padded_batch())[rows], before[rows], dim=-1).mean()
        )

    assert near(model) > near(plain)
    assert [dict(each.ranks) for each in report.plan.layers] == [{"ffn_out": 32}] * 2


# ---- what pays ------------------------------------------------------------------------------------------------------


def test_auto_takes_the_least_rank_that_keeps_the_energy_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, pays=True)
    model, report = factorized(rank="auto", energy=0.5, linears=["ffn_out"])
    assert [row.rank for row in report.rows] == [64, 64]
    assert all(row.kept and row.energy >= 0.5 and row.why == "kept" for row in report.rows)
    assert type(model.encoder.layer[0].output.dense) is FactoredLinear
    assert report.macs < 1
    assert "x2.00" in str(report)


def test_auto_leaves_whole_what_does_not_pay_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, pays=False)
    model, report = factorized(rank="auto", energy=0.5)
    assert same_state(model, model_of())
    assert report.kept == 0
    assert recorded_plan(model) is None
    assert {row.why for row in report.rows} == {"refused: two products are not faster here"}
    assert all(row.ms == (2.0, 3.0) and row.break_even is None for row in report.rows)
    assert "refused: two products are not faster here" in report.table()
    timed(monkeypatch, pays=True)
    _, report = factorized(rank="auto", energy=0.999999)
    assert {row.why for row in report.rows} == {"refused: no rank below 128 keeps 99.9999%"}


def test_a_rank_that_is_given_is_taken_and_its_cost_said(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, pays=False)
    _, report = factorized(rank=100, linears=["ffn_in"])
    assert {row.why for row in report.rows} == {"kept, though not faster here"}
    assert all(row.ms == (2.0, 3.0) for row in report.rows)


# ---- with what else there is ----------------------------------------------------------------------------------------


def test_composes_with_layers_words_heads_and_neurons(tmp_path: Path) -> None:
    model, tok = model_of(pad_token_id=1, num_hidden_layers=3), tokenizer()
    prune_(model, TEXTS, tokenizer=tok, heads=2, ffn=192)
    factorize_(model, TEXTS, tokenizer=tok, rank=32, **FEW)
    drop_layers_(model, TEXTS, keep=2, tokenizer=tok)
    trim_vocabulary_(model, tok, TEXTS, size=80)
    plan = plan_of(model)
    assert (len(plan.layers), plan.vocabulary) == (2, 80)
    assert [(len(each.heads), each.ffn, each.ranks["ffn_out"]) for each in plan.layers] == [(2, 192, 32)] * 2
    inputs = tok(TEXTS[:3], padding=True, return_tensors="pt")
    qbert.quantize_(model, "w8a8", fuse=True)
    model.save_pretrained(tmp_path)
    assert torch.equal(hidden_of(qbert.load(tmp_path), **inputs), hidden_of(model, **inputs))
    qbert.dequantize_(model)
    assert plan_of(model) == plan
    with pytest.raises(QBertError, match=r"two products of low rank already; pruning comes before"):
        prune_(model, TEXTS, tokenizer=tok, ffn=64)
    with pytest.raises(QBertError, match="two products of low rank already"):
        factorize_(model, TEXTS, tokenizer=tok, rank=16)


def test_in_a_recipe_between_heads_and_quantization(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency, "_ROUNDS", 1)
    path = tmp_path / "small.toml"
    path.write_text(
        'quantize = "w8a8"\nbatch = 1\nseq = 16\n[prune]\nffn = 192\n[rank]\nrank = 64\nlinears = ["ffn_out"]\n'
    )
    recipe = Compression.read(path)
    small = compress(model_of(), recipe, texts=TEXTS, tokenizer=tokenizer())
    assert [step.method for step in small.report.steps] == ["original", "prune", "low rank", "quantize w8a8"]
    assert [dict(each.ranks) for each in small.report.steps[-1].plan.layers] == [{"ffn_out": 64}] * 2
    assert small.report.steps[2].size.macs < small.report.steps[1].size.macs
    assert any("pays up to" in note for note in small.report.steps[2].notes)
    assert Compression(rank="auto").low_rank == Compression(rank={}).low_rank


def test_verify_says_which_model_it_wants(tmp_path: Path) -> None:
    model_of().save_pretrained(tmp_path / "original")
    model, _ = factorized(rank=64)
    model.save_pretrained(tmp_path / "float")
    qbert.quantize_(model, "w8a8")
    qbert.save(model, tmp_path / "small")
    with pytest.raises(QBertError, match="two products of low rank here and one in"):
        verify_checkpoint(tmp_path / "small", str(tmp_path / "original"))
    report = verify_checkpoint(tmp_path / "small", str(tmp_path / "float"))
    assert any(row.name.endswith("output.dense.first") for row in report.sqnr)


def test_an_export_of_the_fused_encoder_names_the_way_out() -> None:
    from qbert.export import qdq

    model, _ = factorized(rank=64)
    qbert.quantize_(model, "w8a8", fuse=True)
    _, base, family = next(encoders(model))
    with pytest.raises(QBertError, match=r"two products of low rank.*unfuse_"):
        qdq.install(copy.deepcopy(model), base, family)
    expected = hidden_of(qbert.unfuse_(model), **padded_batch())
    qdq.install(model, base, family)
    rows = padded_batch()["attention_mask"].bool()
    found = hidden_of(model, **padded_batch())[rows]
    assert float(nn.functional.cosine_similarity(found, expected[rows], dim=-1).min()) > 0.999


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"rank": 0}, "rank is 0; allowed"),
        ({"rank": 128}, r"allowed: 'auto', or 1 \.\.\. 127"),
        ({"rank": True}, "rank is True"),
        ({"rank": "half"}, "rank is 'half'"),
        ({"energy": 1.0}, "energy is 1.0"),
        ({"energy": "all"}, "energy is 'all'"),
        ({"linears": ["query"]}, "allowed: some of attention_output, ffn_in, ffn_out"),
        ({"linears": []}, "linears is"),
        ({"labels": [0]}, "1 labels for 160 texts"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"seq": 64}, "the positions of this model"),
        ({"scheme": "w8a16"}, "leaves activations float"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(wanted: dict[str, Any], said: str) -> None:
    model = model_of()
    with pytest.raises(QBertError, match=said):
        factorize_(model, TEXTS, tokenizer=tokenizer(), **{**FEW, **wanted})
    assert same_state(model, model_of())


def test_too_few_texts_and_quantized_models_are_refused() -> None:
    with pytest.raises(QBertError, match="5 texts; making linears of low rank needs"):
        factorize_(model_of(), TEXTS[:5], tokenizer=tokenizer(), **FEW)
    with pytest.raises(QBertError, match="tokens to know 256 inputs by"):
        factorize_(model_of(), TEXTS[:34], tokenizer=tokenizer(), **FEW)
    with pytest.raises(QBertError, match="is quantized already"):
        factorize_(qbert.quantize_(model_of()), TEXTS, tokenizer=tokenizer())


def test_an_error_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of(), []

    def fails(*given: object) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise QBertError("stop")
        return 0.1

    monkeypatch.setattr(factorize, "_error", fails)
    with pytest.raises(QBertError, match="stop"):
        factorize_(model, TEXTS, tokenizer=tokenizer(), rank=64, **FEW)
    assert same_state(model, model_of())
    assert recorded_plan(model) is None
