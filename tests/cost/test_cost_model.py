"""The model of cost: the encoder's products, which units take which formats, what bounds a step, and how it all adds up."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_target import SMALL
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, ModernBertConfig, ModernBertModel

import qbert
from qbert.cost import Formats, encoder_cost, load_hardware, parse_hardware, read_work
from qbert.cost.operands import holds, is_blocked, ways
from qbert.cost.tiling import Matrices
from qbert.encoder import encoders, fused_forward
from qbert.errors import QBertError
from qbert.formats import block_format, get_format, minifloat
from qbert.modules import AttentionFormats, FactoredLinear

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 99,
}


@pytest.fixture(scope="module")
def work():
    return read_work(BertModel(BertConfig(**CONFIG)))


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        return read_work(BertModel(BertConfig()))


def both(name: str) -> Formats:
    return Formats(weights=get_format(name), activations=get_format(name))


# ---- the program -----------------------------------------------------------------------------------------------------


def test_products_are_those_of_the_fused_program() -> None:
    """The same multiply-adds as the program that a fused encoder runs, for sequences of different lengths."""
    model = BertModel(BertConfig(**CONFIG)).eval()
    found = read_work(model)
    qbert.quantize_(model, "w8a8", fuse=True)
    program = fused_forward(model).encoder().program
    lengths = [5, 17, 17]
    macs = 0
    for layer in found.layers:
        for step in layer.steps:
            if step.kind == "linear":
                macs += sum(lengths) * step.n * step.k
            if step.kind == "attention":
                macs += sum(2 * step.heads * length * length * step.k for length in lengths)
    assert macs == program.cost(lengths).macs
    assert read_work(model) == found  # quantized and fused: the same program


def test_every_family_has_a_program() -> None:
    albert = read_work(AlbertModel(AlbertConfig(**CONFIG, embedding_size=16)))
    assert len(albert.layers) == 2
    assert albert.weights == sum(step.n * step.k for step in albert.layers[0].steps if step.kind == "linear")  # shared
    assert [step.kind for step in albert.embedding.steps] == ["embedding", "linear"]
    modern = read_work(ModernBertModel(ModernBertConfig(**CONFIG, pad_token_id=0, local_attention=8)))
    windows = {step.window for layer in modern.layers for step in layer.steps if step.kind == "attention"}
    assert None in windows
    assert any(step.gated for layer in modern.layers for step in layer.steps)
    target = load_hardware("h100")
    assert encoder_cost(modern, target).ms > 0
    with pytest.raises(QBertError, match="Linear has 0 encoders of known families; allowed: one"):
        read_work(torch.nn.Linear(3, 3))


def test_emulated_and_pruned_models_have_the_shapes_that_are_left() -> None:
    model = BertModel(BertConfig(**CONFIG)).eval()
    whole = read_work(model)
    emulated = qbert.quantize_(BertModel(BertConfig(**CONFIG)), qbert.emulate("mxfp4", activations="mxfp8"))
    assert read_work(emulated) == whole
    qbert.drop_layers_(model, keep=[1], compensate=False)
    assert len(list(encoders(model))) == 1
    assert read_work(model).layers[0].steps == whole.layers[1].steps
    assert read_work(model).weights == whole.weights / 2


def test_a_linear_of_low_rank_is_two_products() -> None:
    model = BertModel(BertConfig(**CONFIG)).eval()
    whole = read_work(model)
    output = model.encoder.layer[0].output
    output.dense = FactoredLinear.empty(output.dense, 16)
    found = read_work(model)
    first, second = (step for step in found.layers[0].steps if step.name.startswith("output.dense"))
    assert ((first.n, first.k), (second.n, second.k)) == ((16, 256), (64, 16))
    assert first.writes == second.reads == "inner.thin"
    assert found.weights == whole.weights - 64 * 256 + 16 * 256 + 64 * 16
    static = dataclasses.replace(both("int8"), static=True)
    names = [each.name for each in encoder_cost(found, load_hardware("amx"), static).operations]
    assert [name for name in names if name.startswith("quantize")] == ["quantize inner.thin"]


# ---- which units take which formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operand", "name", "held"),
    [
        ("int8", "int8", True), ("int8", "int4-g64", True), ("int4", "int8", False), ("int8", "mxint8", True),
        ("int8", "mxfp4", True), ("int8", "mxfp6_e2m3", True), ("int8", "mxfp6_e3m2", False), ("int8", "nf4", False),
        ("int8", "int8_zp", True), ("fp8", "mxfp8", True), ("fp8", "mxfp8_e5m2", True), ("fp8", "mxfp6_e3m2", True),
        ("fp8", "mxfp4", True), ("fp8", "int4", True), ("fp8", "int8", False), ("fp4", "nvfp4", True),
        ("fp4", "mxfp6_e2m3", False),
        ("fp16", "posit6", True), ("bf16", "int8", True), ("bf16", "nf4", False), ("fp32", "nf4", True),
        ("dict3", "gobo3", True), ("dict3", "gobo4", False), ("fp16", "gobo3", False), ("posit6", "posit6", True),
        ("element:f5", "int4", False),
    ],
)  # fmt: skip
def test_what_an_operand_holds_exactly(operand: str, name: str, held: bool) -> None:
    assert holds(operand, get_format(name)) is held


def test_an_element_of_ones_own() -> None:
    mine = block_format("mine", minifloat("f5", 2, 2), "e8m0", 32)
    assert holds("element:f5", mine)
    assert holds("int8", mine)  # 7.0 in quarters: 28
    target = parse_hardware(
        SMALL + '[[rate]]\nweights = "element:f5"\nactivations = "bf16"\nops = 9e12\nsource = "made up"\n'
    )
    chosen = ways(target, mine, None, 64)
    assert {way.rate.ops for way in chosen} == {1e12, 9e12}  # in the units for it, or decoded to bfloat16


def test_scales_along_k_are_the_units_or_the_vector_units_work() -> None:
    mxfp8 = get_format("mxfp8")
    assert is_blocked(mxfp8, 64)
    assert not is_blocked(mxfp8, 32)
    b200 = {way.weights.sums for way in ways(load_hardware("b200"), mxfp8, mxfp8, 64) if way.weights.operand == "fp8"}
    h100 = {way.weights.sums for way in ways(load_hardware("h100"), mxfp8, mxfp8, 64) if way.weights.operand == "fp8"}
    assert (b200, h100) == ({False}, {True})


def test_formats_without_a_rate_are_decoded_and_that_is_said(work) -> None:
    b200, h100 = load_hardware("b200"), load_hardware("h100")
    native = encoder_cost(work, b200, both("nvfp4"))
    assert native.notes == []
    assert {each.runs_as for each in native.operations if each.kind == "linear"} == {"fp4 x fp4"}
    assert encoder_cost(work, b200, both("mxfp6_e3m2")).notes == []  # nothing is decoded where that is no faster
    other = encoder_cost(work, h100, both("nf4"))
    assert "weights nf4: no unit takes it here; decoded to fp16, rounded to it" in other.notes
    assert {each.runs_as for each in other.operations if each.kind == "linear"} == {"fp16 x fp16"}
    exact = encoder_cost(work, h100, both("posit6")).notes
    assert exact[0] == "weights posit6: no unit takes it here; decoded to fp8, exactly"
    gobo = encoder_cost(work, load_hardware("gobo"), Formats(weights=get_format("gobo3")))
    assert {each.runs_as for each in gobo.operations if each.kind == "linear"} == {"dict3 x fp16"}


def test_no_unit_at_all_is_refused() -> None:
    """Floats x floats there are always; weights alone in a format need a unit that takes both as floats, too."""
    target = parse_hardware(SMALL.replace('weights = "bf16"', 'weights = ["bf16", "int8"]'))
    assert ways(target, get_format("int8"), None, 64)
    odd = dataclasses.replace(get_format("int8"), name="odd")
    found = ways(target, odd, None, 64)
    assert {way.weights.operand for way in found} == {"bf16", "int8"}


# ---- time, bound, energy ----------------------------------------------------------------------------------------------


def test_a_product_by_hand(work) -> None:
    """SMALL: 1 TOP/s on two units with tiles of 8, 10 GB/s; 64 tokens, float: the first product is 64 x 192 x 64."""
    cost = encoder_cost(work, parse_hardware(SMALL), batch=2, seq=32)
    step = next(each for each in cost.operations if each.name == "query, key, value")
    assert step.shape == (64, 192, 64)
    assert step.parts["compute"] == pytest.approx(1e3 * 2 * 64 * 192 * 64 / 1e12)
    problem = Matrices(64, 192, 64, 2.0, 2.0, 2.0)
    moved = 24 * problem.activations + 8 * problem.weights + problem.results  # no cache: tiles read from DRAM
    assert step.parts["DRAM bandwidth"] == pytest.approx(1e3 * moved / 1e10)
    assert step.bound == "DRAM bandwidth"
    assert step.ms == pytest.approx(max(step.parts.values()))
    assert step.utilization == pytest.approx(step.parts["compute"] / step.ms)
    assert step.mj is None
    assert cost.notes == ["small says no energies"]
    assert cost.ms == pytest.approx(sum(each.ms * each.layers for each in cost.operations))
    assert cost.ms == pytest.approx(sum(each.ms for each in cost.layers))
    assert sum(cost.bounds.values()) == pytest.approx(1.0)
    assert cost.bound == "DRAM bandwidth"


@pytest.mark.parametrize(
    ("changed", "bound"),
    [
        ({"bandwidth = 1e10": "bandwidth = 1e15", "ops = 1e11": "ops = 1e9"}, "vector units"),
        ({"bandwidth = 1e10": "bandwidth = 1e15", "ops = 1e11": "ops = 1e16"}, "compute"),
        ({"bandwidth = 1e10": "bandwidth = 1e15", "ops = 1e11": "ops = 1e16", "[vector]":
            '[decode]\nvalues = 1e9\nsource = "made up"\n[vector]'}, "decode"),
        ({"[vector]": '[launch]\nseconds = 0.1\nsource = "made up"\n[vector]'}, "launch"),
    ],
)  # fmt: skip
def test_each_bound_can_be_the_one(base, changed: dict[str, str], bound: str) -> None:
    text = SMALL
    for old, new in changed.items():
        text = text.replace(old, new)
    cost = encoder_cost(base, parse_hardware(text), both("nf4") if bound == "decode" else None)
    assert cost.bound == bound


def test_what_does_not_work_side_by_side_adds_up(base) -> None:
    apart = SMALL.replace("units = 2", "units = 2\noverlap = []")
    together, one_by_one = (encoder_cost(base, parse_hardware(text)) for text in (SMALL, apart))
    step, other = together.operations[1], one_by_one.operations[1]
    assert step.ms == pytest.approx(max(step.parts.values()))
    assert other.ms == pytest.approx(sum(other.parts.values()))


def test_h100_is_faster_in_eight_bits_and_weights_alone_are_not(base) -> None:
    h100 = load_hardware("h100")
    large = {"batch": 64, "seq": 384}
    floats = encoder_cost(base, h100, **large)
    int8 = encoder_cost(base, h100, dataclasses.replace(both("int8"), static=True), **large)
    weights = encoder_cost(base, h100, Formats(weights=get_format("int4-g64")), **large)
    assert 1.2 < floats.ms / int8.ms < 2.0
    assert int8.mj < floats.mj
    assert weights.ms == pytest.approx(floats.ms, rel=0.02)
    assert floats.bound == "compute"


def test_few_tokens_wait_for_the_bytes_of_weights(base) -> None:
    """Once through 85 million weights, which no cache of a T4 holds."""
    t4 = load_hardware("t4")
    floats = encoder_cost(base, t4, batch=1, seq=2)
    packed = encoder_cost(base, t4, Formats(weights=get_format("int4-g64")), batch=1, seq=2)
    assert floats.bound == "GDDR6 bandwidth"
    assert floats.ms == pytest.approx(1e3 * 2 * base.weights / 320e9, rel=0.25)
    assert packed.ms < floats.ms / 2


def test_energy_is_that_of_its_parts(base) -> None:
    gobo = load_hardware("gobo")
    low, high = (encoder_cost(base, gobo, formats) for formats in (Formats(weights=get_format("gobo3")), Formats()))
    assert low.mj < high.mj / 2
    step = next(each for each in low.operations if each.name == "query, key, value")
    least = 1e3 * 2.6e-13 * 2 * 1024 * 2304 * 768
    assert step.mj > least
    assert "0.10% of the weights are kept exactly, and multiplied by the vector units" in low.notes


def test_attention_formats_and_static_scales_count(base) -> None:
    amx = load_hardware("amx")
    dynamic = both("int8")
    attention = dataclasses.replace(dynamic, attention=AttentionFormats.of("int8"))
    static = dataclasses.replace(attention, static=True)
    times = [encoder_cost(base, amx, each).ms for each in (dynamic, attention, static)]
    assert times[2] < times[1] < times[0]
    names = {each.name for each in encoder_cost(base, amx, attention).operations}
    assert {"quantize inner", "quantize context", "quantize projected"} <= names
    assert not any(
        name.startswith("quantize") for name in {each.name for each in encoder_cost(base, amx, static).operations}
    )


def test_bad_batches_are_named(work) -> None:
    for batch, seq in ((0, 8), (2, 0)):
        with pytest.raises(QBertError, match="allowed: at least 1 of each"):
            encoder_cost(work, load_hardware("h100"), batch=batch, seq=seq)
