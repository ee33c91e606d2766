"""What is particular to a family when it runs fused: distances, rotations, windows, shared layers, widths, activations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_encoders import (
    A8,
    BY_DISTANCE,
    EVERY,
    LEAST_SQNR_DB,
    VARIANTS,
    bound,
    calibrated,
    calibration_of,
    encoder_of,
    float_model,
    fused_model,
    hidden_of,
    padded_batch,
)
from torch import Tensor, nn

import qbert
from qbert import Recipe, explain, fuse_, quantize_, unfuse_
from qbert.calibrate import rotated
from qbert.encoder import Layer, Program, fused_forward, obstacle
from qbert.families import albert, modernbert, mpnet
from qbert.metrics import sqnr_db
from qbert.modules import QuantizedModule

NEW = tuple(family for family in EVERY if family not in ("Bert", "Roberta", "DistilBert", "Electra"))


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def _program(model: nn.Module) -> Program:
    return fused_forward(encoder_of(model)).encoder().program


def _attention(layer: Layer, name: str) -> Any:
    (step,) = [step for step in layer.steps if step.operation == "attention"]
    return bound(step, name)


def _calibrated(model: Any, variant: str) -> Any:
    return calibration_of(model) if variant == "static" else None


def _agrees(model: Any, batch: dict[str, Tensor], least: float) -> None:
    """A fused model with the same model unfused, where tokens are."""
    there = batch["attention_mask"].bool()
    expected = hidden_of(unfuse_(copy.deepcopy(model)), **batch)[there]
    assert fused_forward(encoder_of(model)) is not None
    assert sqnr_db(expected, hidden_of(model, **batch)[there]) > least


# ---- distances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", BY_DISTANCE)
def test_sequences_longer_than_reach_and_window(family: str, variant: str) -> None:
    model = fused_model(f"{family}Model", variant, max_position_embeddings=400)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 97, (3, 320), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 150:], mask[2, :40] = 0, 0
    batch = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    _agrees(model, batch, LEAST_SQNR_DB[variant] - 3)
    alone = hidden_of(model, input_ids=ids[1:2, :150])
    assert torch.equal(hidden_of(model, **batch)[1, :150], alone[0])


def test_mpnets_bias_is_transformers() -> None:
    model = fused_model("MPNetModel")
    for length in (1, 5, 129, 300):
        expected = model.encoder.compute_position_bias(torch.zeros(1, length, 1))[0]  # (heads, length, length)
        distances = torch.arange(length) - torch.arange(length)[:, None]
        bias = _attention(_program(model).layers[0], "bias")
        assert torch.equal(bias[:, distances.clamp(-mpnet.REACH, mpnet.REACH) + mpnet.REACH], expected)
    first, second = (_attention(layer, "bias") for layer in _program(model).layers)
    assert first is second


def test_a_changed_bias_is_followed() -> None:
    model, batch = fused_model("MPNetModel"), padded_batch()
    before = hidden_of(model, **batch)
    with torch.no_grad():
        model.encoder.relative_attention_bias.weight.mul_(3.0)
    after = hidden_of(model, **batch)
    assert not torch.equal(after, before)
    assert torch.equal(after, hidden_of(copy.deepcopy(model), **batch))


@pytest.mark.parametrize(
    ("shape", "words"), [((16, 2), "is 16 buckets of 2 heads"), ((32, 4), "is 32 buckets of 4 heads")]
)
def test_a_bias_that_does_not_fit_is_refused(shape: tuple[int, int], words: str) -> None:
    model = quantize_(float_model("MPNetModel"), "w8a8+none")
    model.encoder.relative_attention_bias = nn.Embedding(*shape)
    assert f"encoder.relative_attention_bias {words}; needed: 32 or more, and 2" in (obstacle(model) or "")


def test_a_table_with_more_buckets_than_are_looked_up() -> None:
    model = fused_model("MPNetModel", relative_attention_num_buckets=48)
    _agrees(model, padded_batch(), LEAST_SQNR_DB["dynamic"])


def test_outputs_of_a_forward_that_collects_by_itself() -> None:
    """MPNet's tuple keeps the place of a pooler that is not there, which its heads count on."""
    batch = padded_batch()
    for model in (fused_model("MPNetForSequenceClassification"), fused_model("MPNetModel")):
        plain = unfuse_(copy.deepcopy(model))
        for asked in (False, True, 1, [0, 2]):
            with torch.no_grad():
                found, expected = (
                    each(**batch, output_hidden_states=asked, return_dict=False) for each in (model, plain)
                )
            assert [type(each) for each in found] == [type(each) for each in expected]
            assert [len(each) for each in found] == [len(each) for each in expected]
    bare = transformers.MPNetModel(copy.deepcopy(model.config), add_pooling_layer=False).eval()
    with torch.no_grad():
        found = quantize_(bare, "w8a8+none", fuse=True)(**batch, return_dict=False)
    assert (len(found), found[1]) == (2, None)


# ---- rotations and windows ------------------------------------------------------------------------------------------


def test_rotations_are_transformers() -> None:
    model = fused_model("ModernBertModel", max_position_embeddings=300)
    ids = torch.arange(300)[None]
    layers = _program(model).layers
    for held, layer in zip(model.layers, layers, strict=True):
        cosines, sines = model.rotary_emb(torch.zeros(1, 300, 64), ids, held.attention_type)
        rotary = _attention(layer, "rotary")
        torch.testing.assert_close(rotary, torch.cat((cosines[0, :, :16], sines[0, :, :16]), 1), rtol=0, atol=1e-6)
    first, second, third = (_attention(layer, "rotary") for layer in layers)
    assert second is third  # of one kind
    assert not torch.equal(first, second)  # which turn faster


def test_what_calibration_sees_is_rotated_as_transformers_rotates_it() -> None:
    model = float_model("ModernBertModel")
    table = modernbert.rotary(model, model.layers[0])
    x = torch.randn(7, 64)
    cosines, sines = model.rotary_emb(x[None], torch.arange(7)[None], "full_attention")
    from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

    query = x.view(1, 7, 2, 32).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(query, query, cosines, sines)
    torch.testing.assert_close(rotated(x, table[:7]), expected.transpose(1, 2).reshape(7, 64))


def test_windows_are_the_layers_own() -> None:
    model = fused_model("ModernBertModel")
    assert [_attention(layer, "window") for layer in _program(model).layers] == [None, 4, 4]
    assert [step.window for layer in _program(model).layers for step in layer.steps if step.operation == "attention"] == [
        None, 4, 4,
    ]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_window_does_not_reach_makes_no_difference(variant: str) -> None:
    """Three local layers of 4 tokens on each side: a token's change goes 12 tokens far and no further, as unfused."""
    local = {"layer_types": ["sliding_attention"] * 3}
    calibration = calibration_of(float_model("ModernBertModel", **local)) if variant == "static" else None
    model = quantize_(float_model("ModernBertModel", **local), "w8a8+none", fuse=True, calibration=calibration)
    ids = torch.randint(5, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 20] = 96
    for each in (model, unfuse_(copy.deepcopy(model))):
        changed = (hidden_of(each, input_ids=ids) != hidden_of(each, input_ids=other)).any(2)[0].nonzero().flatten()
        assert 8 <= int(changed.min()) < 12
        assert 28 < int(changed.max()) <= 32


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("biases", ["norm_bias", "attention_bias", "mlp_bias"])
def test_a_modernbert_with_biases(biases: str, variant: str) -> None:
    model = fused_model("ModernBertModel", variant, **{biases: True})
    _agrees(model, padded_batch(), LEAST_SQNR_DB[variant] - 1)


def test_a_modernbert_that_cannot_be_fused_says_why() -> None:
    changes = [
        (
            {"rope_parameters": _rope("dynamic", factor=2.0)},
            "the rotations of full_attention are 'dynamic'; fused are default",
        ),
        ({"hidden_activation": "mish"}, "unknown activation 'mish'"),
    ]
    for change, words in changes:
        assert words in (obstacle(quantize_(float_model("ModernBertModel", **change), "w8a8+none")) or "")
    cut = quantize_(float_model("ModernBertModel"), "w8a8+none")
    del cut.layers[0]
    assert obstacle(cut) is not None
    assert "layers.0.attn_norm" in obstacle(cut)


def _rope(kind: str, **more: Any) -> dict[str, dict[str, Any]]:
    return {
        "full_attention": {"rope_type": kind, "rope_theta": 160000.0, **more},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }


def test_scaled_rotations() -> None:
    model = fused_model("ModernBertModel", rope_parameters=_rope("linear", factor=4.0))
    _agrees(model, padded_batch(), LEAST_SQNR_DB["dynamic"] - 1)


def test_more_tokens_than_positions_are_refused_without_a_table() -> None:
    with pytest.raises(qbert.QBertError, match="41 tokens; the model has positions for 40"):
        hidden_of(fused_model("ModernBertModel"), input_ids=torch.full((1, 41), 5))


# ---- one layer, many calls ------------------------------------------------------------------------------------------


def test_a_shared_layer_is_built_once() -> None:
    model = fused_model("AlbertModel", num_hidden_layers=12)
    layers = _program(model).layers
    assert [layer.name for layer in layers] == [f"encoder.layer.{index}" for index in range(12)]
    assert all(layer.steps is layers[0].steps for layer in layers)
    hidden_of(model, **padded_batch())
    few = fused_model("AlbertModel", num_hidden_layers=2)
    hidden_of(few, **padded_batch())
    assert explain(model).encoders[0].extra_bytes == explain(few).encoders[0].extra_bytes


@pytest.mark.parametrize("linear", A8)
def test_a_shared_layers_codes_are_held_once(linear: str) -> None:
    """Each call has its own static scales, beside the codes that all read."""
    model = float_model("AlbertModel", num_hidden_layers=12, embedding_size=64)
    calibration = calibration_of(model)
    assert list(calibration.layers) == [f"encoder.layer.{index}" for index in range(12)]
    assert len({layer.scales["query"] for layer in calibration.layers.values()}) > 6
    model = quantize_(model, linear, fuse=True, calibration=calibration)
    layers = _program(model).layers
    for position, step in enumerate(layers[0].steps):
        if step.operation == "linear":
            codes = {bound(layer.steps[position], "weight").qdata.data_ptr() for layer in layers}
            assert len(codes) == 1 or step.name.startswith("overflow"), step.name
    held = {
        module.qdata.untyped_storage().data_ptr() for module in model.modules() if isinstance(module, QuantizedModule)
    }
    stacked = bound(layers[0].steps[0], "weight").qdata.untyped_storage().data_ptr()
    assert stacked in held


def test_scales_of_each_call_are_better_than_one_for_all() -> None:
    model = float_model("AlbertModel", num_hidden_layers=6)
    calls = calibration_of(model)
    widest = {
        slot: max(layer.scales[slot] for layer in calls.layers.values())
        for slot in calls.layers["encoder.layer.0"].scales
    }
    shared = qbert.Calibration.from_dict({"layers": {name: {"scales": widest} for name in calls.layers}})
    batch = padded_batch()
    there = batch["attention_mask"].bool()
    exact = hidden_of(model, **batch)[there]
    each, one = (
        sqnr_db(
            exact,
            hidden_of(quantize_(copy.deepcopy(model), "w8a8+none", fuse=True, calibration=calibration), **batch)[there],
        )
        for calibration in (calls, shared)
    )
    assert each > one


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("groups", "inner"), [(2, 1), (1, 2), (2, 2)])
def test_groups_of_layers(groups: int, inner: int, variant: str) -> None:
    model = fused_model("AlbertModel", variant, num_hidden_groups=groups, inner_group_num=inner)
    batch = padded_batch()
    _agrees(model, batch, LEAST_SQNR_DB[variant] - 2)
    for asked in (True, -1, [1]):
        with torch.no_grad():
            found = model(**batch, output_hidden_states=asked).hidden_states
            expected = unfuse_(copy.deepcopy(model))(**batch, output_hidden_states=asked).hidden_states
        assert [each is None for each in found] == [each is None for each in expected]


def test_a_shared_layer_that_changes_is_followed() -> None:
    model, batch = fused_model("AlbertModel"), padded_batch()
    before = hidden_of(model, **batch)
    with torch.no_grad():
        model.encoder.albert_layer_groups[0].albert_layers[0].ffn.bias.add_(1.0)
    after = hidden_of(model, **batch)
    assert not torch.equal(after, before)
    assert torch.equal(after, hidden_of(copy.deepcopy(model), **batch))
    assert albert.FAMILY.name in str(_program(model))


# ---- widths and activations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", ["w8a8", "gobo3a8"])
def test_tinyberts_widths(linear: str, variant: str) -> None:
    """Twelve heads of 26 channels (Jiao et al., 2020)."""
    sizes = {"hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1200}
    model = fused_model("BertModel", variant, Recipe(linear, "w8"), **sizes)
    assert {(layer.heads, layer.head_dim) for layer in _program(model).layers} == {(12, 26)}
    batch = padded_batch()
    there = batch["attention_mask"].bool()
    exact = hidden_of(float_model("BertModel", **sizes), **batch)[there]
    unfused, fused = (
        sqnr_db(exact, hidden_of(each, **batch)[there]) for each in (unfuse_(copy.deepcopy(model)), model)
    )
    assert fused > unfused - 2.5


@pytest.mark.parametrize("size", [16, 26, 40, 48, 80, 96, 128])
def test_sizes_of_heads(size: int) -> None:
    for variant in VARIANTS:
        sizes = {"hidden_size": 2 * size, "num_attention_heads": 2, "intermediate_size": 2 * size}
        _agrees(fused_model("BertModel", variant, **sizes), padded_batch(), LEAST_SQNR_DB[variant] - 3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"])
@pytest.mark.parametrize("family", ["Bert", "DistilBert", "MPNet", "Albert", "ModernBert"])
def test_activations(family: str, activation: str, variant: str) -> None:
    setting = {"DistilBert": "activation", "ModernBert": "hidden_activation"}.get(family, "hidden_act")
    model = fused_model(f"{family}Model", variant, **{setting: activation})
    _agrees(model, padded_batch(), LEAST_SQNR_DB[variant] - 4)


@pytest.mark.parametrize("family", ["MPNet", "Albert", "ModernBert"])
def test_giant_neurons(family: str) -> None:
    """They are kept apart after a plain activation; products of a gate get their scales token by token."""
    model = float_model(f"{family}Model")
    layer = model.get_submodule({"MPNet": "encoder.layer.0", "ModernBert": "layers.0"}.get(family, _SHARED))
    with torch.no_grad():
        layer.get_submodule({"MPNet": "intermediate.dense", "ModernBert": "mlp.Wi"}.get(family, "ffn")).weight[37].mul_(
            20.0
        )
    calibration = calibration_of(model)
    batch = padded_batch()
    there = batch["attention_mask"].bool()
    kept = [name for name, each in calibration.layers.items() if each.overflow and 37 in each.overflow["inner"].neurons]
    assert bool(kept) == (family != "ModernBert")
    exact = hidden_of(model, **batch)[there]
    unfused = sqnr_db(exact, hidden_of(quantize_(copy.deepcopy(model), "w8a8+none"), **batch)[there])
    assert (
        sqnr_db(exact, hidden_of(quantize_(model, "w8a8+none", fuse=True, calibration=calibration), **batch)[there])
        > unfused - 5
    )


_SHARED = "encoder.albert_layer_groups.0.albert_layers.0"

# ---- what holds for all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", A8)
@pytest.mark.parametrize("family", NEW)
def test_every_scheme(family: str, linear: str, variant: str) -> None:
    wide = {"embedding_size": 64} if family == "Albert" else {}  # groups of 64 go into it
    model = fused_model(f"{family}Model", variant, Recipe(linear, "w8"), **wide)
    _agrees(model, padded_batch(), LEAST_SQNR_DB[variant] - 3)
    batch = padded_batch(5, 13)
    together = hidden_of(model, **batch)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        ids = batch["input_ids"][row : row + 1, :length]
        assert torch.equal(hidden_of(model, input_ids=ids)[0], together[row, :length])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", NEW)
def test_one_token(family: str, variant: str) -> None:
    model = fused_model(f"{family}Model", variant)
    _agrees(model, {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, 1)}, 15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", NEW)
def test_half_precision_models(family: str, variant: str, dtype: torch.dtype) -> None:
    calibration = calibrated(f"{family}Model", ()) if variant == "static" else None
    model = quantize_(float_model(f"{family}Model").to(dtype), "w8a8+none", fuse=True, calibration=calibration)
    batch = padded_batch()
    assert hidden_of(model, **batch).dtype == dtype
    there = batch["attention_mask"].bool()
    expected = hidden_of(unfuse_(copy.deepcopy(model)), **batch)[there].float()
    assert sqnr_db(expected, hidden_of(model, **batch)[there].float()) > 16  # half precision has errors of its own


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", NEW)
def test_copies_pickles_and_files(family: str, variant: str, tmp_path: Path) -> None:
    model, batch = fused_model(f"{family}Model", variant), padded_batch()
    expected = hidden_of(model, **batch)
    model.save_pretrained(tmp_path)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), type(model).from_pretrained(tmp_path)]
    for each in copies:
        assert fused_forward(each).variant == variant
        assert torch.equal(hidden_of(each, **batch), expected)
    assert torch.equal(hidden_of(fuse_(unfuse_(model), fused_forward(copies[0]).calibration), **batch), expected)


@pytest.mark.parametrize("family", NEW)
def test_calibrations_of_float_quantized_and_fused_models_are_alike(family: str) -> None:
    model = float_model(f"{family}Model")
    exact = calibration_of(model)
    for other in (quantize_(copy.deepcopy(model), "w8a8+none"), fused_model(f"{family}Model", "static")):
        for name, layer in calibration_of(other).layers.items():
            assert layer.scales == pytest.approx(exact.layers[name].scales, rel=0.25)
