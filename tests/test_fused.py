"""The fused encoder: the same model as unfused, on packed tokens; the same bits in every batch; and what it refuses."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from small_encoders import (
    A8,
    BY_DISTANCE,
    CONFIGS,
    EVERY,
    HEADS,
    LEAST_SQNR_DB,
    SIZES,
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

from qbert import QBertError, Recipe, dequantize_, explain, fuse_, quantize_, unfuse_
from qbert.encoder import fused_forward, obstacle
from qbert.encoder.batch import Tokens
from qbert.encoder.build import residual_dtype
from qbert.metrics import sqnr_db
from qbert.modules import QuantizedModule
from qbert.target import Target


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [each for each in model(**inputs).to_tuple() if isinstance(each, Tensor)]


# ---- the same model as unfused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_bare_encoders_compute_what_unfused_ones_do(family: str, variant: str) -> None:
    model = fused_model(f"{family}Model", variant)
    assert fused_forward(model).variant == variant
    inputs = padded_batch()
    found = _outputs(model, inputs)
    expected = _outputs(unfuse_(copy.deepcopy(model)), inputs)
    there = inputs["attention_mask"].bool()
    assert len(found) == len(expected)
    assert sqnr_db(expected[0][there], found[0][there]) > LEAST_SQNR_DB[variant]
    assert torch.all(found[0][~there] == 0)
    for each, exact in zip(found[1:], expected[1:], strict=True):  # the pooler
        assert sqnr_db(exact, each) > LEAST_SQNR_DB[variant] - 6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", [family for family in EVERY if family != "BertGeneration"])
def test_heads_on_a_fused_encoder(family: str, head: str, variant: str) -> None:
    model = fused_model(family + head, variant)
    assert fused_forward(encoder_of(model)).variant == variant
    inputs = padded_batch()
    there = inputs["attention_mask"].bool()
    for found, exact in zip(_outputs(model, inputs), _outputs(unfuse_(copy.deepcopy(model)), inputs), strict=True):
        assert found.shape == exact.shape
        if found.shape[:2] == there.shape:  # of padding a head says something else, and nobody asks
            found, exact = found[there], exact[there]
        assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", A8)
@pytest.mark.parametrize("embedding", [None, "w8", "w4", "gobo3", "gobo4"])
def test_every_scheme(linear: str, embedding: str | None, variant: str) -> None:
    model = fused_model("BertModel", variant, Recipe(linear, embedding), hidden_size=128, intermediate_size=192)
    assert fused_forward(model) is not None  # heads of size 64 here, of 32 elsewhere
    inputs = padded_batch()
    there = inputs["attention_mask"].bool()
    expected = hidden_of(unfuse_(copy.deepcopy(model)), **inputs)[there]
    assert sqnr_db(expected, hidden_of(model, **inputs)[there]) > LEAST_SQNR_DB[variant]


def test_schemes_may_differ_between_and_within_layers() -> None:
    overrides = {"layer.0.output": "gobo4a8", "layer.1.attention.self": "gobo3a8", "intermediate": "w4a8"}
    for variant in VARIANTS:
        model = fused_model("BertModel", variant, Recipe("w8a8", "gobo4", overrides=overrides))
        inputs = padded_batch()
        there = inputs["attention_mask"].bool()
        expected = hidden_of(unfuse_(copy.deepcopy(model)), **inputs)[there]
        assert sqnr_db(expected, hidden_of(model, **inputs)[there]) > LEAST_SQNR_DB[variant]


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_padding_wherever_it_stands(family: str, kind: str) -> None:
    model = fused_model(f"{family}Model")
    inputs = padded_batch(kind=kind)
    if kind == "holes" and family in BY_DISTANCE:
        with pytest.raises(QBertError, match="attention_mask has padding between tokens of a row"):
            hidden_of(model, **inputs)
        return
    there = inputs["attention_mask"].bool()
    expected = hidden_of(unfuse_(copy.deepcopy(model)), **inputs)
    for mask in (inputs["attention_mask"], there, inputs["attention_mask"].float()):
        found = hidden_of(model, input_ids=inputs["input_ids"], attention_mask=mask)
        assert sqnr_db(expected[there], found[there]) > LEAST_SQNR_DB["dynamic"]
        padding = ~there
        assert sqnr_db(expected[:, 0], found[:, 0]) > LEAST_SQNR_DB["dynamic"]  # what a pooler reads, token or not
        padding[:, 0] = False
        assert torch.all(found[padding] == 0)


@pytest.mark.parametrize("family", EVERY)
def test_positions_types_and_embeddings_of_the_callers(family: str) -> None:
    model = fused_model(f"{family}Model")
    plain = unfuse_(copy.deepcopy(model))
    ids = padded_batch(3, 9)["input_ids"]
    embeds = torch.randn(3, 9, encoder_of(model).get_input_embeddings().weight.shape[1]) * 0.1
    positions = torch.arange(20, 29)
    calls: list[dict[str, Tensor]] = [
        {"input_ids": ids, "position_ids": positions[None]},
        {"input_ids": ids, "position_ids": positions.flip(0).expand(3, 9)},
        {"inputs_embeds": embeds},
        {"inputs_embeds": embeds, "position_ids": positions[None]},
    ]
    if family == "ModernBert":
        with pytest.raises(QBertError, match="position_ids do not go up by one from token to token"):
            hidden_of(model, **calls.pop(1))
    if family in ("Bert", "Electra", "Albert"):
        types = torch.randint(0, 2, (3, 9))
        calls += [{"input_ids": ids, "token_type_ids": types}, {"inputs_embeds": embeds, "token_type_ids": types[:1]}]
    least = LEAST_SQNR_DB["dynamic"] - (2 if family == "ModernBert" else 0)  # which has a layer more
    for call in calls:
        assert sqnr_db(hidden_of(plain, **call), hidden_of(model, **call)) > least, list(call)


def test_ids_of_any_integer_type_and_stride() -> None:
    model, batch = fused_model(), padded_batch()
    expected = hidden_of(model, **batch)
    narrow = {name: each.to(torch.int32) for name, each in batch.items()}
    strided = {name: each.repeat_interleave(2, dim=1)[:, ::2] for name, each in batch.items()}
    for inputs in (narrow, strided):
        assert torch.equal(hidden_of(model, **inputs), expected)


def test_own_embeddings_are_the_same_bits_as_ids() -> None:
    for name in ("BertModel", "ElectraModel"):
        model = fused_model(name)
        batch = padded_batch()
        rows = model.embeddings.word_embeddings(batch["input_ids"])
        by_row = hidden_of(model, inputs_embeds=rows, attention_mask=batch["attention_mask"])
        assert torch.equal(by_row, hidden_of(model, **batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_models(variant: str, dtype: torch.dtype) -> None:
    calibration = calibrated("BertModel", ()) if variant == "static" else None
    model = quantize_(float_model().to(dtype), "w8a8+none", fuse=True, calibration=calibration)
    batch = padded_batch()
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True)
    assert {each.dtype for each in (found[0], found.pooler_output, *found.hidden_states)} == {dtype}
    there = batch["attention_mask"].bool()
    expected = hidden_of(unfuse_(copy.deepcopy(model)), **batch)[there].float()
    assert sqnr_db(expected, found[0][there].float()) > 18  # half precision has errors of its own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", EVERY)
def test_a_residual_stream_of_the_models_type(
    family: str, variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, by the CPU's operators."""
    monkeypatch.setattr("qbert.encoder.build.residual_dtype", lambda target, dtype: dtype)
    calibration = calibrated(f"{family}Model", ()) if variant == "static" else None
    model = quantize_(float_model(f"{family}Model").to(dtype), "w8a8+none", fuse=True, calibration=calibration)
    batch = padded_batch()
    there = batch["attention_mask"].bool()
    expected = hidden_of(unfuse_(copy.deepcopy(model)), **batch)[there].float()
    assert sqnr_db(expected, hidden_of(model, **batch)[there].float()) > 18
    encoder = fused_forward(model).encoder()
    program = encoder.program
    tables = bound(program.embedding[0], "positions"), bound(program.embedding[0], "types")
    assert {encoder.residual, program.residual, *(table.dtype for table in tables)} == {dtype}
    norms = [step for _, step in program.steps() if "norm" in step.operation]
    assert len(norms) == 1 + 2 * len(program.layers)
    assert {step.float_bytes for step in norms} == {dtype.itemsize}
    tokens = Tokens(*torch.zeros(3, 5, dtype=torch.int64).unbind(), torch.tensor([0, 2, 5], dtype=torch.int32))
    assert encoder.last_hidden(tokens).dtype == dtype
    rows = model.get_input_embeddings()(batch["input_ids"])
    by_row = hidden_of(model, inputs_embeds=rows, attention_mask=batch["attention_mask"])
    if family != "Roberta":  # whose positions are another's without ids
        assert torch.equal(by_row, hidden_of(model, **batch))


def test_the_residual_streams_type_is_a_rule() -> None:
    cpu, gpu = Target("cpu", "generic"), Target("cuda", sm=90)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert residual_dtype(cpu, dtype) == torch.float32
        assert residual_dtype(gpu, dtype) == dtype
    assert residual_dtype(gpu, torch.float64) == torch.float32


@pytest.mark.parametrize("asked", [True, -1, [0, 2], [1], 0, [7]], ids=str)
@pytest.mark.parametrize("family", EVERY)
def test_hidden_states(family: str, asked: Any) -> None:
    model = fused_model(f"{family}Model")
    batch = padded_batch()
    there = batch["attention_mask"].bool()
    with torch.no_grad():
        found = model(**batch, output_hidden_states=asked)
        expected = unfuse_(copy.deepcopy(model))(**batch, output_hidden_states=asked)
    assert (found.hidden_states is None) == (expected.hidden_states is None)
    for state, exact in zip(found.hidden_states or (), expected.hidden_states or (), strict=True):
        assert (state is None) == (exact is None)
        if state is not None:
            assert sqnr_db(exact[there], state[there]) > LEAST_SQNR_DB["dynamic"]
            assert torch.all(state[~there] == 0)


@pytest.mark.parametrize("family", EVERY)
def test_output_types(family: str) -> None:
    model = fused_model(f"{family}Model")
    plain = unfuse_(copy.deepcopy(model))
    batch = padded_batch()
    for keywords in (
        {},
        {"return_dict": True},
        {"return_dict": False},
        {"return_dict": False, "output_hidden_states": True},
    ):
        with torch.no_grad():
            found, expected = model(**batch, **keywords), plain(**batch, **keywords)
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        if keywords.get("return_dict") is not False:
            assert list(found.keys()) == list(expected.keys())
    with torch.no_grad():  # by position, as the class takes them
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"])[0], model(**batch)[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", EVERY)
def test_nothing_to_compute(family: str, variant: str) -> None:
    model = fused_model(f"{family}Model", variant)
    hidden = 64
    assert hidden_of(model, input_ids=torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, hidden)
    padding = torch.zeros(2, 5, dtype=torch.int64)
    nothing = hidden_of(model, input_ids=padding, attention_mask=padding)
    assert nothing.shape == (2, 5, hidden)
    assert torch.all(nothing == 0)
    batch = padded_batch(3, 5)
    batch["attention_mask"][1] = 0
    found = hidden_of(model, **batch)
    assert torch.all(found[1] == 0)
    for row in (0, 2):
        assert torch.equal(
            found[row], hidden_of(model, **{name: each[row : row + 1] for name, each in batch.items()})[0]
        )


# ---- the same bits in every batch -----------------------------------------------------------------------------------


def _tokens(model: Any, rows: list[Tensor], width: int, side: str) -> list[Tensor]:
    """Token outputs of each row in one batch, padded to `width` on one side; positions count from the first token."""
    ids = torch.ones(len(rows), width, dtype=torch.int64)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where], mask[index, where], positions[index, where] = row, 1, torch.arange(len(row)) + 2
    hidden = hidden_of(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    return [hidden[index][mask[index].bool()] for index in range(len(rows))]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", A8)
def test_a_sequence_gives_the_same_bits_in_every_batch(linear: str, variant: str) -> None:
    model = fused_model("BertModel", variant, linear)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, 97, (length,), generator=generator) for length in (1, 2, 7, 16, 17, 31)]
    alone = [_tokens(model, [row], len(row), "right")[0] for row in rows]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1], [2, 2, 0, 2], [4, 0]):
        for width in (31, 38):
            for side in ("right", "left"):
                found = _tokens(model, [rows[index] for index in order], width, side)
                for index, hidden in zip(order, found, strict=True):
                    assert torch.equal(hidden, alone[index]), (index, order, width, side)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", EVERY)
def test_all_families_give_the_same_bits_in_every_batch(family: str, variant: str) -> None:
    model = fused_model(f"{family}Model", variant)
    batch = padded_batch(5, 13, kind="right")
    together = hidden_of(model, **batch)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        ids = batch["input_ids"][row : row + 1, :length]
        assert torch.equal(hidden_of(model, input_ids=ids)[0], together[row, :length])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_large_batch_in_portions_gives_the_same_bits(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = fused_model("BertModel", variant), padded_batch(7, 23, kind="right")
    expected = hidden_of(model, **batch)
    for tokens in (1, 20, 23, 50, 1000):
        monkeypatch.setattr("qbert.encoder.run.tokens_at_once", lambda _, tokens=tokens: tokens)
        assert torch.equal(hidden_of(model, **batch), expected), tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_threads_gives_the_same_bits(variant: str) -> None:
    model, batch = fused_model("BertModel", variant), padded_batch(9, 23)
    expected, before = hidden_of(model, **batch), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(hidden_of(model, **batch), expected), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", EVERY)
def test_a_bad_token_stays_in_its_sequence(family: str, variant: str, bad: float) -> None:
    model = fused_model(f"{family}Model", variant)
    embeds = torch.randn(4, 8, model.get_input_embeddings().weight.shape[1], generator=torch.Generator().manual_seed(0))
    clean = hidden_of(model, inputs_embeds=embeds)
    embeds[2, 5, 10] = bad
    spoiled = hidden_of(model, inputs_embeds=embeds)
    others = [0, 1, 3]
    assert clean.isfinite().all()
    assert torch.equal(spoiled[others], clean[others])
    assert spoiled[2].isnan().all()  # static codes have no NaN, so this is not for nothing


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_token_spoils_its_sequence_from_the_first_layer_on_and_no_padding(variant: str) -> None:
    model, batch = fused_model("BertModel", variant), padded_batch(4, 8)
    embeds, mask = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0)), batch["attention_mask"]
    embeds[1, 2, 3] = torch.nan
    with torch.no_grad():
        states = model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True).hidden_states
    assert states[0][1].isnan().any(1).nonzero().tolist() == [[2]]
    for state in states[1:]:
        assert torch.equal(state.isnan().all(2), state.isnan().any(2))
        assert torch.equal(state.isnan().any(2), (torch.arange(4) == 1)[:, None] & mask.bool())


def test_a_table_row_that_is_nan_spoils_its_sequence() -> None:
    model, batch = fused_model("BertModel", "static"), padded_batch(4, 8)
    with torch.no_grad():
        model.get_input_embeddings().weight[batch["input_ids"][2, 1]] = torch.nan
    there = (batch["input_ids"] == batch["input_ids"][2, 1]).any(1)
    assert torch.equal(hidden_of(model, **batch)[:, 0].isnan().all(1), there)


# ---- the model object stays what it was -----------------------------------------------------------------------------


def test_state_dict_class_and_modules_are_those_of_the_unfused_model() -> None:
    for variant in VARIANTS:
        model = fused_model("BertForSequenceClassification", variant, Recipe("w8a8", "w8"))
        plain = quantize_(float_model("BertForSequenceClassification"), Recipe("w8a8", "w8"))
        _outputs(model, padded_batch())
        assert type(model) is type(plain)
        assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
        state, expected = model.state_dict(), plain.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert model.num_parameters() == plain.num_parameters()


def test_signature_is_that_of_the_class() -> None:
    for family in EVERY:
        model = fused_model(f"{family}Model")
        bound = inspect.signature(unfuse_(copy.deepcopy(model)).forward)
        assert inspect.signature(model.forward) == bound
        assert model.forward.__doc__ == type(model).forward.__doc__


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_and_pickles_are_models_of_their_own(variant: str) -> None:
    model, batch = fused_model("BertModel", variant), padded_batch()
    expected = hidden_of(model, **batch)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    for each in copies:
        assert fused_forward(each).base is each
        assert torch.equal(hidden_of(each, **batch), expected)
    with torch.no_grad():  # the copies do not follow the original
        model.encoder.layer[0].output.LayerNorm.weight.mul_(2.0)
    assert not torch.equal(hidden_of(model, **batch), expected)
    for each in copies:
        assert torch.equal(hidden_of(each, **batch), expected)


def test_codes_of_queries_keys_and_values_are_held_once() -> None:
    for linear in A8:
        model = fused_model("BertModel", "static", linear)
        hidden_of(model, **padded_batch())
        attention = model.encoder.layer[0].attention.self
        parts = [each.qdata for each in (attention.query, attention.key, attention.value)]
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
        assert sum(part.untyped_storage().nbytes() for part in parts) == 3 * sum(part.nbytes for part in parts)
        codes = sum(module.qdata.nbytes for module in model.modules() if isinstance(module, QuantizedModule))
        row = explain(model).encoders[0]
        # Scales, biases and tables, those of the last layer twice: for all tokens and for first ones. These models are tiny.
        assert 0 < row.extra_bytes < codes


def test_changes_of_the_model_are_followed() -> None:
    model, batch = fused_model(), padded_batch()
    before = hidden_of(model, **batch)

    def changed() -> Tensor:
        found = hidden_of(model, **batch)
        assert torch.equal(found, hidden_of(copy.deepcopy(model), **batch))  # which is prepared anew
        return found

    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.bias.add_(1.0)  # in place
    first = changed()
    assert not torch.equal(first, before)
    other = quantize_(float_model(seed=5), "w8a8+none")
    model.load_state_dict(other.state_dict())
    loaded = changed()
    assert torch.equal(loaded, hidden_of(fuse_(other), **batch))
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm(64)  # another module
    assert not torch.equal(changed(), loaded)
    model.encoder.layer = model.encoder.layer[:1]
    one_layer = changed()
    nn.Module.to(model, torch.bfloat16)  # transformers refuses to cast a quantized model; a model around it does not
    assert changed().dtype == torch.bfloat16
    assert one_layer.shape == before.shape


def test_what_is_prepared_under_inference_mode_serves_outside() -> None:
    model, batch = fused_model(), padded_batch()
    with torch.inference_mode():
        inside = model(**batch).last_hidden_state.clone()
    assert torch.equal(hidden_of(model, **batch), inside)
    model.load_state_dict(model.state_dict())
    assert torch.equal(hidden_of(model, **batch), inside)


def test_a_compiler_leaves_it_alone() -> None:
    model, batch = fused_model("BertModel", "static"), padded_batch()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(hidden_of(compiled, **batch), hidden_of(model, **batch))
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.bias.add_(1.0)
    model.encoder.layer[0].output.LayerNorm = nn.LayerNorm(64)
    assert torch.equal(hidden_of(compiled, **batch), hidden_of(model, **batch))


def test_dequantize_and_quantize_again() -> None:
    model, batch = fused_model("BertForMaskedLM", "static"), padded_batch()
    dequantize_(model)
    assert fused_forward(encoder_of(model)) is None
    assert "forward" not in encoder_of(model).__dict__
    plain = copy.deepcopy(model)
    quantize_(model, "w8a8+none", fuse=True)
    assert fused_forward(encoder_of(model)).variant == "dynamic"
    assert torch.equal(hidden_of(model, **batch), hidden_of(quantize_(plain, "w8a8+none", fuse=True), **batch))


def test_fuse_and_unfuse_a_quantized_model() -> None:
    model, batch = quantize_(float_model(), "w8a8+none"), padded_batch()
    plain = hidden_of(model, **batch)
    assert fuse_(model) is model
    dynamic = hidden_of(model, **batch)
    calibration = calibration_of(model)  # of a fused model: it is run module by module, and left fused
    assert torch.equal(hidden_of(model, **batch), dynamic)
    fuse_(model, calibration)
    assert fused_forward(model).variant == "static"
    assert not torch.equal(hidden_of(model, **batch), dynamic)
    assert unfuse_(model) is model
    assert torch.equal(hidden_of(model, **batch), plain)
    with pytest.raises(QBertError, match="has no quantized module"):
        fuse_(float_model())


def test_an_encoder_inside_something_else() -> None:
    class Sentence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = float_model("DistilBertModel")

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            takes = inspect.signature(self.auto_model.forward).parameters
            return self.auto_model(**{name: each for name, each in batch.items() if name in takes})[0][:, 0]

    model = quantize_(Sentence(), "w8a8+none", fuse=True).eval()
    assert fused_forward(model.auto_model) is not None
    batch = padded_batch() | {"token_type_ids": torch.zeros(4, 11, dtype=torch.int64)}
    with torch.no_grad():
        assert sqnr_db(unfuse_(copy.deepcopy(model))(batch), model(batch)) > LEAST_SQNR_DB["dynamic"]
    assert [row.name for row in explain(model).encoders] == ["auto_model"]


def test_hooks_on_the_encoder_itself_and_on_its_pooler_are_called() -> None:
    model, seen = fused_model(), []
    model.register_forward_hook(lambda module, args, output: seen.append(type(output).__name__))
    model.pooler.register_forward_hook(lambda module, args, output: seen.append("pooler"))
    hidden_of(model, **padded_batch())
    assert seen == ["pooler", "BaseModelOutputWithPoolingAndCrossAttentions"]


def test_hooks_of_transformers_own_do_not_hinder() -> None:
    model = float_model()
    with torch.no_grad():
        model(**padded_batch(), output_hidden_states=True)  # installs hooks on every layer
    quantize_(model, "w8a8+none", fuse=True)
    assert fused_forward(model) is not None
    with torch.no_grad():
        assert len(model(**padded_batch(), output_hidden_states=True).hidden_states) == 3


# ---- what is refused at the call ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"output_attentions": True}, "output_attentions=True"),
        ({"past_key_values": object()}, "past_key_values"),
        ({"use_cache": True}, "use_cache"),
        ({"encoder_hidden_states": torch.zeros(1)}, "encoder_hidden_states"),
        ({"encoder_attention_mask": torch.zeros(1)}, "encoder_attention_mask"),
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"is_causal": True}, "is_causal"),
        ({"attention_mask": torch.ones(4, 11, 11)}, r"attention_mask is \(4, 11, 11\)"),
        ({"attention_mask": torch.ones(4, 1, 11, 11)}, r"allowed with a fused encoder: \(4, 11\)"),
        ({"attention_mask": torch.ones(4, 12)}, r"attention_mask is \(4, 12\)"),
        ({"inputs_embeds": torch.ones(4, 11, 64)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(5, dtype=torch.int64)}, r"input_ids \(batch, tokens\)"),
        ({"input_ids": torch.full((4, 11), 97)}, "97 is out of range"),
        ({"position_ids": torch.full((1, 11), 40)}, "40 is out of range"),
        ({"token_type_ids": torch.full((4, 11), 2)}, "2 is out of range"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused_by_name(keywords: dict[str, Any], words: str) -> None:
    for variant in VARIANTS:
        model = fused_model("BertModel", variant)
        inputs = {"input_ids": padded_batch()["input_ids"]} | keywords
        with pytest.raises(QBertError, match=words), torch.no_grad():
            model(**inputs)


def test_training_is_refused() -> None:
    model = fused_model().train()
    with pytest.raises(QBertError, match=r"does not take training mode: call model\.eval\(\) first"):
        model(**padded_batch())
    hidden_of(model.eval(), **padded_batch())


def test_too_many_tokens_are_refused() -> None:
    for name, most in (("BertModel", 40), ("DistilBertModel", 40)):
        with pytest.raises(QBertError, match=f"41 tokens; the model has positions for {most}"):
            hidden_of(fused_model(name), input_ids=torch.ones(1, 41, dtype=torch.int64))


def test_python_errors_are_pythons() -> None:
    model, ids = fused_model(), padded_batch()["input_ids"]
    with pytest.raises(TypeError, match="several values for argument 'input_ids'"):
        model(ids, input_ids=ids)
    with pytest.raises(TypeError, match="at most 9 positional arguments"):
        model(*[None] * 10)


def test_what_means_nothing_to_an_encoder_is_taken() -> None:
    model = fused_model("BertForSequenceClassification")
    batch = padded_batch()
    with torch.no_grad():
        found = model(**batch, num_items_in_batch=4, use_cache=False, output_attentions=False)
    assert torch.equal(found.logits, model(**batch).logits)


def test_a_hook_or_a_module_that_comes_later_is_refused_at_the_call() -> None:
    model = fused_model()
    hidden_of(model, **padded_batch())
    handle = model.encoder.layer[1].register_forward_hook(lambda module, args, output: None)
    with pytest.raises(QBertError, match=r"is fused, but now encoder\.layer\.1 has a hook.*qbert\.unfuse_\(model\)"):
        hidden_of(model, **padded_batch())
    handle.remove()
    hidden_of(model, **padded_batch())
    model.encoder.layer[0].output.dense = nn.Linear(128, 64)
    with pytest.raises(QBertError, match=r"but now encoder\.layer\.0\.output\.dense is float"):
        hidden_of(model, **padded_batch())


# ---- what stays unfused, and that it says why -----------------------------------------------------------------------


def _with(model: Any, change: Any) -> Any:
    change(model)
    return model


@pytest.mark.parametrize(
    ("model", "recipe", "reason"),
    [
        (lambda: float_model("BertLMHeadModel", is_decoder=True), "w8a8", "is_decoder is set: only encoders are fused"),
        (lambda: float_model(hidden_act="tanh"), "w8a8", "its activation is none that is fused: unknown activation 'tanh'"),
        (lambda: float_model("DistilBertModel", activation="mish"), "w8a8", "unknown activation 'mish'; allowed: "),
        (lambda: float_model(position_embedding_type="relative_key"), "w8a8", "its position embeddings are 'relative_key'"),
        (float_model, "w8a16", "query has scheme w8a16, which has no integer activations"),
        (float_model, Recipe(exclude=["layer.1.output"]), "encoder.layer.1.output.dense is float"),
        (float_model, Recipe(overrides={"key": "w4a8"}), "query, key and value of encoder.layer.0 have different schemes"),
        (lambda: float_model("ElectraModel"), Recipe(exclude=["embeddings_project"]), "embeddings_project is float"),
        (
            lambda: _with(float_model(), lambda m: m.encoder.layer[1].register_forward_hook(lambda *_: None)),
            "w8a8", "encoder.layer.1 has a hook, which a fused encoder would not call",
        ),
        (
            lambda: _with(float_model(), lambda m: setattr(m.encoder.layer[0].output, "LayerNorm", nn.Identity())),
            "w8a8", "encoder.layer.0.output.LayerNorm is not a LayerNorm with a weight",
        ),
        (
            lambda: _with(float_model(), lambda m: setattr(m.embeddings.word_embeddings, "max_norm", 1.0)),
            "w8a8", "embeddings.word_embeddings is not a plain table",
        ),
        (
            lambda: _with(float_model(), lambda m: setattr(m.encoder.layer[0], "intermediate", nn.Identity())),
            "w8a8", "it is not built like BERT",
        ),
        (
            lambda: _with(float_model(), lambda m: setattr(m.encoder, "layer", nn.ModuleList())),
            Recipe("w8a8", "w8"), "it has no layers",
        ),
        (
            lambda: transformers.SplinterModel(transformers.SplinterConfig(**SIZES)), "w8a8",
            "SplinterModel is of no family that can be fused (BERT, RoBERTa, ELECTRA, DistilBERT, MPNet, ALBERT, ModernBERT, ",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "w8a8", "Sequential is of no family that can be fused"),
    ],
    ids=[
        "decoder", "tanh", "mish", "relative", "scheme", "excluded", "mixed", "projection", "hook", "norm",
        "max_norm", "built", "no_layers", "splinter", "no_encoder",
    ],
)  # fmt: skip
def test_what_cannot_be_fused_stays_unfused_and_says_why(
    model: Any, recipe: Recipe | str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="qbert"):
        quantized = quantize_(model(), recipe, fuse=True)
    assert reason in caplog.text
    rows = explain(quantized).encoders
    assert [row.fused for row in rows] == ["no"]
    assert reason in rows[0].reason
    assert reason in str(explain(quantized))
    assert not any("forward" in module.__dict__ for module in quantized.modules())


def test_a_subclass_is_not_its_family() -> None:
    class Own(transformers.BertModel):
        pass

    assert "Own is of no family" in str(
        obstacle(quantize_(Own(copy.deepcopy(CONFIGS["Bert"])), "w8a8+none", fuse=True))
    )


def test_explain_says_what_runs() -> None:
    model = quantize_(float_model("BertForSequenceClassification"), "w8a8+none")
    assert [(row.name, row.fused) for row in explain(model).encoders] == [("bert", "no")]
    assert "not asked for" in explain(model).encoders[0].reason
    fuse_(model)
    assert explain(model).encoders[0].fused == "dynamic"
    calibration = calibration_of(model)
    before = explain(model).rows
    fuse_(model, calibration)
    explanation = explain(model)
    assert explanation.encoders[0].fused == "static"
    assert str(explanation).splitlines()[-1].startswith("bert: fused: static (")
    assert explanation.rows == before  # each row's kernel stays
    assert explain(float_model()).encoders == []


def test_arguments_of_quantize_that_do_not_fit() -> None:
    model = float_model()
    calibration = calibration_of(model)
    other = calibration_of(float_model(num_hidden_layers=3))
    with pytest.raises(QBertError, match="a calibration is for the fused encoder; pass fuse=True"):
        quantize_(model, "w8a8+none", calibration=calibration)
    with pytest.raises(QBertError, match=r"has a layer 'encoder\.layer\.2'; BertModel has"):
        quantize_(model, "w8a8+none", fuse=True, calibration=other)
    with pytest.raises(QBertError, match=r"lacks layer 'encoder\.layer\.2'; it has 2 of 3"):
        quantize_(float_model(num_hidden_layers=3), "w8a8+none", fuse=True, calibration=calibration)
    with pytest.raises(QBertError, match="is of one encoder; ModuleList has 2"):
        quantize_(nn.ModuleList([float_model(), float_model()]), "w8a8+none", fuse=True, calibration=calibration)
    assert not any(isinstance(module, QuantizedModule) for module in model.modules())
