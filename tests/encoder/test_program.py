"""A fused encoder as data: what it prints is what it calls, what it costs, what it holds, and a layer's own sizes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from small_encoders import (
    A8,
    CONFIGS,
    FOUR,
    LEAST_SQNR_DB,
    VARIANTS,
    calibration_of,
    encoder_of,
    float_model,
    fused_model,
    hidden_of,
    padded_batch,
)
from torch import Tensor, nn

import qbert
from qbert import QBertError, Recipe, explain, fuse_, quantize_, unfuse_
from qbert.encoder import Calibration, Cost, LayerScales, Program, Step, fused_forward
from qbert.encoder import run as running
from qbert.encoder.build import KEPT, head_size
from qbert.encoder.program import freeing
from qbert.formats import SCHEMES
from qbert.metrics import sqnr_db
from qbert.modules import QLinear
from qbert.ops import table
from qbert.ops.kernel import problem_of
from qbert.ops.operations import OPERATIONS, operation_of
from qbert.quantizers import quantize
from qbert.target import cpu_target
from qbert.testing import random_weight
from qbert.weight.codec import decode

LENGTHS = [5, 7, 1, 12]
QKV = "query, key, value"
ATTENDED = ["attention", "attention output", "attention output norm"]
DYNAMIC = [
    QKV, f"{QKV} codes", "attention", "attention codes", "attention output", "attention output norm", "feed-forward in",
    "feed-forward in codes", "feed-forward out", "feed-forward out norm",
]  # fmt: skip
STATIC = [QKV, *ATTENDED, "feed-forward in", "feed-forward out", "feed-forward out norm"]
# What is to be rotated stays float, and so do products of a gate, which get their scales token by token.
ROTATED = {
    "dynamic": [name for name in DYNAMIC if name != f"{QKV} codes"],
    "static": [*STATIC[:-2], "feed-forward in codes", *STATIC[-2:]],
}
OVERFLOWING = [*STATIC[:-1], "overflow in", "overflow out", "overflow sum", STATIC[-1]]


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def _program(model: nn.Module) -> Program:
    return fused_forward(encoder_of(model)).encoder().program


def _scales(overflow_neurons: int, **changes: Any) -> Calibration:
    """Of a model whose neuron 37 of the first layer outgrows all others."""
    return _calibrated(_with_a_giant(float_model(**changes)), overflow_neurons)


def _calibrated(model: Any, overflow_neurons: int) -> Calibration:
    return qbert.calibrate(model, [padded_batch(8, 17, seed) for seed in range(3)], overflow_neurons=overflow_neurons)


def _with_a_giant(model: Any) -> Any:
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.weight[37].mul_(20.0)
    return model


# ---- it prints itself -----------------------------------------------------------------------------------------------


def _two_launches() -> bool:
    return all(step.operation != "linear_add_norm" for _, step in _program(fused_model()).steps())


@pytest.mark.parametrize(("variant", "names"), [("dynamic", DYNAMIC), ("static", OVERFLOWING)])
def test_what_is_printed_is_every_step_in_order(variant: str, names: list[str]) -> None:
    calibration = _scales(1) if variant == "static" else None
    program = _program(
        quantize_(_with_a_giant(float_model()), Recipe("w8a8", "w8"), fuse=True, calibration=calibration)
    )
    assert _two_launches()  # as on every CPU today
    head, embeddings, words, *layers = str(program).splitlines()
    assert head == "BERT on cpu, 2 layers of 64"
    assert embeddings == "embeddings:"
    assert words.split() == (
        f"words embed_norm w8 64: ids, position_ids, token_type_ids -> hidden, hidden.codes, hidden.scales "
        f"({program.embedding[0].kernel})"
    ).split()  # fmt: skip
    first = layers[: len(names) + 1]
    assert first[0] == f"encoder.layer.0: 2 heads of 32, feed-forward 128, {variant} scales"
    assert [step.name for step in program.layers[0].steps] == names
    for line, step in zip(first[1:], program.layers[0].steps, strict=True):
        assert line == f"    {step}"
        assert line.startswith(f"    {step.name} ")
        assert f" {step.operation} " in line
        assert line.endswith(f": {', '.join(step.reads)} -> {', '.join(step.writes)} ({step.kernel})")
    assert sum(line.startswith("encoder.layer.") for line in layers) == 2


def test_a_step_says_its_scheme_and_size() -> None:
    program = _program(fused_model("BertModel", "static", Recipe("gobo3a8", "gobo4", overrides={"output": "w8a8"})))
    lines = {step.name: str(step) for step in program.layers[0].steps}
    assert " linear gobo3a8 192 x 64: hidden.codes, hidden.scales -> qkv.codes (" in lines[QKV]
    assert " attention 2 x 32: qkv.codes, cu_seqlens -> context.codes (" in lines["attention"]
    assert " linear w8a8 64 x 128: inner.codes, ones -> sum (" in lines["feed-forward out"]
    assert " add_norm 64: sum, hidden -> hidden, hidden.codes, hidden.scales (" in lines["feed-forward out norm"]
    assert "embed_norm gobo4 64: " in str(program)


def test_electras_projection_is_a_step() -> None:
    program = _program(fused_model("ElectraModel"))
    assert [step.name for step in program.embedding] == ["words", "projection", "projection codes"]
    assert [step.name for step in program.embedding_of_rows] == ["word rows", "projection", "projection codes"]
    assert str(program).startswith("ELECTRA on cpu, 2 layers of 64\nembeddings:\n    words ")
    assert [step.name for step in _program(fused_model("BertModel")).embedding_of_rows] == ["word rows"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_has_the_same_steps(name: str) -> None:
    for variant, names in (("dynamic", DYNAMIC), ("static", STATIC)):
        model = float_model(f"{name}Model")
        calibration = None
        if variant == "static":
            calibration = _calibrated(model, 0)
        program = _program(quantize_(model, "w8a8+none", fuse=True, calibration=calibration))
        expected = ROTATED[variant] if name == "ModernBert" else names
        assert all([step.name for step in layer.steps] == expected for layer in program.layers)
        assert {layer.static for layer in program.layers} == {variant == "static"}
        assert [name for name, _ in program.steps()][-1] == program.layers[-1].name
        parts = {step.part for _, step in program.steps()}
        assert parts <= {"embedding", "attention linear", "attention", "ffn", "norm", "quantize"}


# ---- its kernels are those that are called --------------------------------------------------------------------------


@pytest.mark.parametrize("by_row", [False, True], ids=["ids", "rows"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", A8)
def test_the_kernels_that_it_shows_are_those_that_run(
    linear: str, variant: str, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`select` gives a row, its name is shown, its function is called: once a step, with the problem that was asked about."""
    whole, called, asked = table.select, [], []

    def select(operation: str, problem: Any, target: Any) -> Any:
        row = whole(operation, problem, target)

        def call(a: Any) -> Any:
            assert operation_of(a).name == operation
            assert problem_of(a)._replace(t=None) == problem._replace(t=None)
            a.check()  # which a program made sure of when it was built
            called.append((operation, row.name))
            return row.call(a)

        asked.append((operation, problem))
        return replace(row, call=call)

    monkeypatch.setattr(table, "select", select)
    model = fused_model(
        "DistilBertModel", variant, Recipe(linear, "w8")
    )  # it has no pooler, which is none of the program
    batch = padded_batch()
    program = _program(model)
    called.clear()
    if by_row:
        rows = model.embeddings.word_embeddings(batch["input_ids"])
        called.clear()
        hidden_of(model, inputs_embeds=rows, attention_mask=batch["attention_mask"])
    else:
        hidden_of(model, **batch)
    steps = [*(program.embedding_of_rows if by_row else program.embedding)]
    steps += [step for layer in program.layers for step in layer.steps]
    assert called == [(step.operation, step.kernel) for step in steps if step.operation != "add"]
    assert {operation for operation, _ in asked} <= set(OPERATIONS)
    for step in steps:
        if step.operation != "add":
            problems = [problem for operation, problem in asked if operation == step.operation]
            assert step.kernel in {whole(step.operation, problem, cpu_target()).name for problem in problems}


# ---- what it costs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_macs_are_the_closed_formula(name: str, variant: str) -> None:
    """Twelve h squared a token and layer where the FFN is four times as wide, and two products over pairs of tokens."""
    h, f, layers = 64, 128, 2
    model = float_model(name)
    calibration = _calibrated(model, 0) if variant == "static" else None
    program = _program(quantize_(model, "w8a8+none", fuse=True, calibration=calibration))
    for lengths in (LENGTHS, [1], [40] * 3, []):
        t, pairs = sum(lengths), sum(length**2 for length in lengths)
        parts = program.cost_by_part(lengths)
        assert parts["attention linear"].macs == layers * t * 4 * h * h
        assert parts["ffn"].macs == layers * t * 2 * h * f
        assert parts["attention"].macs == layers * 2 * h * pairs
        assert {name for name, cost in parts.items() if cost.macs} <= {"attention linear", "ffn", "attention"}
        assert program.cost(lengths).macs == layers * (t * (4 * h * h + 2 * h * f) + 2 * h * pairs)


def test_parts_add_up_to_the_whole() -> None:
    for model in (fused_model("ElectraModel", "static"), fused_model("BertModel", "dynamic", Recipe("w4a8", "gobo4"))):
        program = _program(model)
        assert sum(program.cost_by_part(LENGTHS).values(), Cost()) == program.cost(LENGTHS)
        by_step = sum((step.cost(LENGTHS) for _, step in program.steps()), Cost())
        assert by_step == program.cost(LENGTHS)
    electra = _program(fused_model("ElectraModel")).cost_by_part(LENGTHS)
    assert electra["embedding"].macs == sum(LENGTHS) * 32 * 64  # its projection


def test_weight_bytes_are_those_of_the_modules() -> None:
    for linear in A8:
        model = fused_model("BertModel", "dynamic", Recipe(linear, "w8"))
        program = _program(model)
        held = {name: module for name, module in model.encoder.named_modules() if isinstance(module, QLinear)}
        parts = program.cost_by_part([4000])
        found = parts["attention linear"].weight_bytes + parts["ffn"].weight_bytes
        own = sum(module.weight_nbytes() for module in held.values())
        assert abs(found - own) <= 0.02 * own  # of three stacked weights some row pointers are one
        words = model.embeddings.word_embeddings
        assert parts["embedding"].weight_bytes == words.weight_nbytes()  # of few tokens only their rows are read
        assert program.cost_by_part([3])["embedding"].weight_bytes == 3 * 64 * 4
        assert program.cost([3]).weight_bytes < program.cost([4000]).weight_bytes


def test_static_codes_cost_less_than_floats() -> None:
    dynamic, static = (_program(fused_model("BertModel", variant)) for variant in VARIANTS)
    assert static.cost(LENGTHS).activation_bytes < dynamic.cost(LENGTHS).activation_bytes
    t, h = sum(LENGTHS), 64
    for program, width in ((dynamic, 4), (static, 1)):
        costs = {step.name: step.cost(LENGTHS) for step in program.layers[0].steps}
        assert costs[QKV].activation_bytes == t * (h + 3 * h * width)
        assert costs["attention"].activation_bytes == t * h * (3 + width)


def test_cost_of_overflow() -> None:
    model = quantize_(_with_a_giant(float_model()), "w8a8+none", fuse=True, calibration=_scales(1))
    program = _program(model)
    steps = {step.name: step.cost([10]).macs for step in program.layers[0].steps}
    assert (steps["overflow in"], steps["overflow out"], steps["overflow sum"]) == (10 * 64, 10 * 64, 0)
    (rising,) = [step for step in program.layers[0].steps if step.name == "overflow in"]
    assert rising.shape == (1, 64)


# ---- slots ----------------------------------------------------------------------------------------------------------


class _Slots(dict[str, Tensor]):
    """Refuses to be asked for what is not there, and remembers the most that was."""

    most = 0

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(name, value)
        self.most = max(self.most, len(self))


@pytest.mark.parametrize("name", ["BertModel", "ElectraModel", "DistilBertModel"])
@pytest.mark.parametrize("case", ["dynamic", "static", "overflow"])
def test_no_slot_outlives_its_last_reader(name: str, case: str) -> None:
    model = float_model(name)
    if case == "overflow" and name == "BertModel":
        _with_a_giant(model)
    calibration = None
    if case != "dynamic":
        calibration = _calibrated(model, 16 if case == "overflow" else 0)
    program = _program(quantize_(model, "w8a8+none", fuse=True, calibration=calibration))
    slots = _Slots(
        ids=torch.tensor([5, 6, 7]), position_ids=torch.arange(3), token_type_ids=torch.zeros(3, dtype=torch.int64)
    )
    state = {"hidden", "hidden.codes", "hidden.scales"}
    running.execute(program.embedding, slots)
    assert set(slots) == state
    slots |= {"cu_seqlens": torch.tensor([0, 2, 3], dtype=torch.int32), "ones": torch.ones(3)}
    assert set(KEPT) == {*state, "cu_seqlens", "ones"}
    for layer in program.layers:
        for step in layer.steps:
            before = set(slots)
            assert set(step.reads) <= before, step.name
            running.execute([step], slots)
            assert set(slots) == (before | set(step.writes)) - set(step.frees), step.name
            later = layer.steps[layer.steps.index(step) + 1 :]
            for slot in set(slots) - set(KEPT):
                assert any(slot in each.reads for each in later), f"{slot} outlives {step.name}"
        assert set(slots) == set(KEPT)
    assert slots.most <= 8  # the five, and what a step reads and writes
    assert slots["hidden"].shape == (3, 64)


def test_freeing_lets_go_at_the_last_reader() -> None:
    def step(reads: str, writes: str) -> Step:
        return Step("", "", "", "", tuple(reads.split()), tuple(writes.split()), lambda slots: None)

    steps = freeing([step("a", "b c"), step("b", "d"), step("b d", "b"), step("b", "x")], ("a", "x"))
    assert [each.frees for each in steps] == [("c",), (), ("d",), ("b",)]
    rewritten = freeing([step("", "a"), step("", "a"), step("a", "k")], ("k",))
    assert [each.frees for each in rewritten] == [("a",), (), ("a",)]
    assert freeing([], ("a",)) == ()


def test_memory_is_let_go_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hidden states only those that were asked for are held."""
    model, seen = fused_model("BertModel", num_hidden_layers=4), []
    whole = running.execute

    def execute(steps: Any, slots: Any) -> None:
        whole(steps, slots)
        seen.append(set(slots))

    monkeypatch.setattr(running, "execute", execute)
    hidden_of(model, **padded_batch())
    assert len(seen) == 5
    assert all(slots == set(KEPT) for slots in seen[1:])


# ---- a layer's own heads and widths ---------------------------------------------------------------------------------

# Of each layer: heads of 32, and neurons.
SIZES = [(1, 64), (3, 192), (2, 128)]
NAMES = {"Bert": ("num_hidden_layers", 3), "Roberta": ("num_hidden_layers", 3), "Electra": ("num_hidden_layers", 3),
         "DistilBert": ("n_layers", 3)}  # fmt: skip


def _linear(n: int, k: int, seed: int) -> nn.Linear:
    linear = nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.copy_(random_weight(n, k, seed=seed) * 3)
        linear.bias.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return linear


def _put(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, module)


def _narrowed(family: str, make: Callable[[nn.Linear], nn.Module] = lambda linear: linear, model: Any = None) -> Any:
    """Layers of sizes of their own, as pruning leaves them; `make` says what stands in their places."""
    model = float_model(f"{family}Model", **dict([NAMES[family]])) if model is None else model
    program = _paths(model)
    for index, (heads, ffn) in enumerate(SIZES):
        layer, width, seed = model.get_submodule(f"{program.layers}.{index}"), 32 * heads, 100 * index
        paths = program.layer
        for offset, path in enumerate(paths.qkv):
            _put(layer, path, make(_linear(width, 64, seed + offset)))
        _put(layer, paths.attention_output, make(_linear(64, width, seed + 3)))
        _put(layer, paths.ffn_in, make(_linear(ffn, 64, seed + 4)))
        _put(layer, paths.ffn_out, make(_linear(64, ffn, seed + 5)))
    return model.eval()


def _paths(model: nn.Module) -> Any:
    from qbert.families import family_of

    return family_of(model)


@torch.no_grad()
def _emulated(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Each sequence's last hidden state by plain torch, from what the modules' weights stand for, in float64."""
    family = _paths(model)
    states = []
    plain = unfuse_(copy.deepcopy(model))
    embedded = plain.embeddings(input_ids=batch["input_ids"])
    if family.embeddings.projection:
        embedded = plain.embeddings_project(embedded)
    for row, mask in zip(embedded, batch["attention_mask"].bool(), strict=True):
        hidden = row[mask].double()
        for index in range(len(SIZES)):
            layer = model.get_submodule(f"{family.layers}.{index}")
            parts = family.layer

            def linear(path: str, x: Tensor, layer: Any = layer) -> Tensor:
                module = layer.get_submodule(path)
                return x @ decode(module.quantized, torch.float64).t() + module.bias.double()

            def norm(path: str, x: Tensor, layer: Any = layer) -> Tensor:
                module = layer.get_submodule(path)
                shape = module.normalized_shape
                return nn.functional.layer_norm(x, shape, module.weight.double(), module.bias.double(), module.eps)

            q, k, v = (linear(path, hidden) for path in parts.qkv)
            context = []
            for head in range(q.shape[1] // 32):
                of = slice(32 * head, 32 * head + 32)
                weights = torch.softmax(q[:, of] @ k[:, of].t() * 32**-0.5, dim=-1)
                context.append(weights @ v[:, of])
            hidden = norm(parts.attention_norm, hidden + linear(parts.attention_output, torch.cat(context, 1)))
            inner = nn.functional.gelu(linear(parts.ffn_in, hidden))
            hidden = norm(parts.output_norm, hidden + linear(parts.ffn_out, inner))
        states.append(hidden)
    return states


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", A8)
@pytest.mark.parametrize("family", FOUR)
def test_layers_with_heads_and_neurons_of_their_own(family: str, linear: str, variant: str) -> None:
    model = _narrowed(family)
    calibration = calibration_of(model) if variant == "static" else None
    scheme = "w4a8-g32" if linear == "w4a8" else linear  # groups of 64 do not go into one head, nor into three
    quantize_(model, scheme, fuse=True, calibration=calibration)
    assert fused_forward(model) is not None
    batch = padded_batch(4, 11)
    program = _program(model)
    assert [(layer.heads, layer.head_dim, layer.ffn) for layer in program.layers] == [(h, 32, f) for h, f in SIZES]
    found, there = hidden_of(model, **batch), batch["attention_mask"].bool()
    unfused = hidden_of(unfuse_(copy.deepcopy(model)), **batch)
    least = LEAST_SQNR_DB[variant] - 3  # three layers, one of them of one head
    assert sqnr_db(unfused[there], found[there]) > least
    for row, mask, exact in zip(found, there, _emulated(model, batch), strict=True):
        assert sqnr_db(exact, row[mask]) > least
    macs = sum(sum(LENGTHS) * (4 * 64 * 32 * h + 2 * 64 * f) for h, f in SIZES)
    macs += sum(2 * 32 * h * sum(length**2 for length in LENGTHS) for h, _ in SIZES)
    parts = program.cost_by_part(LENGTHS)
    overflow = sum(step.cost(LENGTHS).macs for _, step in program.steps() if step.name.startswith("overflow"))
    assert program.cost(LENGTHS).macs - parts["embedding"].macs - overflow == macs
    lines = str(program).splitlines()
    assert f"{program.layers[1].name}: 3 heads of 32, feed-forward 192, {variant} scales" in lines


@pytest.mark.parametrize("family", FOUR)
def test_modules_narrowed_after_fusing_are_followed(family: str) -> None:
    """QLinears put in the places of QLinears: the next call prepares itself anew from them."""
    model = quantize_(float_model(f"{family}Model", **dict([NAMES[family]])), "w8a8+none", fuse=True)
    batch = padded_batch(4, 11)
    before = hidden_of(model, **batch)
    assert [layer.heads for layer in _program(model).layers] == [2, 2, 2]

    def quantized(linear: nn.Linear) -> QLinear:
        return QLinear(quantize(linear.weight.detach(), SCHEMES["w8a8"]), linear.bias)

    _narrowed(family, quantized, model)
    found, there = hidden_of(model, **batch), batch["attention_mask"].bool()
    assert [(layer.heads, layer.ffn) for layer in _program(model).layers] == SIZES
    assert not torch.equal(found, before)
    expected = hidden_of(unfuse_(copy.deepcopy(model)), **batch)
    assert sqnr_db(expected[there], found[there]) > LEAST_SQNR_DB["dynamic"]
    for row, mask, exact in zip(found, there, _emulated(model, batch), strict=True):
        assert sqnr_db(exact, row[mask]) > LEAST_SQNR_DB["dynamic"] - 3


def test_the_same_bits_in_every_batch_and_portion(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = quantize_(_narrowed("Bert"), "w8a8+none", fuse=True), padded_batch(7, 23)
    expected = hidden_of(model, **batch)
    for tokens in (1, 20, 1000):
        monkeypatch.setattr("qbert.encoder.run.tokens_at_once", lambda _, tokens=tokens: tokens)
        assert torch.equal(hidden_of(model, **batch), expected), tokens


def test_calibration_knows_each_layers_own_neurons() -> None:
    model = _narrowed("Bert")
    calibration = calibration_of(model)
    layers = dict(calibration.layers)
    last = layers["encoder.layer.0"]
    for neuron, allowed in ((63, True), (64, False)):
        spoiled = LayerScales(scales=last.scales, overflow={"inner": {"neurons": (neuron,), "scale": 0.1}})
        given = Calibration(layers={**layers, "encoder.layer.0": spoiled})
        if allowed:
            quantize_(copy.deepcopy(model), "w8a8+none", fuse=True, calibration=given)
        else:
            with pytest.raises(QBertError, match=r"encoder\.layer\.0 has no neuron 64; allowed: 0 \.\.\. 63"):
                quantize_(copy.deepcopy(model), "w8a8+none", fuse=True, calibration=given)


def test_how_wide_a_head_is() -> None:
    """What the attention module says of itself goes before the configuration, which says it of all layers."""
    said, unsaid = nn.Module(), nn.Module()
    said.attention_head_size = 32
    assert [head_size(each, 96, 2) for each in (said, unsaid)] == [32, 48]


# ---- widths that do not fit are refused by name, before a kernel reads beyond them ----------------------------------


def _narrow(path: str, n: int, k: int) -> Callable[[Any], None]:
    return lambda model: _put(model, path, _linear(n, k, 0))


def _norm(path: str, k: int) -> Callable[[Any], None]:
    return lambda model: _put(model, path, nn.LayerNorm(k))


LAYER = "encoder.layer.1"
MISFITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "query": (_narrow(f"{LAYER}.attention.self.query", 32, 64), f"{LAYER}.attention.self.key gives 64 channels, not 32"),
    "key": (_narrow(f"{LAYER}.attention.self.key", 32, 64), f"{LAYER}.attention.self.key gives 32 channels, not 64"),
    "value": (_narrow(f"{LAYER}.attention.self.value", 96, 64), f"{LAYER}.attention.self.value gives 96 channels, not 64"),
    "query_in": (_narrow(f"{LAYER}.attention.self.query", 64, 32), f"{LAYER}.attention.self.query takes 32 channels, not 64"),
    "output_in": (_narrow(f"{LAYER}.attention.output.dense", 64, 32), "attention.output.dense takes 32 channels, not 64"),
    "output_out": (_narrow(f"{LAYER}.attention.output.dense", 32, 64), "attention.output.dense gives 32 channels, not 64"),
    "ffn_in": (_narrow(f"{LAYER}.intermediate.dense", 192, 64), f"{LAYER}.output.dense takes 128 channels, not 192"),
    "ffn_in_in": (_narrow(f"{LAYER}.intermediate.dense", 128, 96), f"{LAYER}.intermediate.dense takes 96 channels, not 64"),
    "ffn_out": (_narrow(f"{LAYER}.output.dense", 96, 128), f"{LAYER}.output.dense gives 96 channels, not 64"),
    "norm": (_norm(f"{LAYER}.output.LayerNorm", 32), f"{LAYER}.output.LayerNorm is over 32 channels, not 64"),
    "embedding_norm": (_norm("embeddings.LayerNorm", 32), "word_embeddings has 64 columns, embeddings.LayerNorm is over 32"),
    "positions": (
        lambda model: _put(model, "embeddings.position_embeddings", nn.Embedding(40, 32)),
        "embeddings.position_embeddings has 32 columns, embeddings.LayerNorm is over 64",
    ),
    "heads": (
        lambda model: [_put(model, f"{LAYER}.attention.self.{name}", _linear(48, 64, 0)) for name in ("query", "key", "value")]
        + [_put(model, f"{LAYER}.attention.output.dense", _linear(64, 48, 0))],
        f"{LAYER} is 48 wide, which heads of 32 do not make",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_widths_that_do_not_fit_are_not_fused(case: str) -> None:
    change, words = MISFITS[case]
    model = float_model()
    change(model)
    quantize_(model, "w8a8+none", fuse=True)
    (row,) = explain(model).encoders
    assert row.fused == "no"
    assert words in row.reason
    fused = quantize_(float_model(), "w8a8+none", fuse=True)
    hidden_of(fused, **padded_batch())
    change(fused)
    with pytest.raises(QBertError, match=r"BertModel is fused, but now .*; undo that or call qbert\.unfuse_"):
        hidden_of(fused, **padded_batch())


def test_a_quantized_module_that_does_not_fit_is_refused_at_the_call() -> None:
    model = quantize_(float_model(), "w8a8+none", fuse=True)
    hidden_of(model, **padded_batch())
    narrow = _linear(32, 64, 0)
    model.encoder.layer[1].attention.self.key = QLinear(quantize(narrow.weight, SCHEMES["w8a8"]), narrow.bias)
    with pytest.raises(
        QBertError, match=r"is fused, but now encoder\.layer\.1\.attention\.self\.key gives 32 channels"
    ):
        hidden_of(model, **padded_batch())


def test_a_projection_that_does_not_fit_is_refused() -> None:
    model = float_model("ElectraModel")
    model.embeddings_project = nn.Linear(48, 64)
    quantize_(model, "w8a8+none", fuse=True)
    assert "embeddings_project takes 48 channels, not 32" in explain(model).encoders[0].reason


def test_layers_are_where_the_program_says() -> None:
    model = fuse_(quantize_(float_model("DistilBertModel"), "w8a8+none"))
    program = _program(model)
    assert [layer.name for layer in program.layers] == ["transformer.layer.0", "transformer.layer.1"]
    names = [name for name, _ in itertools.groupby(name for name, _ in program.steps())]
    assert names == ["embeddings", "transformer.layer.0", "transformer.layer.1"]
