"""The advisor: what was measured comes first, what is modelled says so, and where fewer bits do not pay it says that."""

import json
from pathlib import Path

import pytest

from benchmarks import advise as advising
from benchmarks.advise import Encoder, advise, encoder_of, interpolate, modelled_seconds
from benchmarks.machine import Gpu, describe
from benchmarks.problems import SHAPES
from benchmarks.results_schema import RESULTS, AccuracyRow, BertRow, GemmRow, Results, load_results
from qbert.analyze.targets import TARGETS, RooflineTarget
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.timing import Sample

BASE = encoder_of("base")
HERE = RooflineTarget("here", "made-up CPU", {"fp32": 1e11, "bf16": 1e11, "int8": 4e11}, 1e11, 2e10, 1e-6, "made up")


def bert(name, milliseconds, batch=8, width=128, model="base", padding=0.0):
    """A row of `bench_bert`."""
    return BertRow(
        name=name, library=name.split("-")[0], model=model, random_weights=True, case=f"{batch}x{width}", batch=batch,
        width=width, tokens=int(batch * width * (1 - padding)), padding_share=padding,
        time=Sample.of([milliseconds / 1e3] * 3), over_best_qbert=None,
    )  # fmt: skip


def accuracy(name, drop, model="minilm", **fields):
    return AccuracyRow(
        model=model, task="trec", name=name, library="qbert", scheme=name.split(":")[0], score=0.9, float_score=0.9 + drop,
        drop=drop, drop_low=drop - 0.01, drop_high=drop + 0.01, confidence=0.95, **fields,
    )  # fmt: skip


def measured(*rows, gpu=None):
    """A results file of this machine, or of one with that GPU."""
    machine = describe()
    machine.gpu = None if gpu is None else Gpu(**{**_gpu_fields(), "name": gpu})
    return Results(path=Path("made-up.json"), machine=machine, rows=list(rows))


def _gpu_fields():
    """Anything that fits, for the fields that Gpu wants."""
    values = {"string": "x", "integer": 1, "number": 1.0, "object": {}, "array": []}
    schema = Gpu.model_json_schema()
    return {name: values[schema["properties"][name]["type"]] for name in schema.get("required", [])}


def by_name(advice):
    return {option.name: option for option in advice.options}


# ---- what was measured ----------------------------------------------------------------------------------------------


def test_a_measured_shape_is_quoted_over_the_fastest_float():
    results = measured(
        bert("torch-fp32", 600),
        bert("torch-bf16-compile", 200),
        bert("qbert-w8a8-static", 100),
        bert("qbert-gobo3a8", 160),
    )
    advice = advise("base", 8, 128, results=[results], roofline=HERE)
    assert advice.verdict == "quantize with w8a8:static"
    options = by_name(advice)
    assert options["w8a8:static"].speedup == pytest.approx(2.0)  # not 6
    assert options["gobo3a8:dynamic"].speedup == pytest.approx(1.25)
    assert options["w8a8:static"].basis == options["gobo3a8:dynamic"].basis == "measured"
    assert options["gobo3"].basis == "roofline"
    assert "2.00 times as fast as the fastest float (measured on this device" in advice.reason
    assert "accuracy was not measured" in advice.reason
    assert advice.results == ["made-up.json"]


def test_between_two_shapes_it_is_interpolated():
    rows = [
        bert("torch-bf16", 10, 1),
        bert("qbert-w8a8", 10, 1),
        bert("torch-bf16", 160, 16),
        bert("qbert-w8a8", 40, 16),
    ]
    advice = advise("base", 4, 128, results=[measured(*rows)], roofline=HERE)
    option = by_name(advice)["w8a8:dynamic"]
    assert option.speedup == pytest.approx(2.0)  # half way from 1 to 4, on logarithms
    assert option.basis == "interpolated"
    assert "2 shapes of 128 to 2048 tokens" in option.detail
    far = advise("base", 64, 512, results=[measured(*rows)], roofline=HERE)
    assert {option.basis for option in far.options} == {"roofline"}


def test_interpolate():
    points = {10: 1.0, 1000: 4.0}
    assert interpolate(points, 10) == 1.0
    assert interpolate(points, 100) == pytest.approx(2.0)
    assert interpolate(points, 1900) == 4.0
    assert interpolate(points, 2100) is None
    assert interpolate(points, 4) is None
    assert interpolate({}, 4) is None


def test_another_device_another_model_and_padded_rows_do_not_count():
    rows = [bert("torch-bf16", 200), bert("qbert-w8a8", 50)]
    other_gpu = measured(*rows, gpu="NVIDIA A100-SXM4-80GB")
    other_model = measured(*(row.model_copy(update={"model": "large"}) for row in rows))
    padded = measured(*(row.model_copy(update={"padding_share": 0.5, "tokens": 512}) for row in rows))
    for results in (other_gpu, other_model, padded):
        advice = advise("base", 8, 128, results=[results], roofline=HERE)
        assert {option.basis for option in advice.options} == {"roofline"}
    on_h100 = measured(*rows, gpu="NVIDIA H100 80GB HBM3")
    assert by_name(advise("base", 8, 128, "h100", results=[on_h100]))["w8a8:dynamic"].basis == "measured"
    assert by_name(advise("base", 8, 128, "h200", results=[on_h100]))["w8a8"].basis == "roofline"


def test_linears_stand_in_for_an_encoder():
    rows = []
    for n, k in BASE.shape.linears:
        for name, seconds in (("torch fp32", 4e-3), ("torch bf16", 2e-3), ("qbert gobo3", 1e-3)):
            rows.append(
                GemmRow(name=name, library="x", regime="cold", t=16, n=n, k=k, time=Sample.of([seconds] * 3))
            )  # fmt: skip
    option = by_name(advise("base", 1, 16, results=[measured(*rows)], roofline=HERE))["gobo3"]
    assert option.speedup == pytest.approx(2.0)
    assert option.basis == "linears"
    del rows[-1]
    option = by_name(advise("base", 1, 16, results=[measured(*rows)], roofline=HERE))["gobo3"]
    assert option.basis == "roofline"  # a shape is missing


def test_rows_of_others_that_win_are_named():
    theirs = bert("openvino-int8", 80).model_copy(update={"over_best_qbert": 0.8})
    results = measured(bert("torch-bf16", 200), bert("qbert-w8a8", 100), theirs)
    assert advise("base", 8, 128, results=[results], roofline=HERE).faster_elsewhere == [
        "openvino-int8 in 8x128: 1.25 times as fast as qbert's best"
    ]


# ---- do not quantize ------------------------------------------------------------------------------------------------


def test_where_bfloat16_wins_the_answer_is_no():
    results = measured(bert("torch-bf16", 10, 1, 16), bert("qbert-w8a8", 12, 1, 16))
    advice = advise("base", 1, 16, results=[results, *_worthless()], roofline=HERE)
    assert by_name(advice)["w8a8:dynamic"].speedup < 1
    assert advice.best is None
    assert advice.verdict == "do not quantize"


def _worthless():
    """Every other scheme costs too much accuracy."""
    return [measured(*(accuracy(name, 0.2) for name in SCHEMES if name != "w8a8"))]


def test_weight_only_schemes_do_not_pay_for_many_tokens():
    for name in ("w8a16", "w4a16", "gobo4", "gobo3"):
        many, few = (by_name(advise("base", batch, 128, "h100", results=[])) for batch in (32, 1))
        assert many[name].speedup == pytest.approx(1.0, abs=0.05)
        assert few[name].speedup > many[name].speedup


def test_tiny_problems_on_a_gpu_are_bound_by_launches():
    advice = advise("tiny", 1, 16, "h100", results=[])
    assert advice.verdict == "do not quantize"
    assert "launching kernels" in advice.reason


def test_accuracy_decides_too():
    results = measured(
        bert("torch-bf16", 200), bert("qbert-w8a8-static", 120), bert("qbert-gobo3a8", 80), accuracy("w8a8:static", 0.002),
        accuracy("gobo3a8", 0.05), accuracy("w4a8", 0.03),
    )  # fmt: skip
    advice = advise("base", 8, 128, results=[results], roofline=HERE)
    assert advice.best == "w8a8:static"
    options = by_name(advice)
    assert options["gobo3a8:dynamic"].drop == pytest.approx(5.0)
    assert options["gobo3a8:dynamic"].drop_on == "minilm, trec"
    assert options["w8a8:static"].drop_interval == pytest.approx((-0.8, 1.2))
    assert advise("base", 8, 128, results=[results], roofline=HERE, max_drop=10).best == "gobo3a8:dynamic"
    assert "costs" in advise("base", 8, 128, results=[results, *_worthless()], roofline=HERE, max_drop=0.1).reason


def test_a_models_own_accuracy_comes_first():
    results = measured(accuracy("gobo3", 0.05), accuracy("gobo3", 0.001, model="base", share_of_float32=0.25))
    option = by_name(advise("base", 8, 128, "h100", results=[results]))["gobo3"]
    assert (option.drop, option.share_of_float32) == (pytest.approx(0.1), 0.25)


# ---- the model ------------------------------------------------------------------------------------------------------


def test_a_modelled_answer_says_at_most():
    advice = advise("large", 32, 128, "h100", results=[])
    assert advice.best == "w8a8"  # equally fast as fewer bits there, so the one that keeps the most
    assert advice.reason.startswith("at most ")
    assert by_name(advice)["w8a8"].speedup < 2


def test_the_roofline():
    tiny = Encoder("x", SHAPES["tiny"])
    rates = TARGETS["h100"]
    w8a8, float_ = (modelled_seconds(BASE, 32, 128, rates, scheme) for scheme in (SCHEMES["w8a8"], None))
    assert w8a8 < float_ < 2 * w8a8
    assert modelled_seconds(BASE, 1, 1, rates, SCHEMES["gobo3"]) < modelled_seconds(BASE, 1, 1, rates) / 4
    assert modelled_seconds(tiny, 1, 1, rates) < modelled_seconds(BASE, 1, 1, rates)


def test_stored_results_are_read():
    """The files in the repository, whatever they are of: every answer has all schemes and a reason."""
    stored = list(advising.stored_results(RESULTS))
    assert stored
    cpu = next(each for each in stored if each.machine.gpu is None and each.of(BertRow))
    cases = {row.model for row in cpu.of(BertRow)} & {"base", "large", "minilm-shape"}
    for model in cases:
        monkey = cpu.model_copy(update={"machine": describe()})
        advice = advise(model, 8, 128, results=[monkey], roofline=HERE)
        assert {option.scheme for option in advice.options} == set(advising.LINEAR_SCHEMES)
        assert any(option.basis in ("measured", "interpolated") for option in advice.options)
        assert json.loads(advice.model_dump_json())["reason"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("base", 0, 128), "must be positive"),
        (("base", 8, 128, "abacus"), "abacus"),
        (("nowhere/at/all", 8, 128), "nowhere"),
    ],
    ids=["batch", "target", "model"],
)
def test_bad_input_is_named(arguments, named):
    with pytest.raises(QBertError, match=named):
        advise(*arguments, results=[], roofline=HERE)


def test_another_schema_is_refused(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"schema": 99, "machine": {}, "rows": []}')
    with pytest.raises(QBertError, match="99"):
        load_results(path)
