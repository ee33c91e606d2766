"""What is saved is loaded as what it was, or is refused at once: parts, other heads, other classes, other libraries."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from small_encoders import float_model, padded_batch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import qbert
from qbert import CheckpointError, QBertError, Recipe, dequantize_, quantize_
from qbert.modules import collect_specs

HEAD = "BertForSequenceClassification"
LOADERS: tuple[Callable[[Any], Any], ...] = (qbert.load, AutoModelForSequenceClassification.from_pretrained)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model(**padded_batch())[0]


def _assert_loads(model: Any, folder: Path) -> None:
    for load in LOADERS:
        again = load(folder).eval()
        assert type(again) is type(model)
        assert collect_specs(again) == collect_specs(model)
        assert torch.equal(_logits(again), _logits(model))


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "fuse"), [("bert", False), ("bert", True), ("bert.encoder", False), ("bert.encoder.layer.1", False)]
)
def test_a_model_is_saved_whole_whichever_part_was_quantized(part: str, fuse: bool, tmp_path: Path) -> None:
    model = float_model(HEAD)
    quantize_(model.get_submodule(part), Recipe("w8a8", "w8"), fuse=fuse)
    model.save_pretrained(tmp_path / "transformers")
    qbert.save(model, tmp_path / "qbert")
    for folder in tmp_path.iterdir():
        _assert_loads(model, folder)
    assert (qbert.explain(qbert.load(tmp_path / "qbert")).encoders[0].fused == "dynamic") is fuse


def test_parts_of_several_schemes_are_all_in_the_record(tmp_path: Path) -> None:
    model = float_model(HEAD)
    quantize_(model.bert.encoder.layer[0], "w8a8+none")
    quantize_(model.bert.encoder.layer[1], "gobo4")
    model.save_pretrained(tmp_path)
    _assert_loads(model, tmp_path)
    assert {spec.scheme for spec in collect_specs(qbert.load(tmp_path)).values()} == {"w8a8", "gobo4"}


def test_a_part_of_a_quantized_model_is_saved_by_itself(tmp_path: Path) -> None:
    model = quantize_(float_model(HEAD), "w8a8+none")
    model.bert.save_pretrained(tmp_path / "part")
    assert torch.equal(_logits(qbert.load(tmp_path / "part")), _logits(model.bert))
    model.save_pretrained(tmp_path / "whole")
    _assert_loads(model, tmp_path / "whole")


def test_a_model_whose_part_was_dequantized_is_saved_float(tmp_path: Path) -> None:
    model = quantize_(float_model(HEAD), "w8a8+none")
    dequantize_(model.bert)
    with pytest.raises(QBertError, match="is not quantized by qbert"):
        qbert.save(model, tmp_path / "refused")
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float/config.json").read_text())
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float").eval()
    torch.testing.assert_close(_logits(again), _logits(model))


def test_a_part_that_was_quantized_by_itself_is_forgotten_with_the_whole(tmp_path: Path) -> None:
    model = float_model(HEAD)
    quantize_(model.bert, "w8a8+none")
    dequantize_(model)
    assert not hasattr(model.bert, "hf_quantizer")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_files_are_open_to_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        model = quantize_(float_model(HEAD), "w8a8+none")
        model.save_pretrained(tmp_path / "transformers")
        qbert.save(model, tmp_path / "qbert")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("*/*")}
    assert modes == {0o640}


# ---- other heads ----------------------------------------------------------------------------------------------------


def test_a_head_for_other_labels_is_made_anew_as_of_a_float_model(tmp_path: Path) -> None:
    model = quantize_(float_model(HEAD, num_labels=3), "w8a8+none")
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=9, ignore_mismatched_sizes=True
    ).eval()
    assert again.classifier.weight.shape == (9, 64)
    assert torch.equal(_logits(again.bert), _logits(model.bert))
    with pytest.raises(RuntimeError):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=9)
    again.save_pretrained(tmp_path)
    assert torch.equal(_logits(qbert.load(tmp_path)), _logits(again))


def test_files_are_held_to_their_own_configuration(tmp_path: Path) -> None:
    quantize_(float_model(HEAD), "w8a8+none").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 41}))
    for load in LOADERS:
        with pytest.raises(
            CheckpointError, match=r"position_embeddings\.weight: shape must be \[41, 64\], got \[40, 64\]"
        ):
            load(tmp_path)


# ---- other classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"architectures": ["RobertaModel"]},
            r"must be of the configuration's model_type, BertConfig, got RobertaModel of",
        ),
        ({"architectures": ["BertConfig"]}, "must name one model class of transformers"),
        ({"auto_map": {"AutoModel": "modeling.BertModel"}}, "auto_map: must not name code of its own for BertModel"),
    ],
    ids=("family", "no model", "code"),
)
def test_another_class_than_was_saved_is_not_loaded(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    quantize_(float_model(), "w8a8+none").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entry))
    for load in (qbert.load, transformers.BertModel.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


def test_a_stock_model_that_came_with_code_is_saved_without_it(tmp_path: Path) -> None:
    model = float_model()
    model.config.auto_map = {"AutoModel": "modeling.BertModel"}
    quantize_(model, "w8a8+none").save_pretrained(tmp_path)
    assert torch.equal(_logits(qbert.load(tmp_path)), _logits(model))


# ---- other libraries ------------------------------------------------------------------------------------------------


class _Codes(Tensor):
    """As torchao keeps a weight: a parameter of a class of its own."""

    __module__ = "torchao.quantization"


def _with_codes(model: nn.Module) -> None:
    linear = model.encoder.layer[0].output.dense
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(_Codes))


def _with_a_foreign_linear(model: nn.Module) -> None:
    kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.encoder.layer[0].output.dense = kind(128, 64)


def _with_a_foreign_quantizer(model: Any) -> None:
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_codes, r"layer\.0\.output\.dense is quantized already: its weight is a torchao\.quantization\._Codes"),
        (
            _with_a_foreign_linear,
            r"output\.dense is quantized already: it is a bitsandbytes\.nn\.modules\.Linear8bitLt",
        ),
        (_with_a_foreign_quantizer, "BertModel is quantized already, by gptq; allowed: a float model"),
    ],
    ids=("weight", "linear", "quantizer"),
)
def test_a_model_that_another_library_quantized_is_refused(change: Callable[[Any], None], message: str) -> None:
    model = float_model()
    change(model)
    modules = list(model.modules())
    with pytest.raises(QBertError, match=message):
        quantize_(model, Recipe("w8a8", "w8"))
    assert list(model.modules()) == modules
