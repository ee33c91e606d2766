"""A fused encoder counts by its program: the float model's products, the kernels that ran, and times that add up."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from small_encoders import EVERY, FOUR, calibrated, float_model, padded_batch
from torch import nn

import qbert
from qbert.analyze import AnalyzeResult, Component, analyze, to_table
from qbert.analyze.components import component_of_step
from qbert.analyze.count import count_ops
from qbert.analyze.program import StepName, called_modules, fused_encoders, observed
from qbert.analyze.result import StepResult
from qbert.encoder import GraphCache, encoders, fused_forward
from qbert.encoder.graphs import GraphLimits

PARTS = {"embedding", "attention linear", "attention", "ffn", "norm", "quantize"}
PRODUCTS = (
    Component.EMBEDDINGS, Component.QKV_LINEARS, Component.ATTENTION_SCORES, Component.ATTENTION_OUTPUT, Component.FFN,
    Component.POOLER_HEAD,
)  # fmt: skip
BATCH, SEQ = 3, 9


def fused(name: str, static: bool = False, scheme: str = "w8a8+none", **changes: Any) -> Any:
    calibration = calibrated(name, tuple(changes.items())) if static else None
    return qbert.quantize_(float_model(name, **changes), scheme, fuse=True, calibration=calibration)


def analyzed(model: nn.Module, **options: Any) -> AnalyzeResult:
    options = {"batch": BATCH, "seq": SEQ, "target": "h100", "dtype": "fp16", "measure": False, **options}
    return analyze(model, **options)


def products(result: AnalyzeResult) -> dict[Component, int]:
    return {each: result.component(each).matmul_flops for each in PRODUCTS}


@pytest.fixture(scope="module")
def measured() -> AnalyzeResult:
    return analyzed(fused("BertForSequenceClassification"), measure=True, repeats=5)


# ---- work -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize("family", [*FOUR, "MPNet", "Albert"])
def test_products_are_those_of_the_float_and_of_the_unfused_model(family: str, head: str) -> None:
    name = family + head
    before = products(analyzed(float_model(name)))
    assert products(analyzed(qbert.quantize_(float_model(name), "w8a8+none"))) == before
    result = analyzed(fused(name))
    assert products(result) == before
    (program,) = result.programs
    inside = before if head != "Model" else {**before, Component.POOLER_HEAD: 0}
    encoder = sum(flops for each, flops in inside.items() if each is not Component.POOLER_HEAD)
    assert 2 * sum(step.macs for step in program.steps) == encoder
    assert not result.uncounted_ops


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "gobo3a8"])
def test_parts_are_the_programs(static: bool, scheme: str) -> None:
    model = fused("BertModel", static, scheme)
    result = analyzed(model)
    (program,) = result.programs
    held = model.forward.encoder().program
    cost = held.cost([SEQ] * BATCH)
    assert {part.part for part in program.parts} == (PARTS - {"quantize"} if static else PARTS)
    for field in ("macs", "weight_bytes", "activation_bytes"):
        total = getattr(cost, field)
        assert sum(getattr(step, field) for step in program.steps) == total, field
        assert sum(getattr(part, field) for part in program.parts) == total, field
    assert [(step.layer, step.step, step.kernel) for step in program.steps] == [
        (layer, step.name, step.kernel) for layer, step in held.steps()
    ]
    assert all(step.kernel for step in program.steps)
    assert (program.scales, program.family) == ("static" if static else "dynamic", "BERT")
    counted = sum(row.bytes_moved for row in result.components if row.component not in ("pooler_head", "other"))
    assert counted == cost.weight_bytes + cost.activation_bytes


def test_padding_is_not_computed() -> None:
    model, inputs = fused("BertModel"), padded_batch()
    lengths = [int(each) for each in inputs["attention_mask"].sum(1)]
    counts = count_ops(model.eval(), inputs, torch.float32)
    macs = model.forward.encoder().program.cost(lengths).macs
    encoder = [op for op in counts.ops if op.component not in (Component.POOLER_HEAD, Component.OTHER)]
    assert sum(op.matmul_flops for op in encoder) == 2 * macs
    assert macs < model.forward.encoder().program.cost([inputs["input_ids"].shape[1]] * len(lengths)).macs


def test_a_batch_that_goes_in_portions_has_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = products(analyzed(fused("BertModel")))
    monkeypatch.setattr("qbert.encoder.run.tokens_at_once", lambda target: SEQ)
    assert products(analyzed(fused("BertModel"))) == whole


def test_weights_and_parameters_are_the_unfused_models() -> None:
    before, after = analyzed(qbert.quantize_(float_model("BertModel"), "w8a8+none")), analyzed(fused("BertModel"))
    for component in Component:
        rows = before.component(component), after.component(component)
        assert rows[0].parameters == rows[1].parameters
        assert rows[0].weight_bytes == rows[1].weight_bytes
    assert after.total.peak_bytes < before.total.peak_bytes


def test_every_step_has_a_component() -> None:
    for static in (True, False):
        for family in EVERY:
            for _, step in fused(f"{family}Model", static).forward.encoder().program.steps():
                assert component_of_step(step.name, step.part) is not Component.OTHER, step
    assert component_of_step("something new", "something new") is Component.OTHER


# ---- time -----------------------------------------------------------------------------------------------------------


def test_times_are_positive_and_add_up(measured: AnalyzeResult) -> None:
    (program,) = measured.programs
    times = [step.measured_ms for step in program.steps]
    assert all(each is not None and each > 0 for each in times)
    assert program.steps_ms == pytest.approx(sum(each or 0 for each in times))
    assert program.steps_ms == pytest.approx(sum(part.measured_ms or 0 for part in program.parts))
    assert program.rest_ms == pytest.approx((measured.total.measured_ms or 0) - (program.steps_ms or 0))
    assert len(program.steps) == 1 + 2 * 10


def test_components_are_timed_as_well(measured: AnalyzeResult) -> None:
    busy = [row for row in measured.components if row.component != Component.OTHER]
    assert all(row.measured_ms and row.measured_ms > 0 for row in busy)
    assert measured.measurement is not None
    total = sum(row.measured_ms or 0 for row in measured.components) + measured.measurement.remainder_ms
    assert total == pytest.approx(measured.total.measured_ms)


def test_json_and_table(measured: AnalyzeResult) -> None:
    assert AnalyzeResult.model_validate_json(measured.model_dump_json()) == measured
    page = io.StringIO()
    Console(width=200, file=page).print(to_table(measured))
    text = page.getvalue()
    for word in (
        "steps of the fused bert (BERT, dynamic scales)",
        "the rest",
        "query, key, value",
        "quantize",
        "forward",
    ):
        assert word in text
    assert measured.programs[0].steps[0].kernel in text


def test_without_measuring_there_are_no_times() -> None:
    (program,) = analyzed(fused("BertModel")).programs
    assert (program.steps_ms, program.rest_ms) == (None, None)
    assert all(step.measured_ms is None for step in program.steps)
    assert isinstance(program.steps[0], StepResult)
    assert not analyzed(float_model("BertModel")).programs


# ---- observation ----------------------------------------------------------------------------------------------------


def test_a_model_is_left_as_it_was() -> None:
    model = fused("BertModel").eval()
    inputs, encoder = padded_batch(), model.forward.encoder()
    before, program = model(**inputs).last_hidden_state, encoder.program
    graphs = model.forward.graphs = GraphCache(GraphLimits())
    analyzed(model, measure=True, repeats=1)
    assert model.forward.encoder() is encoder
    assert encoder.program is program
    assert model.forward.graphs is graphs
    model.forward.graphs = None
    assert torch.equal(model(**inputs).last_hidden_state, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_in_a_step_leaves_no_trace() -> None:
    model = fused("BertModel").eval()
    program = model.forward.encoder().program

    def begin(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observed(model, begin, lambda: None):
        model(**padded_batch())
    assert model.forward.encoder().program is program


def test_steps_are_named_in_the_order_in_which_they_run() -> None:
    model = fused("RobertaForSequenceClassification").eval()
    seen: list[StepName] = []
    with observed(model, lambda running, step, slots: seen.append(running.step), lambda: None):
        model(**padded_batch())
    ((name, forward),) = fused_encoders(model).items()
    assert name == "roberta"
    assert seen == [StepName(name, layer, step.name) for layer, step in forward.encoder().program.steps()]


def test_modules_that_a_fused_forward_calls() -> None:
    model = fused("BertForMaskedLM", False)
    called = {name for name, _ in called_modules(model)}
    assert {"", "bert", "cls"} <= called
    assert not {name for name in called if name.startswith("bert.")}
    base = fused("BertModel")
    assert {name.partition(".")[0] for name, _ in called_modules(base)} == {"", "pooler"}
    assert all(fused_forward(each) for _, each, _ in encoders(base))
