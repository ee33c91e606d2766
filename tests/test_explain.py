"""explain: one row for every linear and embedding, the truth about each, and totals that add up."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import qbert
from qbert import Recipe, explain, quantize_
from qbert.devices import GPUS
from qbert.explain import Row
from qbert.formats import Role, scheme_names
from qbert.modules import GUARD, QTiedLinear, QuantizedModule
from qbert.ops.kernel import Problem
from qbert.ops.table import explain as explain_kernel
from qbert.ops.table import select_layout
from qbert.target import Target, cpu_target
from qbert.testing import random_weight
from qbert.weight.layout import Layout

H100 = Target(**GPUS["h100"].limits, native_missing="qbert was installed without them")


def _bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=40,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def _rows(model: nn.Module) -> dict[str, Row]:
    return {row.name: row for row in explain(model).rows}


def _names(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Embedding, QuantizedModule, QTiedLinear)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def test_one_row_for_every_linear_and_embedding_in_the_models_order() -> None:
    model = _bert()
    names = _names(model)
    assert [row.name for row in explain(model).rows] == names
    quantize_(model, Recipe("w4a8", "w8"))
    assert [row.name for row in explain(model).rows] == names == _names(model)


def test_rows_of_a_float_model() -> None:
    model = _bert().to(torch.bfloat16)
    explanation = explain(model)
    assert explanation.quantized == []
    assert explanation.bits_per_weight == 0.0
    row = _rows(model)["bert.encoder.layer.0.intermediate.dense"]
    assert row == Row(
        "bert.encoder.layer.0.intermediate.dense", "bfloat16", (128, 64), "plain", 16.0, 128 * 64 * 2, 128 * 64 * 2, 0,
        "torch", "not quantized",
    )  # fmt: skip


@pytest.mark.parametrize("scheme", scheme_names(Role.LINEAR))
def test_row_of_a_quantized_linear(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(128, 48))
    with torch.no_grad():
        model[0].weight.copy_(random_weight(48, 128))
    quantize_(model, scheme)
    (row,) = explain(model).rows
    module = model[0]
    stored = {name: tensor for name, tensor in module.state_dict().items() if name not in (GUARD, "bias")}
    assert (row.name, row.scheme, row.shape) == ("0", scheme, (48, 128))
    assert row.stored_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert row.memory_bytes == sum(getattr(module, name).nbytes for name in stored)
    assert row.bits_per_weight == pytest.approx(8 * row.stored_bytes / (48 * 128))
    assert row.outliers == stored.get("outlier_delta", torch.empty(0)).numel()
    assert (row.outliers > 0) == scheme.startswith("gobo")
    assert row.layout == module.layout.value
    problem = Problem(module.scheme, module.layout, 48, 128, torch.float32)
    choice = explain_kernel("linear", problem, cpu_target())
    assert (row.kernel, row.reason) == (choice.name, choice.reason)


def test_layout_and_memory_are_those_of_now() -> None:
    model = quantize_(nn.Sequential(nn.Linear(64, 64)), "gobo3")
    model[0]._hold(model[0].quantized.to_layout(Layout.BYTES))
    unpacked = explain(model).rows[0]
    model[0]._hold(model[0].quantized.to_layout(Layout.PLAIN))
    packed = explain(model).rows[0]
    assert (unpacked.layout, packed.layout) == ("bytes", "plain")
    assert unpacked.memory_bytes > packed.memory_bytes == packed.stored_bytes == unpacked.stored_bytes


def test_reasons_of_float_modules() -> None:
    model = _bert()
    recipe = Recipe("w8a8", exclude=["layer.1.output"], overrides={"layer.0.output": None})
    quantize_(model, recipe)
    rows = _rows(model)
    assert rows["bert.encoder.layer.1.output.dense"].reason == "excluded by 'layer.1.output'"
    assert rows["bert.encoder.layer.0.output.dense"].reason == "override 'layer.0.output'"
    assert rows["cls.predictions.transform.dense"].reason == "stays float: 'cls' is on the skip list"
    assert rows["bert.embeddings.word_embeddings"].reason == "the recipe leaves embeddings float"
    assert rows["cls.predictions.decoder"].reason == "tied to bert.embeddings.word_embeddings"
    quantized = {row.name for row in explain(model).quantized}
    assert all((rows[name].kernel == "torch") == (name not in quantized) for name in rows)


def test_tied_rows_count_no_bytes() -> None:
    model = quantize_(_bert(), Recipe("w8a8", "w8"))
    rows = _rows(model)
    tied, owner = rows["cls.predictions.decoder"], rows["bert.embeddings.word_embeddings"]
    assert (tied.stored_bytes, tied.memory_bytes) == (0, 0)
    assert owner.stored_bytes == 97 * 64 + 4 * 97
    assert (tied.scheme, owner.scheme) == ("w8a16", "w8")
    assert tied.shape == owner.shape == (97, 64)
    assert tied.reason.startswith("tied to bert.embeddings.word_embeddings; ")


def test_totals_count_every_stored_weight_once() -> None:
    model = quantize_(_bert(), Recipe("w8a8", "w8"))
    weights = bits = 0
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            rows, columns = module.shape
            weights, bits = weights + rows * columns, bits + 8 * rows * columns + 32 * rows
    assert explain(model).bits_per_weight == pytest.approx(bits / weights)


def test_dequantize_takes_the_reasons_back() -> None:
    model = quantize_(_bert(), "gobo3")
    qbert.dequantize_(model)
    assert {row.reason for row in explain(model).rows} == {"not quantized"}


def test_to_dicts_is_plain_data_with_every_field() -> None:
    explanation = explain(quantize_(_bert(), Recipe("gobo4", "gobo3")))
    dicts = explanation.to_dicts()
    assert [Row(**each) for each in dicts] == explanation.rows  # type: ignore[arg-type]
    assert list(dicts[0]) == [field.name for field in dataclasses.fields(Row)]


def test_str_is_a_table() -> None:
    explanation = explain(quantize_(_bert(), Recipe("w4a8", "w8")))
    header, *lines = str(explanation).splitlines()
    assert header.split() == ["module", "scheme", "shape", "layout", "bits", "kernel", "why"]
    assert len(lines) == len(explanation.rows) + 1
    assert lines[-1] == "bert: fused: no (not asked for: fuse=True, or qbert.fuse_(model))"
    columns = [header.index(title) for title in ("scheme", "shape", "layout", "bits", "kernel", "why")]
    for line, row in zip(lines, explanation.rows, strict=False):
        starts = [line[column - 2 :].removeprefix("  ") for column in columns]
        expected = (row.scheme, f"{row.shape[0]}x{row.shape[1]}", row.layout, f"{row.bits_per_weight:.3g}", row.kernel)
        assert line.startswith(row.name)
        assert all(start.startswith(cell) for start, cell in zip(starts, (*expected, row.reason), strict=True))
        assert line == line.rstrip()


def test_a_model_with_nothing_to_say() -> None:
    explanation = explain(nn.ReLU())
    assert (explanation.rows, explanation.quantized, explanation.bits_per_weight) == ([], [], 0.0)
    assert str(explanation).split() == ["module", "scheme", "shape", "layout", "bits", "kernel", "why"]


@pytest.mark.parametrize(
    ("target", "kernel", "reason", "notes"),
    [
        (H100, "triton linear", "codes become int8", ["Triton kernels alone: qbert was installed without them"]),
        (dataclasses.replace(H100, prefer="cuda"), "triton linear", "QBERT_KERNEL=cuda, but qbert was installed",
         ["Triton kernels alone: qbert was installed without them"]),
        (dataclasses.replace(H100, prefer="triton"), "triton linear", "codes become int8", []),
        (dataclasses.replace(H100, native=True, prefer="cuda"), "cuda linear", "QBERT_KERNEL=cuda; codes lie", []),
        (dataclasses.replace(H100, sm=80, native=True, prefer="cuda"), "triton linear",
         "QBERT_KERNEL=cuda, but the CUDA kernels are compiled for compute capability 9.0, this GPU has 8.0", []),
    ],
    ids=["missing", "missing-but-asked-for", "not-wanted", "there", "other-gpu"],
)  # fmt: skip
def test_gpu_rows_say_why_not_compiled(
    target: Target, kernel: str, reason: str, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that is not here: the modules are on the CPU, in the layout that the GPU would have them in."""
    model = quantize_(nn.Sequential(nn.Linear(128, 64)), "w4a8")
    model[0]._hold(model[0].quantized.to_layout(select_layout(model[0].scheme, Role.LINEAR, target)))
    for module in ("qbert.explain", "qbert.modules.base"):
        monkeypatch.setattr(importlib.import_module(module), "target_of", lambda device: target)
    explanation = explain(model)
    assert explanation.rows[0].kernel == kernel
    assert explanation.rows[0].reason.startswith(reason)
    assert explanation.notes == notes
    assert str(explanation).splitlines()[-1] == notes[0] if notes else "Triton kernels alone" not in str(explanation)
