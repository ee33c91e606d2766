"""analyze() as users call it: result, JSON, table, plot, and what it says to bad input."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from qbert.analyze import AnalyzeResult, Component, analyze, plot, to_table
from qbert.errors import QBertError

TINY: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def model() -> BertModel:
    return BertModel(BertConfig(**TINY))


@pytest.fixture(scope="module")
def result(model: BertModel) -> AnalyzeResult:
    return analyze(model, batch=2, seq=16, target="h100", dtype="bf16", repeats=3, name="tiny")


def test_json_round_trip(result: AnalyzeResult) -> None:
    text = result.model_dump_json()
    assert AnalyzeResult.model_validate_json(text) == result
    with pytest.raises(ValidationError, match="surprise"):
        AnalyzeResult.model_validate({**result.model_dump(), "surprise": 1})


def test_rows(result: AnalyzeResult) -> None:
    assert [row.component for row in result.components] == [component.value for component in Component]
    assert (result.batch, result.seq, result.dtype, result.model_dtype) == (2, 16, "bf16", "fp32")
    assert result.measurement is not None
    measured = sum(row.measured_ms or 0 for row in result.components)
    assert measured + result.measurement.remainder_ms == pytest.approx(result.total.measured_ms)
    for field in ("parameters", "matmul_flops", "bytes_moved", "bytes_at_peak", "measured", "predicted"):
        assert sum(getattr(row.shares, field) for row in result.components) == pytest.approx(100), field
    assert result.environment.torch_version == torch.__version__
    assert result.environment.threads == torch.get_num_threads()


def test_every_layer_takes_time(result: AnalyzeResult) -> None:
    busy = [row for row in result.components if row.component != Component.OTHER]
    assert all(row.measured_ms and row.measured_ms > 0 and row.predicted.ms > 0 for row in busy)


def test_model_is_left_as_it_was(model: BertModel) -> None:
    model.train()
    model.encoder.layer[0].eval()
    analyze(model, batch=1, seq=4, target="h100", repeats=1)
    assert model.training
    assert not model.encoder.layer[0].training
    assert model.encoder.layer[1].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bf16_model_moves_half_the_bytes(result: AnalyzeResult) -> None:
    half = analyze(BertModel(BertConfig(**TINY)).bfloat16(), batch=2, seq=16, target="h100", measure=False)
    assert (half.model_dtype, half.dtype) == ("bf16", "bf16")
    assert half.total.weight_bytes * 2 == result.total.weight_bytes
    # what a fp32 model would move in bf16, except for the fused attention's log-sums, which stay fp32
    scores = Component.ATTENTION_SCORES
    for row in half.components:
        if row.component != scores:
            assert row.bytes_moved == result.component(row.component).predicted.bytes_moved


def test_table_names_everything(result: AnalyzeResult) -> None:
    page = io.StringIO()
    Console(width=120, file=page).print(to_table(result))
    text = page.getvalue()
    for word in ("tiny (fp32), batch 2, seq 16", "QKV linears", "remainder", "total", "H100", "bf16"):
        assert word in text


def test_table_warns_of_unfused_attention_on_the_meta_device() -> None:
    with torch.device("meta"):
        empty = BertModel(BertConfig(**TINY)).eval()
    page = io.StringIO()
    Console(width=300, file=page).print(to_table(analyze(empty, batch=1, seq=4, target="h100", measure=False)))
    assert "scaled_dot_product_attention unfused" in page.getvalue()
    assert "measured on" not in page.getvalue()


@pytest.mark.parametrize("measure", [True, False])
def test_plot(result: AnalyzeResult, model: BertModel, tmp_path: Path, measure: bool) -> None:
    drawn = result if measure else analyze(model, batch=1, seq=4, target="h100", measure=False)
    path = tmp_path / "breakdown.png"
    plot(drawn, path)
    assert path.stat().st_size > 10_000


def test_module_that_is_no_transformer() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = BertConfig(vocab_size=50)
            self.embeddings = nn.Embedding(50, 8)
            self.mystery = nn.Linear(8, 8)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.mystery(self.embeddings(input_ids)).mean(dim=1)

    bag = analyze(Bag(), batch=2, seq=4, target="h100", repeats=1)
    other = bag.component(Component.OTHER)
    assert (other.parameters, other.matmul_flops) == (72, 2 * 8 * 64)  # unknown, but shown


BAD: list[tuple[dict[str, Any], str]] = [
    ({"batch": 0}, "batch is 0; allowed: an integer >= 1"),
    ({"batch": 1.5}, "batch is 1.5; allowed"),
    ({"seq": 0}, "seq is 0; allowed"),
    ({"seq": 65}, "seq is 65; allowed: 1 to 64, the positions of BertModel"),
    ({"repeats": 0}, "repeats is 0; allowed"),
    ({"target": "h900"}, "unknown target 'h900'; allowed: here, b200, h100, h200, l40s, a10, a100, t4"),
    ({"target": "h100", "dtype": "int3"}, "unknown dtype 'int3'; allowed: fp32, tf32, bf16, fp16"),
    ({"target": "t4", "dtype": "bf16"}, "target t4 has no peak for bf16"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_options_are_named(model: BertModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QBertError, match=message) as caught:
        analyze(model, **{"batch": 1, "seq": 8, "target": "h100", "measure": False, **options})
    assert "\n" not in str(caught.value)


def test_bad_models_are_named() -> None:
    with pytest.raises(QBertError, match="model is a str"):
        analyze("bert", batch=1, seq=1)  # type: ignore[arg-type]
    with pytest.raises(QBertError, match=r"model Linear has no config.vocab_size"):
        analyze(nn.Linear(2, 2), batch=1, seq=1)
    with pytest.raises(QBertError, match=r"torch.float64 parameters; allowed: torch.float32"):
        analyze(BertModel(BertConfig(**TINY)).double(), batch=1, seq=1)
    with torch.device("meta"):
        empty = BertModel(BertConfig(**TINY))
    with pytest.raises(QBertError, match="meta device and cannot be timed; allowed: measure=False"):
        analyze(empty, batch=1, seq=1)


def test_roberta_loses_positions_to_padding() -> None:
    roberta = RobertaModel(RobertaConfig(**TINY))
    analyze(roberta, batch=1, seq=62, target="h100", measure=False)
    with pytest.raises(QBertError, match="seq is 63; allowed: 1 to 62"):
        analyze(roberta, batch=1, seq=63, target="h100", measure=False)
