"""Shape plans: data that is checked, models that are brought to it, and files that carry it."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from small_encoders import EVERY, float_model, hidden_of, padded_batch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

import qbert
from qbert import CheckpointError, QBertError
from qbert.checkpoint import Record, is_checkpoint, signed
from qbert.convert import note_reshaped
from qbert.encoder import fused_forward, unfused
from qbert.integrations.transformers import check
from qbert.shapes import (
    LayerShape,
    Original,
    ShapePlan,
    factorize_linear_,
    keep_heads_,
    keep_layers_,
    keep_neurons_,
    keep_words_,
    plan_of,
    recorded_plan,
)
from qbert.workflow import load_float

# Electra, RoBERTa and BERT-generation differ from BERT in nothing that is taken out.
ALIKE = ("Electra", "Roberta", "BertGeneration")
TAKEN_APART = [
    pytest.param(f"{name}Model", marks=pytest.mark.slow if name in ALIKE else ())
    for name in EVERY
    if name not in ("Albert", "ModernBert")
]
LEAST_COSINE = 0.99


def three_layers(name: str = "BertModel", **changes: Any) -> Any:
    layers = "n_layers" if name.startswith("DistilBert") else "num_hidden_layers"
    return float_model(name, **{layers: 3, **changes})


def pruned(name: str = "BertModel") -> Any:
    """Without the middle layer, one head, half of a feed-forward network and seven words."""
    model = three_layers(name)
    keep_layers_(model, [0, 2])
    keep_heads_(model, 1, [1])
    keep_neurons_(model, 0, range(0, 128, 2))
    keep_words_(model, range(90))
    note_reshaped(model)
    return model


def batch() -> dict[str, torch.Tensor]:
    inputs = padded_batch()
    return {**inputs, "input_ids": inputs["input_ids"].clamp(max=89)}


def shape(**changes: Any) -> dict[str, Any]:
    plan = {
        "of": {"layers": 3, "heads": 2, "ffn": 128, "vocabulary": 97},
        "layers": [{"source": 0, "heads": [0, 1], "ffn": 64}, {"source": 2, "heads": [1], "ffn": 128}],
        "vocabulary": 90,
    }
    return {**plan, **changes}


# ---- data -----------------------------------------------------------------------------------------------------------


def test_a_plan_prints_what_is_left() -> None:
    plan = plan_of(pruned())
    assert plan == ShapePlan.model_validate(shape())
    assert str(plan) == "2 of 3 layers (0 2), heads 2 1 of 2, FFN 64 128 of 128, vocabulary 90 of 97"
    assert not plan.plain


def test_of_a_model_that_was_not_compressed_everything_is_left() -> None:
    plan = plan_of(float_model())
    assert plan.whole
    assert recorded_plan(float_model()) is None


def layer(source: int = 0, heads: list[int] | None = None, ffn: int = 8) -> dict[str, Any]:
    return {"source": source, "heads": [0] if heads is None else heads, "ffn": ffn}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": []}, "layers"),
        ({"layers": [layer(2), layer(0)]}, "layers must ascend"),
        ({"layers": [layer(1), layer(1)]}, "layers must ascend"),
        ({"layers": [layer(3)]}, "layers must ascend below 3"),
        ({"layers": [layer(-1)]}, "greater than or equal to 0"),
        ({"layers": [layer(heads=[])]}, "heads"),
        ({"layers": [layer(heads=[1, 0])]}, "heads must ascend"),
        ({"layers": [layer(heads=[0, 0])]}, "heads must ascend"),
        ({"layers": [layer(heads=[2])]}, "keeps head 2"),
        ({"layers": [layer(heads=[True])]}, "int"),
        ({"layers": [layer(ffn=0)]}, "ffn"),
        ({"layers": [layer(ffn=129)]}, "there were 128"),
        ({"layers": [layer(ffn=2**31)]}, "ffn"),
        ({"layers": [{**layer(), "more": 1}]}, "more"),
        ({"layers": [{**layer(), "ranks": {"query": 1}}]}, "ranks"),
        ({"layers": [{**layer(), "ranks": {"ffn_in": 0}}]}, "ranks"),
        ({"layers": [{**layer(), "ranks": {"ffn_in": True}}]}, "ranks"),
        ({"layers": [{**layer(), "ranks": [4]}]}, "ranks"),
        ({"vocabulary": 98}, "there were 97 words"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"vocabulary": 90.5}, "vocabulary"),
        ({"of": {"layers": 3}}, "of"),
        ({"extra": 0}, "extra"),
    ],
)
def test_plans_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ShapePlan.model_validate(shape(**changes))


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TAKEN_APART, "MPNetForSequenceClassification"])
def test_a_pruned_model_is_saved_loaded_quantized_and_fused(name: str, tmp_path: Path) -> None:
    model, inputs = pruned(name), batch()
    expected = hidden_of(model, **inputs)
    model.save_pretrained(tmp_path / "float")
    again = qbert.load(tmp_path / "float")
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(hidden_of(again, **inputs), expected)
    assert plan_of(again) == plan_of(model)

    qbert.quantize_(again, "w8a8", fuse=True)
    fused = hidden_of(again, **inputs)
    with unfused(again):
        quantized = hidden_of(again, **inputs)
    rows = inputs["attention_mask"].bool() if fused.dim() == 3 else slice(None)
    cosine = nn.functional.cosine_similarity(fused[rows], quantized[rows], dim=-1)
    assert float(cosine.mean()) > LEAST_COSINE
    qbert.save(again, tmp_path / "fused")
    loaded = qbert.load(tmp_path / "fused")
    assert torch.equal(hidden_of(loaded, **inputs), fused)
    assert "2 of 3 layers (0 2), heads 2 1 of 2" in str(qbert.explain(loaded))


def test_pruned_mpnet_adds_the_biases_of_the_heads_that_it_kept() -> None:
    """Masking the other head out of the whole model's context gives the same."""
    model, inputs = float_model("MPNetModel"), padded_batch()
    masked = copy.deepcopy(model)
    dim = masked.encoder.layer[0].attention.attn.attention_head_size
    with torch.no_grad():
        masked.encoder.layer[0].attention.attn.o.weight[:, :dim] = 0
    keep_heads_(model, 0, [1])
    assert torch.allclose(hidden_of(model, **inputs), hidden_of(masked, **inputs), atol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "MPNetModel"])
@pytest.mark.parametrize("fuse", [False, True])
def test_copies_and_pickles_keep_the_plan(name: str, fuse: bool) -> None:
    model, inputs = pruned(name), batch()
    if fuse:
        qbert.quantize_(model, fuse=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert plan_of(twin) == plan_of(model)
        assert torch.equal(hidden_of(twin, **inputs), hidden_of(model, **inputs))


def test_a_fused_model_gives_a_sequence_the_same_bits_in_every_batch() -> None:
    model, inputs = qbert.quantize_(pruned("MPNetModel"), fuse=True), batch()
    together = hidden_of(model, **inputs)
    for row, mask in enumerate(inputs["attention_mask"]):
        alone = hidden_of(model, input_ids=inputs["input_ids"][row : row + 1, mask.bool()])
        assert torch.equal(alone[0], together[row, mask.bool()])


def test_plans_compose() -> None:
    model = three_layers()
    keep_layers_(model, [1, 2])
    keep_heads_(model, 1, [1])
    keep_layers_(model, [1])
    keep_neurons_(model, 0, range(64))
    keep_neurons_(model, 0, range(32))
    plan = plan_of(model)
    assert plan.layers == (LayerShape(source=2, heads=(1,), ffn=32),)
    assert plan.of == Original(layers=3, heads=2, ffn=128, vocabulary=97)


def test_dequantized_a_pruned_model_is_float_and_still_saved(tmp_path: Path) -> None:
    model = qbert.quantize_(pruned(), "w8a8")
    qbert.dequantize_(model)
    assert not model.is_quantized
    model.save_pretrained(tmp_path)
    record, _ = check(tmp_path)
    assert (record.modules, record.format_version) == ({}, 3)
    assert torch.equal(hidden_of(qbert.load(tmp_path), **batch()), hidden_of(model, **batch()))


def test_a_pruned_float_checkpoint_can_be_trained_and_quantized(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    model: Any = load_float(str(tmp_path))
    assert model.hf_quantizer.is_trainable
    model.half().float()
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize(("rows", "of"), [(80, 97), (104, 104)])
def test_a_table_that_transformers_resized_is_in_the_plan(rows: int, of: int, tmp_path: Path) -> None:
    model = pruned()
    model.resize_token_embeddings(rows)
    plan = plan_of(model)
    assert (plan.vocabulary, plan.of.vocabulary) == (rows, of)
    keep_layers_(model, [1])
    assert model.config.vocab_size == rows
    model.save_pretrained(tmp_path)
    again = qbert.load(tmp_path)
    assert plan_of(again) == ShapePlan.model_validate(plan_of(model).model_dump())
    inputs = {**batch(), "input_ids": batch()["input_ids"].clamp(max=rows - 1)}
    assert torch.equal(hidden_of(again, **inputs), hidden_of(model, **inputs))


def test_another_class_takes_the_encoder_of_a_pruned_checkpoint(tmp_path: Path) -> None:
    model = pruned("BertForSequenceClassification")
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(hidden_of(bare, **batch()), hidden_of(model.bert, **batch()))
    pruned().save_pretrained(tmp_path / "bare")
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    assert plan_of(head) == plan_of(model)


def test_a_plain_plan_is_an_ordinary_model_of_transformers(tmp_path: Path) -> None:
    model = three_layers()
    keep_layers_(model, [0, 2])
    for place in range(2):
        keep_neurons_(model, place, range(64))
    keep_words_(model, range(90))
    note_reshaped(model)
    qbert.save(model, tmp_path / "plain")
    assert not is_checkpoint(tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in written
    assert (written["num_hidden_layers"], written["intermediate_size"], written["vocab_size"]) == (2, 64, 90)
    again = type(model).from_pretrained(tmp_path / "plain")
    assert torch.equal(hidden_of(again, **batch()), hidden_of(model, **batch()))


@pytest.mark.parametrize(("name", "said"), [("AlbertModel", "share their weights"), ("ModernBertModel", "gated")])
def test_families_that_cannot_be_taken_apart_say_why(name: str, said: str) -> None:
    with pytest.raises(QBertError, match=said):
        keep_layers_(float_model(name), [0])


def test_a_model_of_shapes_without_a_plan_is_not_saved(tmp_path: Path) -> None:
    model = qbert.quantize_(pruned(), "w8a8")
    del model.__dict__["_qbert_shapes"]
    with pytest.raises(QBertError, match="could not be loaded again"):
        model.save_pretrained(tmp_path)


def test_the_fused_encoder_sees_that_other_heads_were_kept() -> None:
    model = qbert.quantize_(pruned("MPNetModel"), fuse=True)
    before, fused = hidden_of(model, **batch()), fused_forward(model)
    assert fused is not None
    watch = fused.encoder().watch
    assert watch.unchanged()
    model.encoder.layer[1].attention.attn.kept_heads = (0,)  # the other biases
    assert not watch.unchanged()
    assert not torch.equal(hidden_of(model, **batch()), before)
    model.encoder.layer[1].attention.attn.kept_heads = (0, 1)
    with pytest.raises(QBertError, match="biases are of 2"):
        hidden_of(model, **batch())


# ---- files ----------------------------------------------------------------------------------------------------------


def forged(folder: Path, edit: Any) -> None:
    """Writes the record's shapes edited, with a digest that is right."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    record = signed(Record.parse(config["quantization_config"]), load_file(folder / "model.safetensors"))
    config["quantization_config"] = record.to_dict()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("edit", "tensor"),
    [
        (lambda record: record["shapes"]["layers"].pop(), "shapes.layers"),
        (lambda record: record["shapes"]["of"].update(heads=3), "shapes.of.heads"),
        (lambda record: record["shapes"]["layers"][1].update(ffn=64), "ffn"),
        (lambda record: record["shapes"]["layers"][0].update(ffn=63), "intermediate"),
        (lambda record: record["shapes"]["layers"][0].update(heads=[0]), "attention"),
        (lambda record: record["shapes"].update(vocabulary=89), "vocabulary"),
        (lambda record: record.update(shapes=None), "modules"),
        (lambda record: record.update(format_version=2), "quantization_config"),
    ],
)
def test_a_plan_that_is_not_the_files_is_refused_by_name(edit: Any, tensor: str, tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=tensor):
        _load_forged(tmp_path, edit)


def _load_forged(folder: Path, edit: Any) -> None:
    forged(folder, edit)
    qbert.load(folder)


@pytest.mark.parametrize(
    ("edit", "tensor"),
    [
        (lambda record: record["shapes"]["layers"][0]["ranks"].update(ffn_in=9), "intermediate.dense.first"),
        (
            lambda record: record["shapes"]["layers"][0]["ranks"].update(ffn_in=2**31 - 1),
            r"ranks\.ffn_in: must be at most 64",
        ),
        (lambda record: record["shapes"]["layers"][0]["ranks"].update(attention_output=8), "attention.output.dense"),
        (lambda record: record["shapes"]["layers"][0].pop("ranks"), "format_version 5 is of linears of low rank"),
        (lambda record: record.update(format_version=3), "format_version 5 is of linears of low rank"),
        (lambda record: record.update(format_version=4), "format_version 4 is of emulated models"),
    ],
)
def test_ranks_that_are_not_the_files_are_refused_by_name(edit: Any, tensor: str, tmp_path: Path) -> None:
    model = float_model()
    factorize_linear_(model, 0, "ffn_in", torch.ones(8, 64), torch.ones(128, 8))
    note_reshaped(model)
    model.save_pretrained(tmp_path)
    assert plan_of(qbert.load(tmp_path)).layers[0].ranks == {"ffn_in": 8}
    with pytest.raises(CheckpointError, match=tensor):
        _load_forged(tmp_path, edit)


def test_linears_of_low_rank_are_emulated_too(tmp_path: Path) -> None:
    model = float_model()
    factorize_linear_(model, 1, "ffn_out", torch.ones(8, 128), torch.ones(64, 8))
    note_reshaped(model)
    qbert.quantize_(model, qbert.emulate("mxfp4"))
    model.save_pretrained(tmp_path)
    again = qbert.load(tmp_path)
    assert again.config.quantization_config.record.format_version == 5
    assert torch.equal(hidden_of(again, **padded_batch()), hidden_of(model, **padded_batch()))


def test_shapes_are_not_given_by_hand() -> None:
    with pytest.raises(QBertError, match="format_version"):
        qbert.QBertConfig(shapes=shape())


def test_a_head_model_whose_encoder_was_reshaped_alone_is_saved_with_its_record(tmp_path: Path) -> None:
    model = float_model("BertForSequenceClassification")
    keep_heads_(model.bert, 1, [1])
    note_reshaped(model.bert)
    model.save_pretrained(tmp_path / "head")
    again = qbert.load(tmp_path / "head")
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)
