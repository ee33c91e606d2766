"""Exports: W8A8 as QDQ that ONNX Runtime runs as qbert computes, and one named error where torch's exporter is called."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

import qbert
from qbert import QBertError, cli
from qbert.cli import terminal
from qbert.encoder import fused_forward
from qbert.export.onnx import stand_in
from qbert.zoo import resolve_model

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
TEXTS = [
    "A text.",
    "Another text, of more words than the first one has.",
    "Why?",
    "A third that is as long as it wants to be.",
]
FAMILIES = {"bert": (BertConfig, BertModel), "mpnet": (MPNetConfig, MPNetModel)}
VARIANTS = ["unfused", "dynamic", "static"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    try:
        return AutoTokenizer.from_pretrained(resolve_model("minilm"))
    except QBertError as error:
        pytest.skip(str(error))


def quantized(family: str, variant: str, tokenizer: Any, **settings: Any) -> Any:
    """Weights with some outliers in them, so that a calibrated layer has overflow neurons."""
    config, kind = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(vocab_size=len(tokenizer), **SIZES, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3.0 if parameter.dim() == 2 and "embeddings" not in name else 1.0)
            if name.endswith("intermediate.dense.bias"):
                parameter[3] += 25.0
    calibration = qbert.calibrate(model, tokenizer=tokenizer) if variant == "static" else None
    return qbert.quantize_(model, "w8a8", fuse=variant != "unfused", calibration=calibration)


def batch_of(tokenizer: Any, texts: list[str], names: list[str]) -> dict[str, torch.Tensor]:
    return {name: each for name, each in tokenizer(texts, padding=True, return_tensors="pt").items() if name in names}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stand_in_computes_what_the_model_does(tokenizer: Any, family: str, variant: str) -> None:
    """But for last bits of exp, GELU and norms, which flip a code now and then."""
    model = quantized(family, variant, tokenizer)
    if variant == "static":
        fused = fused_forward(model)
        assert fused is not None
        assert fused.calibration is not None
        assert fused.calibration.layers["encoder.layer.0"].overflow
    before = {name: each.clone() for name, each in model.state_dict().items()}
    twin, said = stand_in(model)
    assert said == variant
    batch = batch_of(tokenizer, TEXTS, ["input_ids", "attention_mask"])
    with torch.no_grad():
        ours, theirs = model(**batch)[0], twin(**batch)[0]
    mask = batch["attention_mask"].bool()
    cosines = torch.cosine_similarity(ours[mask], theirs[mask], dim=-1)
    assert cosines.min() > 0.999
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert (fused_forward(model) is None) == (variant == "unfused")


def test_of_other_roundings_a_stand_in_is_farther(tokenizer: Any) -> None:
    """So that the test above says something: attention that is not rounded shows."""
    model = quantized("bert", "dynamic", tokenizer)
    unfused, _ = stand_in(qbert.unfuse_(copy.deepcopy(model)))
    fused, _ = stand_in(model)
    batch = batch_of(tokenizer, TEXTS, ["input_ids", "attention_mask"])
    with torch.no_grad():
        ours, near, far = (each(**batch)[0] for each in (model, fused, unfused))
    mask = batch["attention_mask"].bool()
    distance = [(ours[mask] - each[mask]).norm() for each in (near, far)]
    assert distance[0] < 0.7 * distance[1]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), [("bert", "static"), ("bert", "unfused"), ("mpnet", "dynamic")])
def test_onnx_runtime_runs_the_export(tokenizer: Any, tmp_path: Path, family: str, variant: str) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install --no-deps -r requirements-peers.txt")
    import onnx
    import onnxruntime

    model = quantized(family, variant, tokenizer)
    qbert.save(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    report = json.loads(run("export", tmp_path / "model", "--to", "onnx-qdq", "-o", tmp_path / "onnx", "--json")[1])
    assert report["variant"] == variant
    assert report["texts"] == 32
    assert report["cosine_min"] > 0.999
    assert AutoTokenizer.from_pretrained(tmp_path / "onnx").vocab_size == tokenizer.vocab_size

    graph = onnx.load(tmp_path / "onnx/model.onnx")
    onnx.checker.check_model(graph)
    assert {each.domain for each in graph.opset_import} == {""}  # ONNX's own operators alone
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds["QuantizeLinear"] >= 2 * (4 if variant == "unfused" else 8)
    int8 = [each for each in graph.graph.initializer if each.data_type == onnx.TensorProto.INT8 and len(each.dims) == 2]
    assert len(int8) >= 2 * 6
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    for texts in (TEXTS, TEXTS[1:2]):  # sizes that it was not taken with
        batch = batch_of(tokenizer, texts, report["inputs"])
        (found,) = session.run(None, {name: each.numpy() for name, each in batch.items()})
        with torch.no_grad():
            expected = model(**batch)[0].numpy()
        mask = batch["attention_mask"].bool().numpy()
        assert cosine(found[mask], expected[mask]).min() > 0.999


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("fuse", [True, False])
def test_torchs_exporter_ends_in_one_named_error(tokenizer: Any, tmp_path: Path, fuse: bool) -> None:
    model = quantized("bert", "dynamic" if fuse else "unfused", tokenizer)
    wrapped = nn.Sequential(model)
    ids = torch.tensor([[101, 7, 102]])
    for each in (model, wrapped):
        with pytest.raises(
            QBertError, match=r"qbert export FOLDER --to onnx-qdq .* qbert.dequantize_\(model\) first"
        ) as error:
            torch.onnx.export(each, (ids,), tmp_path / "x.onnx")
        assert error.value.__cause__ is None
    assert not any(tmp_path.iterdir())
    if fuse:
        with pytest.raises(QBertError, match=r"call qbert.unfuse_\(model\) first, or qbert export for ONNX"):
            torch.export.export(model, (ids,))
    else:
        program = torch.export.export(_First(model), (ids,)).module()
        with torch.no_grad():
            torch.testing.assert_close(program(ids), model(ids)[0])


class _First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.model(ids)[0]
        return first


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command line in this process."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["qbert", *map(str, arguments)]),
        mock.patch.object(terminal, "out", Console(width=160)),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, stdout.getvalue(), stderr.getvalue()


def _roberta() -> nn.Module:
    return qbert.quantize_(RobertaModel(RobertaConfig(vocab_size=97, **SIZES)), "w8a8")


def _gobo() -> nn.Module:
    return qbert.quantize_(BertModel(BertConfig(vocab_size=97, **SIZES)), "gobo4")


def _head() -> nn.Module:
    model = BertForSequenceClassification(BertConfig(vocab_size=97, **SIZES))
    return qbert.quantize_(model, qbert.Recipe("w8a8", "gobo4"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_roberta, "RobertaModel is of RoBERTa; allowed: BERT, MPNet"),
        (_gobo, "is gobo4; allowed: linears w8a8, w4a8, embeddings w8, or float"),
        (_head, "word_embeddings is gobo4; allowed"),
        (
            lambda: qbert.quantize_(nn.Sequential(nn.Linear(64, 64)), "w8a8"),
            "has 0 encoders; allowed: one of BERT, MPNet",
        ),
    ],
)
def test_what_has_no_graph_is_refused_by_name(make: Any, says: str) -> None:
    with pytest.raises(QBertError, match=says):
        stand_in(make())


def test_bad_input_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"needs {package}: pip install --no-deps -r requirements-peers.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    model, out = tmp_path / "model", tmp_path / "out"
    BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for arguments, says in [
        ([model, "--to", "torchscript", "-o", out], "--to 'torchscript'; allowed: onnx-qdq"),
        ([model, "--to", "onnx-qdq", "-o", tmp_path / "full"], "is not empty; allowed: a new folder"),
        ([model, "--to", "onnx-qdq", "-o", out], "is a float model; quantize it first (qbert quantize"),
    ]:
        code, stdout, stderr = run("export", *arguments)
        assert (code, stdout) == (2, "")
        assert says in stderr
        assert stderr.count("\n") == 1
        assert not out.exists()


def test_without_onnx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, stderr = run("export", "minilm", "--to", "onnx-qdq", "-o", tmp_path / "out")
    assert code == 2
    assert "pip install 'qbert[onnx]'" in stderr
