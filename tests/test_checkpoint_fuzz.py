"""Whatever is done to a checkpoint's bytes: `qbert.load` raises CheckpointError, or gives the very same model.

No other exception, no crash, no other answer. Edits that come with a fresh digest, as an attacker's would, may give
another model, but one that runs: no index or code may reach a kernel that it would read out of bounds with.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import qbert
from qbert import CheckpointError, Recipe
from qbert.checkpoint import Record, signed
from qbert.convert import note_reshaped
from qbert.formats import block_format, table
from qbert.shapes import factorize_linear_, keep_heads_, keep_neurons_, keep_words_
from qbert.testing import random_weight

# Small enough that a random bit is as likely to be in a header as in a code.
SIZES = {
    "vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 8,
}  # fmt: skip
RECIPES = {
    "gobo": Recipe("gobo3", "gobo4", overrides={"output": "gobo4a8"}),
    "w4a8": Recipe("w4a8-g32", "w8", overrides={"position_embeddings": "w4-g32", "query": "w8a8"}),
    "fused": Recipe("w8a8", "gobo4", overrides={"intermediate": "gobo3a8"}),  # and calibrated, see `_original`
    "emulated": qbert.emulate(
        block_format("mine", table("t", (-2, -1, 0, 1, 3)), "uint6", 16, outliers="share:0.01"), "mxfp8", "int8",
        embeddings=block_format("six", "int3", "bf16", 16, symmetric=False),
    ),
}  # fmt: skip
SHAPED = "shaped"  # float, with heads, neurons and words taken out
SPARSE = "sparse"  # quantized, with zeros left out: one linear by a bitmap, one by places
LOW_RANK = "low rank"  # the same, with a linear that is two
VERSION_1 = "version_1"  # a checkpoint with a record of that version, as it was written then
VERSION_1_FOLDER = Path(__file__).parent / "data" / "version_1" / "checkpoint"
IDS = torch.tensor([[1, 22, 7, 0, 9], [3, 3, 0, 0, 0]])
DTYPES = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "I16", "U16", "F16", "BF16", "I32", "U32",
    "F32", "F64", "I64", "U64", "C64", "F128", "",
)  # fmt: skip
EDGES = st.sampled_from([16, 31, 33, 64, 127, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 10**30, 1.0, 0.5])
NUMBERS = st.one_of(
    st.integers(-3, 3), EDGES, st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=4)
)  # fmt: skip
JSON = st.recursive(
    NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=4,
)

Header = dict[str, Any]
Files = tuple[bytes, bytes]  # config.json and model.safetensors


@functools.cache
def _original(recipe: str) -> Files:
    if recipe == VERSION_1:
        return tuple((VERSION_1_FOLDER / name).read_bytes() for name in ("config.json", "model.safetensors"))
    torch.manual_seed(0)
    if recipe in (SHAPED, LOW_RANK):
        return _files(_shaped(factored=recipe == LOW_RANK))
    if recipe == SPARSE:
        return _files(_sparse())
    fuse = recipe == "fused"
    model = BertForMaskedLM(BertConfig(**{**SIZES, "num_attention_heads": 1 if fuse else 2})).eval()
    with torch.no_grad():
        for index, module in enumerate(model.modules()):  # weights with outliers
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.copy_(random_weight(*module.weight.shape, seed=index))
    calibration = qbert.calibrate(model, [{"input_ids": IDS}]) if fuse else None
    qbert.quantize_(model, RECIPES[recipe], fuse=fuse, calibration=calibration)
    return _files(model)


def _shaped(*, factored: bool) -> nn.Module:
    model = BertModel(BertConfig(**{**SIZES, "num_hidden_layers": 2, "num_attention_heads": 2})).eval()
    keep_heads_(model, 0, [1])
    keep_neurons_(model, 1, range(48))
    keep_words_(model, range(23))
    if factored:
        factorize_linear_(model, 1, "ffn_out", torch.randn(8, 48), torch.randn(32, 8))
    note_reshaped(model)
    return model


def _sparse() -> nn.Module:
    model = BertModel(BertConfig(**SIZES)).eval()
    layer = model.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight.masked_fill_(torch.rand(32, 64) < 0.7, 0.0)
        layer.intermediate.dense.weight.view(64, 8, 4)[:, :, ::2] = 0
    return qbert.quantize_(model, Recipe("gobo3", overrides={"intermediate": "w8a8"}))


def _files(model: Any) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "config.json").read_bytes(), (Path(folder) / "model.safetensors").read_bytes()


@functools.cache
def _expected(recipe: str) -> tuple[dict[str, Tensor], Tensor]:
    model = _load(_original(recipe))
    return model.state_dict(), _output(model)


def _load(files: Files) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(files[0])
        (Path(folder) / "model.safetensors").write_bytes(files[1])
        return qbert.load(folder)


@torch.no_grad()
def _output(model: nn.Module) -> Tensor:
    """Logits, or the last hidden state of the bare encoder."""
    return model(IDS)[0]


def _judge(recipe: str, files: Files) -> bool:
    """Whether the files load; then they give the very same model. Anything but CheckpointError comes through."""
    try:
        model = _load(files)
    except CheckpointError as error:
        note(str(error))
        return False
    state, output = _expected(recipe)
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert torch.equal(_output(model), output)
    return True


# ---- what is done to the weights' file ------------------------------------------------------------------------------


def _split(weights: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def _join(header: Header | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _tensor_names(header: Header) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(name for name in header if name != "__metadata__"))


def _flip_in_data(weights: bytes, draw: Callable[..., Any]) -> bytes:
    _, data = _split(weights)
    return _flip_at(weights, draw(st.integers(8 * (len(weights) - len(data)), 8 * len(weights) - 1)))


def _flip_in_header(weights: bytes, draw: Callable[..., Any]) -> bytes:
    _, data = _split(weights)
    return _flip_at(weights, draw(st.integers(0, 8 * (len(weights) - len(data)) - 1)))


def _flip_at(weights: bytes, bit: int) -> bytes:
    changed = bytearray(weights)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _truncate(weights: bytes, draw: Callable[..., Any]) -> bytes:
    return weights[: draw(st.integers(0, len(weights) - 1))]


def _extend(weights: bytes, draw: Callable[..., Any]) -> bytes:
    return weights + draw(st.binary(min_size=1, max_size=64))


def _overwrite(weights: bytes, draw: Callable[..., Any]) -> bytes:
    start, new = draw(st.integers(0, len(weights) - 1)), draw(st.binary(min_size=1, max_size=32))
    return weights[:start] + new + weights[start + len(new) :]


def _rename(weights: bytes, draw: Callable[..., Any]) -> bytes:
    header, data = _split(weights)
    new = draw(st.one_of(_tensor_names(header), st.text(max_size=8), st.just("cls.predictions.decoder.weight")))
    entry = header.pop(draw(_tensor_names(header)))
    header[new] = entry
    return _join(header, data)


def _drop(weights: bytes, draw: Callable[..., Any]) -> bytes:
    header, data = _split(weights)
    del header[draw(_tensor_names(header))]
    return _join(header, data)


def _alias(weights: bytes, draw: Callable[..., Any]) -> bytes:
    """One tensor more, on the bytes of another."""
    header, data = _split(weights)
    header[draw(st.text(min_size=1, max_size=8))] = header[draw(_tensor_names(header))]
    return _join(header, data)


def _say_twice(weights: bytes, draw: Callable[..., Any]) -> bytes:
    """The same name twice in the header's JSON."""
    header, data = _split(weights)
    name, other = draw(_tensor_names(header)), draw(_tensor_names(header))
    text = json.dumps(header)
    return _join(f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[other])}}}", data)


def _swap(weights: bytes, draw: Callable[..., Any]) -> bytes:
    header, data = _split(weights)
    first, second = draw(_tensor_names(header)), draw(_tensor_names(header))
    header[first], header[second] = header[second], header[first]
    return _join(header, data)


def _reorder(weights: bytes, draw: Callable[..., Any]) -> bytes:
    """The same tensors with their bytes in another order: another file, the same model."""
    header, data = _split(weights)
    names = [name for name in header if name != "__metadata__"]
    pieces, at, entries = [], 0, {"__metadata__": header["__metadata__"]}
    for name in draw(st.permutations(names)):
        start, stop = header[name]["data_offsets"]
        pieces.append(data[start:stop])
        entries[name] = {**header[name], "data_offsets": [at, at + stop - start]}
        at += stop - start
    return _join(entries, b"".join(pieces))


def _retype(weights: bytes, draw: Callable[..., Any]) -> bytes:
    header, data = _split(weights)
    header[draw(_tensor_names(header))]["dtype"] = draw(st.sampled_from(DTYPES))
    return _join(header, data)


def _reshape(weights: bytes, draw: Callable[..., Any]) -> bytes:
    header, data = _split(weights)
    entry = header[draw(_tensor_names(header))]
    count = functools.reduce(lambda a, b: a * b, entry["shape"], 1)
    fitting = st.sampled_from([[count], [1, count], [count, 1], list(reversed(entry["shape"])), [*entry["shape"], 1]])
    entry["shape"] = draw(fitting | st.lists(st.integers(-1, 2**64), max_size=3) | JSON)
    return _join(header, data)


def _move(weights: bytes, draw: Callable[..., Any]) -> bytes:
    header, data = _split(weights)
    near = st.integers(-(2**65), 2**65) | st.integers(0, len(data) + 8)
    header[draw(_tensor_names(header))]["data_offsets"] = draw(st.lists(near, min_size=1, max_size=3) | JSON)
    return _join(header, data)


def _edit_metadata(weights: bytes, draw: Callable[..., Any]) -> bytes:
    header, data = _split(weights)
    header["__metadata__"] = draw(st.dictionaries(st.text(max_size=6), st.text(max_size=6)) | JSON)
    return _join(header, data)


WEIGHT_EDITS: dict[str, Callable[..., bytes]] = {
    edit.__name__.removeprefix("_"): edit
    for edit in (
        _flip_in_data, _flip_in_header, _truncate, _extend, _overwrite, _rename, _drop, _alias, _say_twice, _swap,
        _reorder, _retype, _reshape, _move, _edit_metadata,
    )
}  # fmt: skip


# ---- what is done to the configuration ------------------------------------------------------------------------------

Path_ = tuple[str | int, ...]


def _leaves(value: Any, path: Path_ = ()) -> list[tuple[Path_, Any]]:
    """Every place in a JSON value, containers included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(path, value), *(leaf for key, each in items for leaf in _leaves(each, (*path, key)))]


def _put(config: dict[str, Any], path: Path_, value: Any) -> None:
    *parents, last = path
    functools.reduce(lambda inner, key: inner[key], parents, config)[last] = value


def _edit_config(config: bytes, draw: Callable[..., Any], wanted: Callable[[Path_, Any], bool], values: Any) -> bytes:
    data = json.loads(config)
    paths = [path for path, value in _leaves(data) if path and wanted(path, value)]
    _put(data, draw(st.sampled_from(paths)), draw(values))
    return json.dumps(data).encode()


def _edit_number(config: bytes, draw: Callable[..., Any]) -> bytes:
    """A number of the quantization's record."""

    def wanted(path: Path_, value: Any) -> bool:
        return path[0] == "quantization_config" and isinstance(value, int)

    return _edit_config(config, draw, wanted, NUMBERS)


def _edit_record(config: bytes, draw: Callable[..., Any]) -> bytes:
    """Anything in the quantization's record, except the source, which is for people and covered by no digest."""

    def wanted(path: Path_, value: Any) -> bool:
        return path[0] == "quantization_config" and path[-1] != "source"

    return _edit_config(config, draw, wanted, JSON)


def _edit_record_text(config: bytes, draw: Callable[..., Any]) -> bytes:
    """A flipped bit in the text of the record."""
    start, stop = config.index(b'"quantization_config"'), config.index(b'"source"')
    return _flip_at(config, draw(st.integers(8 * start, 8 * stop - 1)))


CONFIG_EDITS: dict[str, Callable[..., bytes]] = {
    edit.__name__.removeprefix("_"): edit for edit in (_edit_number, _edit_record, _edit_record_text)
}
EDITS = [*WEIGHT_EDITS, *CONFIG_EDITS]
CASES = [(edit, recipe) for edit in EDITS for recipe in RECIPES]
CASES += [(edit, recipe) for edit in CONFIG_EDITS for recipe in (VERSION_1, SHAPED, LOW_RANK)]
CASES += [(edit, SPARSE) for edit in EDITS]
# What is done to tensors does not ask what they mean: one recipe less, where time is short.
SHORT_CASES = [(edit, recipe) for edit, recipe in CASES if recipe != "emulated" or edit in CONFIG_EDITS]


# ---- tests ----------------------------------------------------------------------------------------------------------


def _deterministic(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Any:
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # such tensors cost more to share out than to compute with
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def _spoil(recipe: str, edit: str, draw: Callable[..., Any]) -> Files:
    config, weights = _original(recipe)
    if edit in WEIGHT_EDITS:
        return config, WEIGHT_EDITS[edit](weights, draw)
    return CONFIG_EDITS[edit](config, draw), weights


def _fuzz(recipe: str, edit: str, examples: int) -> int:
    """How many of the spoiled checkpoints were refused."""
    refused = 0

    @_deterministic(examples)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal refused
        files = _spoil(recipe, edit, data.draw)
        loads = _judge(recipe, files)
        refused += not loads
        if edit in ("flip_in_data", "truncate", "extend", "drop", "alias"):
            assert not loads  # these cannot be without effect

    run()
    return refused


@pytest.mark.parametrize(("edit", "recipe"), SHORT_CASES)
def test_a_spoiled_checkpoint_is_refused_or_the_same(edit: str, recipe: str) -> None:
    refused = _fuzz(recipe, edit, examples=12)
    assert (refused == 0) == (edit == "reorder")


@pytest.mark.slow
@pytest.mark.parametrize(("edit", "recipe"), CASES)
def test_a_spoiled_checkpoint_is_refused_or_the_same_at_length(edit: str, recipe: str) -> None:
    _fuzz(recipe, edit, examples=75)


def _forge(recipe: str, draw: Callable[..., Any]) -> Files:
    """Other bytes in one tensor, or other values in the record, with a digest that is right."""
    config_bytes, weights = _original(recipe)
    config = json.loads(config_bytes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(weights)
        state = {name: tensor.clone() for name, tensor in load_file(file).items()}
        quantized = sorted(name for name, tensor in state.items() if tensor.numel() and name.split(".")[-1] != "bias")
        name = draw(st.sampled_from(quantized))
        raw = state[name].view(-1).view(torch.uint8)
        for _ in range(draw(st.integers(1, 3))):
            raw[draw(st.integers(0, raw.numel() - 1))] = draw(st.integers(0, 255))
        save_file(state, file, {"format": "pt"})
        record = signed(Record.parse(config["quantization_config"]), state)
        config["quantization_config"] = record.to_dict()
        return json.dumps(config).encode(), file.read_bytes()


def _fuzz_forged(recipe: str, examples: int) -> None:
    refusals: list[CheckpointError] = []

    @_deterministic(examples)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        files = _forge(recipe, data.draw)
        try:
            model = _load(files)
        except CheckpointError as error:
            refusals.append(error)
        else:
            assert _output(model).shape == _expected(recipe)[1].shape

    run()
    assert refusals
    assert all(error.tensor != "quantization_config.digest" for error in refusals)


@pytest.mark.parametrize("recipe", [*RECIPES, VERSION_1, SPARSE])
def test_a_forged_checkpoint_is_refused_or_runs(recipe: str) -> None:
    _fuzz_forged(recipe, examples=20 if recipe == "emulated" else 40)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES, VERSION_1, SPARSE])
def test_a_forged_checkpoint_is_refused_or_runs_at_length(recipe: str) -> None:
    _fuzz_forged(recipe, examples=250)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_spoiled_model_configuration_raises_nothing_else_at_length(recipe: str) -> None:
    """The rest of the configuration is the user's to edit: another answer is allowed, another exception is not."""

    def wanted(path: Path_, value: Any) -> bool:
        return path[0] != "quantization_config"

    @_deterministic(120)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        config, weights = _original(recipe)
        try:
            _load((_edit_config(config, data.draw, wanted, JSON), weights))
        except CheckpointError as error:
            note(str(error))

    run()


@pytest.mark.parametrize("recipe", [SHAPED, LOW_RANK])
def test_a_forged_plan_of_shapes_is_refused_or_runs(recipe: str) -> None:
    """Any value in the plan, with a digest that is right."""
    refused = 0

    def wanted(path: Path_, value: Any) -> bool:
        return path[:2] == ("quantization_config", "shapes")

    @_deterministic(60)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        nonlocal refused
        config, weights = _original(recipe)
        edited = json.loads(_edit_config(config, data.draw, wanted, NUMBERS | JSON))
        try:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "model.safetensors").write_bytes(weights)
                state = load_file(Path(folder) / "model.safetensors")
            edited["quantization_config"] = signed(Record.parse(edited["quantization_config"]), state).to_dict()
            model = _load((json.dumps(edited).encode(), weights))
        except CheckpointError as error:
            note(str(error))
            refused += 1
        else:
            assert _output(model).shape == _expected(recipe)[1].shape

    run()
    assert refused


def test_the_originals_load() -> None:
    for recipe in (*RECIPES, VERSION_1, SHAPED, LOW_RANK, SPARSE):
        assert _judge(recipe, _original(recipe))
