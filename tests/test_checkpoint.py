"""Checkpoints: what is saved comes back to the bit, and what breaks a rule is refused by name."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
)

import qbert
from qbert import CheckpointError, QBertConfig, QBertError, Recipe, quantize_
from qbert.checkpoint import Record, digest, read_config, signed, weight_files
from qbert.encoder import fused_forward
from qbert.formats import Role, scheme_names
from qbert.integrations.transformers import check
from qbert.metrics import sqnr_db
from qbert.modules import GUARD, QEmbedding, QLinear, QTiedLinear, QuantizedModule, collect_specs
from qbert.target import cpu_target
from qbert.testing import random_weight

HIDDEN = 128  # a multiple of every group size
LAYER = "encoder.layer.0"
QUERY, KEY, VALUE = (f"{LAYER}.attention.self.{name}" for name in ("query", "key", "value"))
OUTPUT, UP, DOWN = f"{LAYER}.attention.output.dense", f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"
WORDS, POSITIONS, TYPES = (f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type"))
# One module of each kind of weight.
MIXED = Recipe(
    "gobo3", "gobo4",
    overrides={
        "query": "w4a8", "key": "w8a8", "value": "gobo3a8", "attention.output": "w4a16", "intermediate": "w8a16",
        "position_embeddings": "w4", "token_type_embeddings": "w8",
    },
)  # fmt: skip
IDS = torch.tensor([[5, 17, 96, 33, 8, 2, 60], [7, 7, 9, 80, 12, 0, 0]])
State = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Any:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def _float_model(name: str = "BertModel", *, hidden: int = HIDDEN, seed: int = 0, **arguments: Any) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=97, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2 * hidden,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config, **arguments).eval()
    with torch.no_grad():
        for index, module in enumerate(model.modules()):  # weights with outliers, and biases that are not all zero
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.copy_(random_weight(*module.weight.shape, seed=seed + index))
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(std=0.1)
    return model


def _quantized(recipe: Recipe | str = MIXED, name: str = "BertModel", **arguments: Any) -> PreTrainedModel:
    return quantize_(_float_model(name, **arguments), recipe)


@torch.no_grad()
def _outputs(model: nn.Module) -> list[Tensor]:
    return [output for output in model(IDS).to_tuple() if isinstance(output, Tensor)]


def _assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    state, wanted = found.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert collect_specs(found) == collect_specs(expected)
    assert type(found) is type(expected)
    for output, exact in zip(_outputs(found), _outputs(expected), strict=True):
        assert torch.equal(output, exact)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one module of each kind of weight."""
    folder = tmp_path_factory.mktemp("saved") / "mixed"
    qbert.save(_quantized(), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    shutil.copytree(saved, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


# ---- what is saved comes back ---------------------------------------------------------------------------------------

LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    "load": lambda folder: qbert.load(folder),
    "auto_model": lambda folder: AutoModel.from_pretrained(folder),
}
SAVERS: dict[str, Callable[[PreTrainedModel, Path], None]] = {
    "save": lambda model, folder: qbert.save(model, folder),
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_round_trip(save: Callable[..., None], load: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = _quantized()
    _outputs(model)  # a call must not change what is saved
    save(model, tmp_path / "first")
    again = load(tmp_path / "first")
    _assert_same_model(again, model)
    assert again.training is False
    save(again, tmp_path / "second")
    _assert_same_model(load(tmp_path / "second"), model)


@pytest.mark.parametrize("scheme", scheme_names(Role.LINEAR))
def test_round_trip_of_every_linear_scheme(scheme: str, tmp_path: Path) -> None:
    model = _quantized(scheme)
    model.save_pretrained(tmp_path)
    loaded = qbert.load(tmp_path)
    _assert_same_model(loaded, model)
    layouts = {name: module.layout for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    assert {name: m.layout for name, m in loaded.named_modules() if isinstance(m, QuantizedModule)} == layouts


@pytest.mark.parametrize("scheme", scheme_names(Role.EMBEDDING))
def test_round_trip_of_every_embedding_scheme(scheme: str, tmp_path: Path) -> None:
    model = _quantized(Recipe(None, scheme))
    model.save_pretrained(tmp_path)
    _assert_same_model(qbert.load(tmp_path), model)


@pytest.mark.parametrize(
    "name",
    [
        "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification", "BertForTokenClassification",
        "BertForQuestionAnswering", "BertForNextSentencePrediction",
    ],
)  # fmt: skip
def test_round_trip_of_heads(name: str, tmp_path: Path) -> None:
    model = _quantized(Recipe("w4a8", "w8"), name)
    qbert.save(model, tmp_path / "checkpoint")
    _assert_same_model(qbert.load(tmp_path / "checkpoint"), model)


@pytest.mark.parametrize(
    ("config_class", "sizes"),
    [
        ("RobertaConfig", {}), ("MPNetConfig", {}), ("ElectraConfig", {"embedding_size": 32}), ("DistilBertConfig", {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("task", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_round_trip_of_families(config_class: str, sizes: dict[str, int], task: str, tmp_path: Path) -> None:
    family = config_class.removesuffix("Config")
    config = getattr(transformers, config_class)(
        vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=20, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = quantize_(getattr(transformers, family + task)(config).eval(), Recipe("gobo4", "w8"))
    qbert.save(model, tmp_path / "checkpoint")
    _assert_same_model(qbert.load(tmp_path / "checkpoint"), model)


@pytest.mark.parametrize("pooler", [True, False], ids=["pooler", "no_pooler"])
def test_an_encoder_comes_back_with_or_without_its_pooler(pooler: bool, tmp_path: Path) -> None:
    model = _quantized("w8a8+none", add_pooling_layer=pooler)
    qbert.save(model, tmp_path / "checkpoint")
    loaded = qbert.load(tmp_path / "checkpoint")
    _assert_same_model(loaded, model)
    assert (loaded.pooler is not None) == pooler
    bare = AutoModel.from_pretrained(tmp_path / "checkpoint", add_pooling_layer=False)
    assert bare.pooler is None
    assert torch.equal(_outputs(bare)[0], _outputs(model)[0])


def test_quantizing_on_load_equals_quantizing_in_memory(tmp_path: Path) -> None:
    _float_model().save_pretrained(tmp_path / "float")
    config = QBertConfig(**MIXED.to_dict())
    model = AutoModel.from_pretrained(tmp_path / "float", quantization_config=config)
    _assert_same_model(model, _quantized())
    model.save_pretrained(tmp_path / "quantized")
    _assert_same_model(qbert.load(tmp_path / "quantized"), model)


def test_a_checkpoints_own_recipe_wins_over_the_arguments(saved: Path) -> None:
    with pytest.warns(UserWarning, match="quantization_config"):
        model = AutoModel.from_pretrained(saved, quantization_config=QBertConfig("w8a8"))
    assert model.get_submodule(QUERY).scheme.name == "w4a8"


def test_configs_refuse_what_recipes_refuse() -> None:
    for arguments in (
        {"linear": "w9"},
        {"exclude": "pooler"},
        {"keep_float": "cls"},
        {"bits": 8},
        {"overrides": {"x": "w9"}},
    ):
        with pytest.raises(QBertError):
            QBertConfig(**arguments)


def test_shards(saved: Path, tmp_path: Path) -> None:
    model = qbert.load(saved)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(weight_files(tmp_path)) > 2
    _assert_same_model(qbert.load(tmp_path), model)
    _assert_same_model(AutoModel.from_pretrained(tmp_path), model)


def test_weights_left_from_an_older_save_are_noticed(saved: Path, tmp_path: Path) -> None:
    """transformers leaves an old model.safetensors beside new shards, and prefers it when loading."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved, folder)
    other = _quantized(seed=50)
    other.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(CheckpointError):
        qbert.load(folder)
    qbert.save(other, folder)  # replaces the whole folder
    _assert_same_model(qbert.load(folder), other)


# ---- from one class to another --------------------------------------------------------------------------------------


def _hidden(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.base_model(IDS).last_hidden_state


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("BertForMaskedLM", AutoModel),
        ("BertForMaskedLM", AutoModelForSequenceClassification),
        ("BertForSequenceClassification", AutoModel),
        ("BertForSequenceClassification", AutoModelForMaskedLM),
        ("BertModel", AutoModelForSequenceClassification),
        ("BertModel", AutoModelForMaskedLM),  # which has no pooler
    ],
    ids=lambda each: each if isinstance(each, str) else each.__name__,
)
def test_the_encoder_survives_a_change_of_class(source: str, target: Any, tmp_path: Path) -> None:
    model = _quantized(Recipe("gobo3a8", "w8"), source)
    model.save_pretrained(tmp_path / "first")
    converted = target.from_pretrained(tmp_path / "first").eval()
    assert torch.equal(_hidden(converted), _hidden(model))
    encoder = f"{model.base_model_prefix}."
    specs = {name.removeprefix(encoder): spec for name, spec in collect_specs(model.base_model).items()}
    found = {name.removeprefix(encoder): spec for name, spec in collect_specs(converted.base_model).items()}
    shared = specs.keys() & found.keys()
    assert {name: specs[name] for name in shared} == {name: found[name] for name in shared}
    assert {name for name in specs.keys() ^ found.keys() if not name.startswith("pooler")} == set()
    converted.save_pretrained(tmp_path / "second")
    _assert_same_model(qbert.load(tmp_path / "second"), converted)


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    model = _quantized(Recipe("w8a8", "w8"), "BertForMaskedLM")
    qbert.save(model, tmp_path / "checkpoint")
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert {name for name in stored if name.startswith("cls.predictions.decoder")} <= {"cls.predictions.decoder.bias"}
    tables = [name for name, tensor in stored.items() if tensor.dim() == 2 and tensor.shape[0] == 97]
    assert tables == ["bert.embeddings.word_embeddings.qdata"]
    loaded = qbert.load(tmp_path / "checkpoint")
    assert loaded.cls.predictions.decoder.owner is loaded.bert.embeddings.word_embeddings
    _assert_same_model(loaded, model)


def test_a_float_tied_head_stays_tied(tmp_path: Path) -> None:
    model = _quantized("w8a8+none", "BertForMaskedLM")
    qbert.save(model, tmp_path / "checkpoint")
    loaded = qbert.load(tmp_path / "checkpoint")
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert "cls.predictions.decoder.weight" not in load_file(tmp_path / "checkpoint" / "model.safetensors")


def test_copies_and_dequantized_models_can_be_saved(saved: Path, tmp_path: Path) -> None:
    model = qbert.load(saved)
    qbert.save(copy.deepcopy(model), tmp_path / "copy")
    _assert_same_model(qbert.load(tmp_path / "copy"), model)
    qbert.dequantize_(model)
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    again = AutoModel.from_pretrained(tmp_path / "float")
    assert not any(isinstance(module, QLinear | QEmbedding | QTiedLinear) for module in again.modules())
    for found, expected in zip(_outputs(again), _outputs(model), strict=True):
        assert torch.equal(found, expected)
    assert type(qbert.load(saved).dequantize()) is type(model)


# ---- data types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loading_in_half_precision_keeps_scales(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, exact = qbert.load(saved, dtype=dtype), qbert.load(saved)
    quantized = {f"{name}.{tensor}" for name, module in exact.named_modules() if isinstance(module, QuantizedModule)
                 for tensor in (*module.quantized.tensors, GUARD)}  # fmt: skip
    state = model.state_dict()
    for name, tensor in exact.state_dict().items():
        expected = tensor if name in quantized or not tensor.is_floating_point() else tensor.to(dtype)
        assert state[name].dtype == expected.dtype, name
        assert torch.equal(state[name], expected), name
    assert model.dtype == model.get_submodule(WORDS)(IDS).dtype == _outputs(model)[0].dtype == dtype
    moved = qbert.load(saved).to(dtype)
    for found, expected in zip(_outputs(model), _outputs(moved), strict=True):
        assert torch.equal(found, expected)
    model.save_pretrained(tmp_path)
    _assert_same_model(qbert.load(tmp_path), model)
    assert qbert.load(tmp_path, dtype=torch.float32).dtype == torch.float32


# ---- files ----------------------------------------------------------------------------------------------------------


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_model_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    expected = _bytes(saved)
    qbert.save(_quantized(), tmp_path / "again")
    assert _bytes(tmp_path / "again") == expected
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = _quantized()
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(tmp_path / "pretrained")
    assert _bytes(tmp_path / "pretrained") == expected
    qbert.save(qbert.load(saved), tmp_path / "resaved")
    resaved = _bytes(tmp_path / "resaved")
    assert resaved["model.safetensors"] == expected["model.safetensors"]
    records = [json.loads(files["config.json"])["quantization_config"] for files in (resaved, expected)]
    assert records[0] == records[1]


def test_a_file_holds_what_the_report_says_and_little_more(saved: Path) -> None:
    model = qbert.load(saved)
    stored = sum(row.stored_bytes for row in qbert.explain(model).quantized)
    floats = sum(parameter.nbytes for parameter in model.parameters())
    data = (saved / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - header == stored + floats
    assert json.loads(data[8:header])["__metadata__"] == {"format": "pt"}


def test_the_record_says_what_stands_there(saved: Path) -> None:
    record, config = check(saved)
    assert record.recipe.to_dict() == MIXED.to_dict()
    assert list(record.recipe.overrides) == list(MIXED.overrides)  # their order decides
    assert record.modules == collect_specs(qbert.load(saved))
    assert record.modules[VALUE].outliers > 0
    assert config.architectures == ["BertModel"]
    assert read_config(saved)["quantization_config"]["format_version"] == 1
    assert set(record.to_dict()) == {
        "digest", "embedding", "exclude", "format_version", "keep_float", "linear", "modules", "overrides", "quant_method",
        "source",
    }  # fmt: skip


def test_the_source_is_kept(tmp_path: Path) -> None:
    model = _quantized("w8a8+none")
    qbert.save(model, tmp_path / "checkpoint", source="someone/model")
    assert check(tmp_path / "checkpoint")[0].source == "someone/model"
    qbert.load(tmp_path / "checkpoint").save_pretrained(tmp_path / "again")
    assert check(tmp_path / "again")[0].source == "someone/model"


# ---- saving is whole or not at all ----------------------------------------------------------------------------------


class _DiskFull(OSError):
    pass


def _fails_halfway(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.save_pretrained

    def save_pretrained(folder: Path) -> None:
        whole(folder)
        os.truncate(Path(folder) / "model.safetensors", 1000)
        raise _DiskFull

    monkeypatch.setattr(model, "save_pretrained", save_pretrained)


def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _quantized("w8a8+none")
    _fails_halfway(model, monkeypatch)
    with pytest.raises(_DiskFull):
        qbert.save(model, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_the_old_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, model = _bytes(folder), _quantized("w8a8+none")
    _fails_halfway(model, monkeypatch)
    with pytest.raises(_DiskFull):
        qbert.save(model, folder)
    assert _bytes(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("step", [1, 2], ids=["setting_aside", "moving_in"])
def test_a_failing_move_leaves_the_old_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    before, model, calls = _bytes(folder), _quantized("w8a8+none"), []
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == step:
            raise _DiskFull
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(_DiskFull):
        qbert.save(model, folder)
    assert _bytes(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_checkpoint_is_replaced_as_a_whole(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    model = _quantized("w8a8+none", seed=3)
    qbert.save(model, folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert list(folder.parent.iterdir()) == [folder]
    _assert_same_model(qbert.load(folder), model)


def test_a_link_to_a_checkpoint_keeps_pointing_at_it(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    model = _quantized("w8a8+none", seed=3)
    qbert.save(model, link)
    assert link.is_symlink()
    _assert_same_model(qbert.load(folder), model)


def test_new_parents_and_empty_folders_are_fine(tmp_path: Path) -> None:
    model = _quantized("w8a8+none")
    qbert.save(model, tmp_path / "a" / "b" / "c")
    (tmp_path / "empty").mkdir()
    qbert.save(model, str(tmp_path / "empty"))
    _assert_same_model(qbert.load(str(tmp_path / "empty")), model)


def _foreign_folders(tmp_path: Path) -> list[Path]:
    file, notes, float_model, other = (tmp_path / name for name in ("file", "notes", "float", "other"))
    file.write_text("mine")
    for folder in (notes, float_model, other):
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    (float_model / "config.json").write_text('{"model_type": "bert"}')
    (other / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    return [file, notes, float_model, other]


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    model = _quantized("w8a8+none")
    for target in _foreign_folders(tmp_path):
        with pytest.raises(QBertError, match=r"is a file|is not empty and holds no qbert checkpoint"):
            qbert.save(model, target)
    assert (tmp_path / "file").read_text() == "mine"
    assert all((tmp_path / name / "notes.txt").read_text() == "mine" for name in ("notes", "float", "other"))
    assert len(list(tmp_path.iterdir())) == 4


def test_only_quantized_transformers_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(QBertError, match="BertModel is not quantized by qbert"):
        qbert.save(_float_model(), tmp_path / "checkpoint")
    with pytest.raises(QBertError, match="Sequential is not a transformers model"):
        qbert.save(quantize_(nn.Sequential(nn.Linear(8, 8)), "w8a8+none"), tmp_path / "checkpoint")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# ---- rules: tensors -------------------------------------------------------------------------------------------------


def _edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def _edit_tensors(folder: Path, edit: Callable[[State], object], *, sign: bool = True) -> None:
    """Edits a checkpoint's tensors; with `sign` as an attacker would, who computes the digest too."""
    file = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is about to be overwritten
    edit(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, {"format": "pt"})
    if sign:
        _sign(folder)


def _sign(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    record = Record.parse(read_config(folder)["quantization_config"])
    _edit_config(folder, lambda config: config["quantization_config"].update(digest=signed(record, state).digest))


def _put(name: str, position: int, value: float) -> Callable[[State], None]:
    def edit(state: State) -> None:
        state[name].view(-1)[position] = value

    return edit


def _change(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    def edit(state: State) -> None:
        state[name] = change(state[name])

    return edit


def _repeat_column(state: State) -> None:
    rowptr, columns = state[f"{DOWN}.outlier_rowptr"], state[f"{DOWN}.outlier_col"]
    row = int((rowptr.diff() >= 2).nonzero()[0])
    columns[rowptr[row] + 1] = columns[rowptr[row]]


def _swap_columns(state: State) -> None:
    rowptr, columns = state[f"{DOWN}.outlier_rowptr"], state[f"{DOWN}.outlier_col"]
    start = int(rowptr[int((rowptr.diff() >= 2).nonzero()[0])])
    columns[start : start + 2] = columns[start : start + 2].flip(0)


def _lower_pointer(state: State) -> None:
    rowptr = state[f"{DOWN}.outlier_rowptr"]
    row = int((rowptr.diff() >= 2).nonzero()[0])
    rowptr[row + 1] = rowptr[row] - 1


def _share_centroid(state: State) -> None:
    codebook = state[f"{VALUE}.codebook"]
    codebook[1] = codebook[0]  # so code 1 names what code 0 names already


# (what is edited, the tensor that must be named, the rule that must be named)
TENSOR_RULES: dict[str, tuple[Callable[[State], object], str, str]] = {
    "tensor_missing": (lambda s: s.pop(f"{KEY}.scale"), f"{KEY}.scale", "must be there"),
    "guard_missing": (lambda s: s.pop(f"{KEY}.{GUARD}"), f"{KEY}.{GUARD}", "must be there"),
    "guard_filled": (_change(f"{KEY}.{GUARD}", lambda t: t.new_zeros(3)), f"{KEY}.{GUARD}", "shape must be [0]"),
    "guard_float": (_change(f"{KEY}.{GUARD}", lambda t: t.float()), f"{KEY}.{GUARD}", "data type must be uint8"),
    "tensor_too_many": (lambda s: s.update({f"{KEY}.codebook": torch.zeros(8)}), f"{KEY}.codebook", "no such tensor"),
    "stranger": (lambda s: s.update(stranger=torch.zeros(1)), "stranger", "no such tensor"),
    "tied_twice": (lambda s: s.update({"cls.bias": torch.zeros(97)}), "cls.bias", "no such tensor"),
    # int8 codes with a scale per row
    "w8_codes_type": (_change(f"{KEY}.qdata", lambda t: t.view(torch.uint8)), f"{KEY}.qdata", "data type must be int8"),
    "w8_codes_float": (_change(f"{KEY}.qdata", lambda t: t.float()), f"{KEY}.qdata", "data type must be int8"),
    "w8_codes_shape": (_change(f"{KEY}.qdata", lambda t: t[:-1]), f"{KEY}.qdata", "shape must be [128, 128]"),
    "w8_codes_flat": (_change(f"{KEY}.qdata", torch.flatten), f"{KEY}.qdata", "shape must be [128, 128]"),
    "w8_code_-128": (_put(f"{KEY}.qdata", 77, -128), f"{KEY}.qdata", "codes must be -127 ... 127"),
    "w8_scale_one": (_change(f"{KEY}.scale", lambda t: t[:1]), f"{KEY}.scale", "shape must be [128]"),
    "w8_scale_column": (_change(f"{KEY}.scale", lambda t: t[:, None]), f"{KEY}.scale", "shape must be [128]"),
    "w8_scale_type": (_change(f"{KEY}.scale", lambda t: t.bfloat16()), f"{KEY}.scale", "data type must be float32"),
    "w8_scale_nan": (_put(f"{KEY}.scale", 5, torch.nan), f"{KEY}.scale", "finite and positive"),
    "w8_scale_inf": (_put(f"{KEY}.scale", 5, torch.inf), f"{KEY}.scale", "finite and positive"),
    "w8_scale_zero": (_put(f"{KEY}.scale", 5, 0.0), f"{KEY}.scale", "finite and positive"),
    "w8_scale_negative": (_put(f"{KEY}.scale", 5, -1.0), f"{KEY}.scale", "finite and positive"),
    "w8_table_code": (_put(f"{TYPES}.qdata", 9, -128), f"{TYPES}.qdata", "codes must be -127 ... 127"),
    "w8_table_scale": (_put(f"{TYPES}.scale", 1, torch.nan), f"{TYPES}.scale", "finite and positive"),
    # int4 codes, integer group scales inside a row scale
    "w4a8_code_-8": (_put(f"{QUERY}.qdata", 7, 0x81), f"{QUERY}.qdata", "codes must be -7 ... 7"),
    "w4a8_group_scale_0": (_put(f"{QUERY}.group_scale", 3, 0), f"{QUERY}.group_scale", "must be 1 ... 18"),
    "w4a8_group_scale_19": (_put(f"{QUERY}.group_scale", 3, 19), f"{QUERY}.group_scale", "must be 1 ... 18"),
    "w4a8_group_scale_type": (_change(f"{QUERY}.group_scale", lambda t: t.char()), f"{QUERY}.group_scale", "uint8"),
    "w4a8_scale": (_put(f"{QUERY}.scale", 127, -torch.inf), f"{QUERY}.scale", "finite and positive"),
    "w4a8_width": (_change(f"{QUERY}.qdata", lambda t: t[:, :-1]), f"{QUERY}.qdata", "shape must be [128, 64]"),
    # int4 codes with a float scale per group
    "w4a16_scale_nan": (_put(f"{OUTPUT}.scale", 0, torch.nan), f"{OUTPUT}.scale", "finite and positive"),
    "w4a16_scale_type": (_change(f"{OUTPUT}.scale", lambda t: t.float()), f"{OUTPUT}.scale", "must be bfloat16"),
    "w4a16_groups": (_change(f"{OUTPUT}.scale", lambda t: t[:, :1]), f"{OUTPUT}.scale", "shape must be [128, 2]"),
    "w4_table_code": (_put(f"{POSITIONS}.qdata", 0, 0x18), f"{POSITIONS}.qdata", "codes must be -7 ... 7"),
    # dictionaries
    "codebook_nan": (_put(f"{DOWN}.codebook", 7, torch.nan), f"{DOWN}.codebook", "every value must be finite"),
    "codebook_order": (_change(f"{DOWN}.codebook", lambda t: t.flip(0)), f"{DOWN}.codebook", "values must ascend"),
    "codebook_length": (_change(f"{DOWN}.codebook", lambda t: t[:4]), f"{DOWN}.codebook", "shape must be [8]"),
    "codebook_double": (_change(f"{DOWN}.codebook", lambda t: t.double()), f"{DOWN}.codebook", "must be float32"),
    "table_codebook": (_put(f"{WORDS}.codebook", 0, -torch.inf), f"{WORDS}.codebook", "every value must be finite"),
    "dictionary_width": (_change(f"{DOWN}.qdata", lambda t: t[:, 1:]), f"{DOWN}.qdata", "shape must be [128, 96]"),
    "int8_codebook_-128": (_put(f"{VALUE}.codebook", 0, -128), f"{VALUE}.codebook", "values must be -127 ... 127"),
    "int8_codebook_scale": (_put(f"{VALUE}.scale", 0, 0.0), f"{VALUE}.scale", "finite and positive"),
    "int8_codebook_shared": (_share_centroid, f"{VALUE}.qdata", "a code must be the lowest of those with its centroid"),
    # outliers
    "rowptr_start": (_put(f"{DOWN}.outlier_rowptr", 0, 1), f"{DOWN}.outlier_rowptr", "must start at 0"),
    "rowptr_negative": (_put(f"{DOWN}.outlier_rowptr", 0, -1), f"{DOWN}.outlier_rowptr", "must start at 0"),
    "rowptr_end": (_put(f"{DOWN}.outlier_rowptr", -1, 2**31 - 1), f"{DOWN}.outlier_rowptr", "must end at"),
    "rowptr_falls": (_lower_pointer, f"{DOWN}.outlier_rowptr", "must not decrease"),
    "rowptr_type": (_change(f"{DOWN}.outlier_rowptr", lambda t: t.long()), f"{DOWN}.outlier_rowptr", "must be int32"),
    "rowptr_length": (_change(f"{DOWN}.outlier_rowptr", lambda t: t[1:]), f"{DOWN}.outlier_rowptr", "must be [129]"),
    "column_beyond": (_put(f"{DOWN}.outlier_col", 4, 2 * HIDDEN), f"{DOWN}.outlier_col", "must be 0 ... 255"),
    "column_negative": (_put(f"{DOWN}.outlier_col", 4, -1), f"{DOWN}.outlier_col", "must be 0 ... 255"),
    "column_twice": (_repeat_column, f"{DOWN}.outlier_col", "must ascend within a row"),
    "column_order": (_swap_columns, f"{DOWN}.outlier_col", "must ascend within a row"),
    "column_type": (_change(f"{DOWN}.outlier_col", lambda t: t.int()), f"{DOWN}.outlier_col", "must be int16"),
    "column_count": (_change(f"{DOWN}.outlier_col", lambda t: t[:-1]), f"{DOWN}.outlier_col", "shape must be"),
    "delta_nan": (_put(f"{DOWN}.outlier_delta", 2, torch.nan), f"{DOWN}.outlier_delta", "every value must be finite"),
    "delta_inf": (_put(f"{VALUE}.outlier_delta", 2, torch.inf), f"{VALUE}.outlier_delta", "every value must be finite"),
    "delta_count": (_change(f"{DOWN}.outlier_delta", lambda t: t[:-1]), f"{DOWN}.outlier_delta", "shape must be"),
    "table_column": (_put(f"{WORDS}.outlier_col", 0, HIDDEN), f"{WORDS}.outlier_col", "must be 0 ... 127"),
    # what is not quantized
    "norm_nan": (_put("embeddings.LayerNorm.weight", 3, torch.nan), "embeddings.LayerNorm.weight", "must be finite"),
    "bias_inf": (_put(f"{KEY}.bias", 3, torch.inf), f"{KEY}.bias", "must be finite"),
    "bias_shape": (_change(f"{KEY}.bias", lambda t: t[:1]), f"{KEY}.bias", "shape must be [128]"),
    "bias_integer": (_change(f"{KEY}.bias", lambda t: t.int()), f"{KEY}.bias", "data type must be float32"),
    "bias_double": (_change(f"{KEY}.bias", lambda t: t.double()), f"{KEY}.bias", "data type must be float32"),
    "bias_missing": (lambda s: s.pop(f"{KEY}.bias"), f"{KEY}.bias", "must be there"),
}  # fmt: skip


@pytest.mark.parametrize("rule", TENSOR_RULES)
def test_a_broken_rule_is_refused_by_name(folder: Path, rule: str) -> None:
    edit, tensor, words = TENSOR_RULES[rule]
    _edit_tensors(folder, edit)
    for load in LOADERS.values():
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert caught.value.tensor == tensor
        assert words in caught.value.rule
        assert str(caught.value) == f"checkpoint: {tensor}: {caught.value.rule}, got {caught.value.value}"


def test_the_rules_above_start_from_a_good_checkpoint(folder: Path, saved: Path) -> None:
    _edit_tensors(folder, lambda state: None)
    _assert_same_model(qbert.load(folder), qbert.load(saved))


@pytest.mark.parametrize("scheme", ["gobo3", "gobo3a8"])
def test_spare_bits_must_be_zero(scheme: str, tmp_path: Path) -> None:
    """A row of 36 three-bit codes ends in the middle of a byte."""
    model = _quantized(scheme, hidden=36)
    model.save_pretrained(tmp_path)
    name = f"{KEY}.qdata"
    _edit_tensors(tmp_path, lambda state: state[name][2].__setitem__(-1, int(state[name][2, -1]) | 0x80))
    with pytest.raises(CheckpointError) as caught:
        qbert.load(tmp_path)
    assert (caught.value.tensor, caught.value.rule) == (name, "the 4 spare bits of a row must be 0")


# ---- rules: the digest ----------------------------------------------------------------------------------------------


def _swap(first: str, second: str) -> Callable[[State], None]:
    def edit(state: State) -> None:
        state[first], state[second] = state[second], state[first]

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        _put(f"{KEY}.bias", 0, 0.25),
        _put(f"{KEY}.qdata", 0, 1),
        _put("embeddings.LayerNorm.weight", 0, -1.0),
        _swap(f"{KEY}.bias", f"{QUERY}.bias"),
        _swap("embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"),
        _change(f"{KEY}.bias", lambda tensor: tensor.bfloat16()),
        _change(f"{KEY}.bias", lambda tensor: tensor.neg()),
    ],
    ids=["bias", "code", "norm", "swapped_biases", "swapped_norm", "rounded", "negated"],
)
def test_changes_that_break_no_rule_break_the_digest(folder: Path, edit: Callable[[State], object]) -> None:
    _edit_tensors(folder, lambda state: state[f"{KEY}.qdata"].view(-1)[:1].fill_(0))
    _edit_tensors(folder, edit, sign=False)
    for load in LOADERS.values():
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert caught.value.tensor == "quantization_config.digest"
    _sign(folder)
    qbert.load(folder)


def test_a_checkpoint_without_a_digest_is_refused(folder: Path) -> None:
    for value in (None, "", "0" * 64):
        _edit_config(folder, lambda config, value=value: config["quantization_config"].update(digest=value))
        for load in LOADERS.values():
            with pytest.raises(CheckpointError, match=r"quantization_config\.digest"):
                load(folder)


def test_the_digest_tells_names_types_shapes_and_records_apart() -> None:
    record = Record.of(_quantized("w8a8+none"), Recipe())
    tensor = torch.arange(6, dtype=torch.int32)
    digests = {
        digest(tensors.items(), each)
        for each in (record, record.model_copy(update={"exclude": ["x"]}))
        for tensors in (
            {"a": tensor}, {"b": tensor}, {"a": tensor.view(2, 3)}, {"a": tensor.view(torch.float32)},
            {"a": tensor.flip(0)}, {"a": tensor[:3], "b": tensor[3:]}, {"a": tensor[:2], "b": tensor[2:]}, {},
        )
    }  # fmt: skip
    assert len(digests) == 16
    same = record.model_copy(update={"source": "elsewhere", "digest": "0"})
    assert digest({"a": tensor, "b": tensor}.items(), record) == digest({"b": tensor, "a": tensor}.items(), same)


# ---- rules: the configuration ---------------------------------------------------------------------------------------


def _set(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(entries)


def _record(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"].update(entries)


def _module(name: str, **entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"]["modules"][name].update(entries)


def _drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].pop(key)


GHOST = {"kind": "linear", "scheme": "w8a8", "shape": [4, 4]}
RECORD_RULES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version_4": (_record(format_version=4), "format_version 4 is of emulated models"),
    "version_5": (_record(format_version=5), "format_version 5 is of linears of low rank and of zeros left out"),
    "version_6": (_record(format_version=6), "quantization_config.format_version"),
    "version_0": (_record(format_version=0), "quantization_config.format_version"),
    "version_of_calibrated": (_record(format_version=2), "quantization_config.digest"),
    "version_text": (_record(format_version="1"), "quantization_config.format_version"),
    "version_missing": (_drop("format_version"), "quantization_config.format_version"),
    "unknown_key": (_record(bits=8), "bits"),
    "linear_missing": (_drop("linear"), ""),
    "linear_unknown": (_record(linear="w9a9"), "unknown scheme 'w9a9'"),
    "linear_number": (_record(linear=8), ""),
    "embedding_of_linears": (_record(embedding="w8a8"), "not for embeddings: 'w8a8'"),
    "override_unknown": (_record(overrides=[["query", "w9"]]), "override 'query': unknown scheme 'w9'"),
    "override_role": (_record(overrides=[["LayerNorm", "w8a8"], ["pooler", "w8"]]), ""),
    "overrides_mapped": (_record(overrides={"query": "w8a8"}), "quantization_config.overrides"),
    "override_triple": (_record(overrides=[["query", "w8a8", 1]]), "quantization_config.overrides.0"),
    "override_number": (_record(overrides=[["query", 8]]), "quantization_config.overrides.0"),
    "exclude_text": (_record(exclude="pooler"), ""),
    "modules_missing": (_drop("modules"), "quantization_config.modules"),
    "modules_empty": (_record(modules={}), "quantization_config.modules"),
    "modules_list": (_record(modules=[]), "quantization_config.modules"),
    "module_unknown": (
        lambda c: c["quantization_config"]["modules"].update(ghost=GHOST),
        "modules.ghost: must name a module",
    ),
    "module_kind": (_module(KEY, kind="conv"), f"modules.{KEY}.kind"),
    "module_kind_swapped": (_module(KEY, kind="embedding", scheme="w8"), f"modules.{KEY}: must be an Embedding"),
    "module_unknown_key": (_module(KEY, bits=8), f"modules.{KEY}.bits"),
    "module_scheme": (_module(KEY, scheme="w9"), f"modules.{KEY}"),
    "module_scheme_role": (_module(KEY, scheme="w8"), f"modules.{KEY}"),
    "module_shape_swapped": (_module(UP, shape=[HIDDEN, 2 * HIDDEN]), f"modules.{UP}.shape: must be [256, 128]"),
    "module_shape_huge": (_module(KEY, shape=[2**40, 128]), f"modules.{KEY}"),
    "module_shape_zero": (_module(KEY, shape=[0, 128]), f"modules.{KEY}"),
    "module_shape_negative": (_module(KEY, shape=[-128, -128]), f"modules.{KEY}"),
    "module_shape_short": (_module(KEY, shape=[128]), f"modules.{KEY}.shape"),
    "module_shape_text": (_module(KEY, shape="128"), f"modules.{KEY}.shape"),
    "module_outliers_fewer": (_module(DOWN, outliers=1), f"{DOWN}.outlier_col: shape must be [1]"),
    "module_outliers_huge": (_module(DOWN, outliers=2**31), f"modules.{DOWN}.outliers"),
    "module_outliers_all": (_module(DOWN, outliers=128 * 256 + 1), f"modules.{DOWN}"),
    "module_outliers_negative": (_module(DOWN, outliers=-1), f"modules.{DOWN}.outliers"),
    "module_outliers_of_integers": (_module(KEY, outliers=1), f"modules.{KEY}"),
    "module_group": (_module(QUERY, scheme="w4a8-g32"), f"{QUERY}.group_scale: shape must be [128, 4]"),
    "module_other_bits": (_module(DOWN, scheme="gobo4"), f"{DOWN}.qdata: shape must be [128, 128]"),
    "module_other_kind": (_module(KEY, scheme="gobo3"), f"{KEY}.codebook: tensor must be there"),
    "module_tied_to_nothing": (_module(KEY, kind="tied_linear", tied_to="ghost"), f"modules.{KEY}.tied_to"),
    "module_tied_to_other_shape": (_module(KEY, kind="tied_linear", tied_to=UP), f"modules.{KEY}.tied_to"),
    "module_tied_to_itself": (_module(KEY, kind="tied_linear", tied_to=KEY), f"modules.{KEY}.tied_to"),
    "module_forgotten": (lambda c: c["quantization_config"]["modules"].pop(KEY), f"{KEY}."),
}  # fmt: skip


@pytest.mark.parametrize("rule", RECORD_RULES)
def test_a_record_that_does_not_fit_is_refused(folder: Path, rule: str) -> None:
    edit, words = RECORD_RULES[rule]
    _edit_config(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        qbert.load(folder)
    assert words in str(caught.value)
    with pytest.raises(QBertError):
        AutoModel.from_pretrained(folder)


MODEL_RULES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "layers_1e9": (_set(num_hidden_layers=10**9), "num_hidden_layers: must be a plausible number of layers"),
    "layers_under_another_name": (_set(model_type="gpt2", n_layer=10**9), "n_layer: must be a plausible number"),
    "layers_in_a_part": (_set(text_config={"num_layers": 10**9}), "num_layers: must be a plausible number"),
    "labels_1e9": (_set(num_labels=10**9), "num_labels: must be a plausible number of labels"),
    "layers_too_many": (_set(num_hidden_layers=2), "encoder.layer.1"),
    "layers_none": (_set(num_hidden_layers=0), "must name a module"),
    "layers_negative": (_set(num_hidden_layers=-1), "must name a module"),
    "layers_text": (_set(num_hidden_layers="1"), "config.json"),
    "hidden_other": (_set(hidden_size=64), "shape: must be"),
    "hidden_negative": (_set(hidden_size=-128), "config.json: must build a BertModel"),
    "hidden_text": (_set(hidden_size="128"), "config.json"),
    "vocabulary_other": (_set(vocab_size=96), f"modules.{WORDS}.shape: must be [96, 128]"),
    "vocabulary_huge": (_set(vocab_size=10**30), "config.json: must build a BertModel"),
    "positions_huge": (_set(max_position_embeddings=10**15), f"modules.{POSITIONS}.shape"),
    "heads_zero": (_set(num_attention_heads=0), "config.json: must build a BertModel"),
    "activation_unknown": (_set(hidden_act="nope"), "config.json: must build a BertModel"),
    "type_unknown": (_set(model_type="nope"), "config.json: must describe a model that transformers knows"),
    "type_missing": (lambda c: c.pop("model_type"), "config.json: must describe a model that transformers knows"),
    "dtype_unknown": (_set(dtype="float7"), "config.json"),
    "dtype_number": (_set(dtype=3), "checkpoint"),
    "method_of_others": (_record(quant_method="bitsandbytes"), "quantization_config.quant_method"),
    "method_missing": (_drop("quant_method"), "quantization_config.quant_method"),
    "attribute_overwritten": (_set(to_dict=1), "checkpoint"),
    "self": (_set(self=1), "config.json"),
    "attention_unknown": (_set(_attn_implementation="nope"), "config.json: must build a BertModel"),
    "decoder": (_set(is_decoder=True, add_cross_attention=True), "crossattention"),
    "architecture_missing": (lambda c: c.pop("architectures"), "architectures: must name one model class"),
    "architecture_none": (_set(architectures=None), "architectures: must name one model class"),
    "architecture_two": (_set(architectures=["BertModel", "BertModel"]), "architectures: must name one model class"),
    "architecture_module": (_set(architectures=["modeling_utils"]), "architectures: must name one model class"),
    "architecture_function": (_set(architectures=["pipeline"]), "architectures: must name one model class"),
    "architecture_config": (_set(architectures=["BertConfig"]), "architectures: must name one model class"),
    "architecture_tokenizer": (_set(architectures=["BertTokenizer"]), "architectures: must name one model class"),
    "architecture_dotted": (_set(architectures=["os.system"]), "architectures: must name one model class"),
    "architecture_dunder": (_set(architectures=["__name__"]), "architectures: must name one model class"),
    "architecture_other": (_set(architectures=["BertForSequenceClassification"]), "checkpoint"),
    "architecture_other_family": (_set(architectures=["GPT2Model"]), "must be of the configuration's model_type, BertConfig"),
}  # fmt: skip


@pytest.mark.parametrize("rule", MODEL_RULES)
def test_a_configuration_that_does_not_fit_is_refused(folder: Path, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, words = MODEL_RULES[rule]
    _edit_config(folder, edit)
    if "plausible number" in words:  # building anything from it would fill this machine's memory
        monkeypatch.setattr(transformers.AutoConfig, "for_model", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(CheckpointError) as caught:
        qbert.load(folder)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff\xfe", "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "must be JSON"),
        (b"[]", "must have a quantization_config"),
        (b"{}", "must have a quantization_config"),
        (b'{"quantization_config": []}', "must have a quantization_config"),
        (b" " * (16 * 2**20 + 1), "must be at most 16777216 bytes"),
        (None, "must be in the folder"),
    ],
    ids=["empty", "cut", "bytes", "deep", "digits", "list", "float", "record_list", "huge", "missing"],
)
def test_a_configuration_that_is_none(folder: Path, content: bytes | None, words: str) -> None:
    path = folder / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint: config\.json: ") as caught:
        qbert.load(folder)
    assert words in str(caught.value)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nothing", tmp_path / "file", "sentence-transformers/all-MiniLM-L6-v2"):
        with pytest.raises(QBertError, match="no folder"):
            qbert.load(path)
    with pytest.raises(CheckpointError, match=r"config\.json: must be in the folder"):
        qbert.load(tmp_path)


# ---- rules: files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(saved: Path, tmp_path: Path) -> Path:
    qbert.load(saved).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    return tmp_path / "shards"


def _edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../stolen.safetensors", "/etc/passwd", "sub/stolen.safetensors", "..", ".", "", "ghost.safetensors", "a\0b", 7,
        None, ["x"],
    ],
    ids=repr,
)  # fmt: skip
def test_an_index_names_files_of_its_own_folder_only(shards: Path, saved: Path, name: object) -> None:
    for place in (shards.parent, shards / "sub"):
        place.mkdir(exist_ok=True)
        shutil.copyfile(saved / "model.safetensors", place / "stolen.safetensors")
    _edit_index(shards, lambda index: index["weight_map"].update({f"{KEY}.scale": name}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: must "):
        qbert.load(shards)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": 3}', b"\xff", b"[" * 100_000,
        b'{"a":' + b"1" * 5000 + b"}",
    ],
    ids=["empty", "list", "no_map", "map_list", "map_number", "bytes", "deep", "digits"],
)  # fmt: skip
def test_an_index_that_is_none(shards: Path, content: bytes) -> None:
    (shards / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: must "):
        qbert.load(shards)


def test_an_index_without_tensors(shards: Path) -> None:
    _edit_index(shards, lambda index: index["weight_map"].clear())
    with pytest.raises(CheckpointError, match="tensor must be there"):
        qbert.load(shards)


def test_a_tensor_in_two_shards(shards: Path) -> None:
    first, second = weight_files(shards)[:2]
    state = load_file(first)
    name, tensor = next(iter(load_file(second).items()))
    save_file({**{n: t.clone() for n, t in state.items()}, name: tensor.clone()}, first, {"format": "pt"})
    for load in LOADERS.values():
        with pytest.raises(CheckpointError, match="must be in one file only") as caught:
            load(shards)
        assert caught.value.tensor == name


def test_a_missing_shard(shards: Path) -> None:
    weight_files(shards)[1].unlink()
    with pytest.raises(CheckpointError, match="must name files in its own folder"):
        qbert.load(shards)


def test_files_that_are_no_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", b"\0" * 8, whole[:-1], whole[:100], whole + b"\0", b"\xff" * 64, b"PK" + whole[2:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: must be a safetensors file"):
            qbert.load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: must be in the folder"):
        qbert.load(folder)
    path.mkdir()
    with pytest.raises(CheckpointError):
        qbert.load(folder)


def test_another_file_named_by_the_configuration_is_checked_too(folder: Path) -> None:
    """transformers reads this entry; what it points at must not get past the rules."""
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    state[f"{KEY}.scale"][3] = torch.nan
    save_file(state, folder / "other.safetensors", {"format": "pt"})
    _edit_config(folder, _set(transformers_weights="other.safetensors"))
    for load in LOADERS.values():
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert caught.value.tensor == f"{KEY}.scale"


# ---- nothing in a checkpoint is executed ----------------------------------------------------------------------------


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_code_in_a_checkpoint_is_not_run(folder: Path, saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nfrom transformers import BertConfig, BertModel\n"
    for name in ("modeling_evil.py", "__init__.py", "modeling.py", "conftest.py"):
        (folder / name).write_text(code)
    _edit_config(folder, _set(auto_map={"AutoConfig": "modeling_evil.BertConfig", "AutoTokenizer": ["a.B", None]}))
    for load in LOADERS.values():
        _assert_same_model(load(folder), qbert.load(saved))
    # A class of its own under the name of transformers' is another model, which nothing but that code could be.
    _edit_config(folder, _set(auto_map={"AutoModel": "modeling_evil.BertModel"}))
    for load in LOADERS.values():
        with pytest.raises(CheckpointError, match="must not name code of its own for BertModel"):
            load(folder)
    assert not marker.exists()


def test_pickles_in_a_checkpoint_are_not_read(folder: Path, saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickled = pickle.dumps(_Evil(marker))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "adapter_model.bin"):
        (folder / name).write_bytes(pickled)
    for load in LOADERS.values():
        _assert_same_model(load(folder), qbert.load(saved))
    (folder / "model.safetensors").unlink()
    for load in LOADERS.values():
        with pytest.raises(CheckpointError):
            load(folder)
    (folder / "model.safetensors").write_bytes(pickled)
    for load in LOADERS.values():
        with pytest.raises((CheckpointError, OSError, ValueError)):
            load(folder)
    assert not marker.exists()
    pickle.loads(pickled)
    assert marker.exists()  # it would have been noticed


# ---- the fused encoder ----------------------------------------------------------------------------------------------

A8_RECIPE = Recipe("w8a8", "w8", overrides={"intermediate": "gobo3a8"})


def _fused(name: str = "BertModel", *, static: bool = True, seed: int = 0) -> PreTrainedModel:
    model = _float_model(name, seed=seed)
    calibration = qbert.calibrate(model, [{"input_ids": IDS}]) if static else None
    return quantize_(model, A8_RECIPE, fuse=True, calibration=calibration)


def _variant(model: PreTrainedModel) -> str | None:
    found = fused_forward(model.base_model)
    return None if found is None else found.variant


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_a_fused_model_comes_back_fused(
    save: Callable[..., None], load: Callable[..., nn.Module], static: bool, tmp_path: Path
) -> None:
    model = _fused(static=static)
    _outputs(model)
    save(model, tmp_path / "first")
    again = load(tmp_path / "first")
    assert _variant(again) == ("static" if static else "dynamic")
    assert fused_forward(again).calibration == fused_forward(model).calibration
    version = read_config(tmp_path / "first")["quantization_config"]["format_version"]
    assert version == again.config.quantization_config.record.format_version == (2 if static else 1)
    _assert_same_model(again, model)
    save(again, tmp_path / "second")
    _assert_same_model(load(tmp_path / "second"), model)
    plain = _quantized(A8_RECIPE)
    state = load_file(tmp_path / "first" / "model.safetensors")
    qbert.save(plain, tmp_path / "plain")
    unfused = load_file(tmp_path / "plain" / "model.safetensors")
    assert state.keys() == unfused.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in unfused.items())


@pytest.mark.parametrize(
    ("source", "target"),
    [("BertForSequenceClassification", AutoModel), ("BertModel", AutoModelForMaskedLM), ("BertForMaskedLM", AutoModel)],
)
def test_calibrations_survive_a_change_of_class(source: str, target: Any, tmp_path: Path) -> None:
    model = _fused(source)
    model.save_pretrained(tmp_path / "first")
    converted = target.from_pretrained(tmp_path / "first").eval()
    assert _variant(converted) == "static"
    assert torch.equal(_hidden(converted), _hidden(model))
    converted.save_pretrained(tmp_path / "second")
    _assert_same_model(qbert.load(tmp_path / "second"), converted)


def test_fusing_on_load_equals_fusing_in_memory(tmp_path: Path) -> None:
    _float_model().save_pretrained(tmp_path / "float")
    model = _fused()
    calibration = fused_forward(model).calibration
    for given in (calibration, calibration.to_dict()):
        config = QBertConfig(**A8_RECIPE.to_dict(), fuse=True, calibration=given)
        assert QBertConfig(**config.to_dict()).to_dict() == config.to_dict()
        assert config.to_dict()["format_version"] == 2
        _assert_same_model(AutoModel.from_pretrained(tmp_path / "float", quantization_config=config), model)
    dynamic = AutoModel.from_pretrained(tmp_path / "float", quantization_config=QBertConfig("w8a8", fuse=True))
    assert _variant(dynamic) == "dynamic"
    for arguments in ({"calibration": calibration}, {"fuse": 1}, {"fuse": True, "calibration": {"layers": {}}}):
        with pytest.raises(QBertError):
            QBertConfig(**arguments)


def test_records_of_unfused_models_are_what_they_always_were(saved: Path, tmp_path: Path) -> None:
    """Older versions read them, and their records are read here: their digests were taken without the new entries."""
    record = read_config(saved)["quantization_config"]
    assert not {"fuse", "calibration"} & record.keys()
    assert not {"fuse", "calibration"} & json.loads(Record.parse(record).canonical()).keys()
    assert _variant(qbert.load(saved)) is None
    fused = _fused()
    qbert.save(fused, tmp_path / "fused")
    assert read_config(tmp_path / "fused")["quantization_config"]["fuse"] is True
    qbert.save(qbert.unfuse_(fused), tmp_path / "unfused")
    assert "fuse" not in read_config(tmp_path / "unfused")["quantization_config"]
    assert _variant(qbert.load(tmp_path / "unfused")) is None


def test_what_could_not_be_fused_is_not_said_to_be(tmp_path: Path) -> None:
    model = quantize_(_float_model(), "w8a16", fuse=True)
    qbert.save(model, tmp_path / "checkpoint")
    assert "fuse" not in read_config(tmp_path / "checkpoint")["quantization_config"]
    _assert_same_model(qbert.load(tmp_path / "checkpoint"), model)


@pytest.fixture(scope="module")
def saved_fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a calibrated fused model."""
    folder = tmp_path_factory.mktemp("saved") / "fused"
    qbert.save(_fused(), folder)
    return folder


def _layer(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"]["calibration"]["layers"][LAYER].update(entries)


def _scales(**entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["quantization_config"]["calibration"]["layers"][LAYER]["scales"].update(entries)


def _overflow(slot: str, neurons: list[int]) -> Callable[[dict[str, Any]], None]:
    return _layer(overflow={slot: {"neurons": neurons, "scale": 0.1}})


def _layers(edit: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda config: edit(config["quantization_config"]["calibration"]["layers"])


FUSION_RULES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "fuse_text": (_record(fuse="yes"), "quantization_config.fuse"),
    "fuse_false": (_record(fuse=False), "a calibration is for a fused encoder"),
    "fuse_missing": (_drop("fuse"), "a calibration is for a fused encoder"),
    "scale_nan": (_scales(query=math.nan), f"calibration.layers.{LAYER}.scales.query"),
    "scale_infinite": (_scales(key=math.inf), f"calibration.layers.{LAYER}.scales.key"),
    "scale_negative": (_scales(value=-1.0), f"calibration.layers.{LAYER}.scales.value"),
    "scale_zero": (_scales(inner=0.0), f"calibration.layers.{LAYER}.scales.inner"),
    "scale_tiny": (_scales(context=1e-40), f"calibration.layers.{LAYER}.scales.context"),
    "scale_text": (_scales(inner="0.1"), f"calibration.layers.{LAYER}.scales.inner"),
    "scale_null": (_scales(inner=None), f"calibration.layers.{LAYER}.scales.inner"),
    "scale_beside": (_layer(spare=0.1), f"calibration.layers.{LAYER}.spare"),
    "scale_unknown": (_scales(spare=0.1), f"{LAYER} has a slot 'spare'; allowed: query, key, value, context, inner"),
    "scale_missing": (
        _layers(lambda layers: layers[LAYER]["scales"].pop("context")),
        f"{LAYER} lacks a slot 'context'",
    ),
    "scale_missing_of_overflow": (
        _layers(lambda layers: layers[LAYER]["scales"].pop("inner")),
        "overflow of a slot 'inner' without a scale",
    ),
    "scales_missing": (_layers(lambda layers: layers[LAYER].pop("scales")), f"calibration.layers.{LAYER}.scales"),
    "scales_none": (_layers(lambda layers: layers[LAYER]["scales"].clear()), f"calibration.layers.{LAYER}.scales"),
    "scales_list": (_layer(scales=[0.1] * 5), f"calibration.layers.{LAYER}.scales"),
    "scale_changed": (_scales(inner=0.123), "quantization_config.digest"),
    "version_1": (_record(format_version=1), "quantization_config.digest"),
    "layer_unknown": (_layers(lambda layers: layers.update({"encoder.layer.1": layers[LAYER]})), "'encoder.layer.1'"),
    "layer_renamed": (_layers(lambda layers: layers.update(ghost=layers.pop(LAYER))), "has a layer 'ghost'"),
    "layers_none": (_layers(lambda layers: layers.clear()), "quantization_config.calibration.layers"),
    "layers_list": (_record(calibration={"layers": []}), "quantization_config.calibration.layers"),
    "calibration_text": (_record(calibration="all"), "quantization_config.calibration"),
    "calibration_missing": (_drop("calibration"), "quantization_config.digest"),
    "neuron_unknown": (_overflow("inner", [256]), f"{LAYER} has no neuron 256; allowed: 0 ... 255"),
    "neuron_negative": (_overflow("inner", [-1]), f"calibration.layers.{LAYER}.overflow"),
    "neurons_many": (_overflow("inner", list(range(99))), "99 neurons"),
    "neurons_none": (_overflow("inner", []), "0 neurons"),
    "neurons_changed": (_overflow("inner", [3]), "quantization_config.digest"),
    "overflow_unknown": (_overflow("spare", [1]), "overflow of a slot 'spare' without a scale"),
    "overflow_elsewhere": (_overflow("context", [1]), f"{LAYER} has overflow in 'context', which comes out of no"),
    "overflow_null": (_layer(overflow=None), f"calibration.layers.{LAYER}.overflow"),
    "activation_other": (
        _set(hidden_act="mish"),
        "quantization_config.fuse: must be false: its activation is none that is fused: unknown activation 'mish'",
    ),
    "decoder": (_set(is_decoder=True), "quantization_config.fuse: must be false: is_decoder is set"),
}


@pytest.mark.parametrize("rule", FUSION_RULES)
def test_a_fused_record_that_does_not_fit_is_refused(saved_fused: Path, tmp_path: Path, rule: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved_fused, folder)
    edit, words = FUSION_RULES[rule]
    _edit_config(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        qbert.load(folder)
    assert words in str(caught.value)
    with pytest.raises(QBertError):
        AutoModel.from_pretrained(folder)


def test_a_record_that_says_fused_of_what_cannot_be_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "checkpoint")
    _edit_config(tmp_path / "checkpoint", _record(fuse=True))
    with pytest.raises(CheckpointError, match=r"fuse: must be false: .* has scheme w4a16, which has no integer"):
        qbert.load(tmp_path / "checkpoint")


# ---- version 1 of a record ------------------------------------------------------------------------------------------

# A real one, with all that it can say: a calibrated encoder of a layer, with overflow. It was written by the last version
# of qbert that wrote such records, which gave `output.safetensors` for these ids.
VERSION_1 = Path(__file__).parent / "data" / "version_1"
VERSION_1_DIGEST = "55e20ca4d73fd5aa0e6e73021e494f990643687dae04671d7758381692a76a74"
VERSION_1_OUTPUT = (
    "cab60d11f8fb2cfe80541af360161f90404aa8f6f3b6c2a733da9c65e22b1e67"  # SHA-256, by the compiled kernels
)
VERSION_1_INPUTS = {
    "input_ids": torch.tensor([[5, 17, 40, 33, 8, 2, 9], [7, 7, 9, 30, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]),
}


@torch.no_grad()
def _version_1_output(model: nn.Module) -> Tensor:
    return model(**VERSION_1_INPUTS).last_hidden_state


def _assert_version_1(model: PreTrainedModel) -> None:
    """The very bits that it gave; torch's own kernels, where there are no compiled ones, add floats in another order."""
    assert _variant(model) == "static"
    found, expected = _version_1_output(model), load_file(VERSION_1 / "output.safetensors")["last_hidden_state"]
    assert hashlib.sha256(expected.numpy().tobytes()).hexdigest() == VERSION_1_OUTPUT
    if cpu_target().native:
        assert torch.equal(found, expected)
    assert sqnr_db(expected, found) > 80


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    shutil.copytree(VERSION_1 / "checkpoint", tmp_path / "version_1")
    return tmp_path / "version_1"


def _without_pooler(folder: Path) -> nn.Module:
    return AutoModel.from_pretrained(folder, add_pooling_layer=False)


VERSION_1_LOADERS = {"load": qbert.load, "auto_model": _without_pooler}


@pytest.mark.parametrize("load", VERSION_1_LOADERS.values(), ids=VERSION_1_LOADERS)
def test_version_1_loads_and_gives_the_same_bits(load: Callable[[Path], PreTrainedModel]) -> None:
    _assert_version_1(load(VERSION_1 / "checkpoint"))


def test_version_1_keeps_its_digest() -> None:
    record, _ = check(VERSION_1 / "checkpoint")
    assert (record.format_version, record.digest) == (1, VERSION_1_DIGEST)
    written = read_config(VERSION_1 / "checkpoint")["quantization_config"]
    assert record.to_dict() == written
    assert digest(load_file(VERSION_1 / "checkpoint" / "model.safetensors").items(), record) == VERSION_1_DIGEST
    (layer,) = record.calibration.layers.values()
    assert list(layer.scales) == ["query", "key", "value", "context", "inner"]
    old = written["calibration"]["layers"][LAYER]
    assert (layer.scales["context"], layer.scales["inner"]) == (old["attention_output"], old["gelu"])
    assert layer.overflow["inner"].model_dump(mode="json") == old["overflow"]


def test_version_1_is_saved_as_version_2(tmp_path: Path) -> None:
    model = qbert.load(VERSION_1 / "checkpoint")
    qbert.save(model, tmp_path / "again")
    record = read_config(tmp_path / "again")["quantization_config"]
    assert record["format_version"] == 2
    assert set(record["calibration"]["layers"][LAYER]) == {"scales", "overflow"}
    assert record["source"] == "random weights"
    stored, former = (load_file(each / "model.safetensors") for each in (tmp_path / "again", VERSION_1 / "checkpoint"))
    assert stored.keys() == former.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in former.items())
    again = qbert.load(tmp_path / "again")
    assert fused_forward(again).calibration == fused_forward(model).calibration
    _assert_version_1(again)


VERSION_1_RULES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "scale_nan": (_layer(query=math.nan), f"calibration.layers.{LAYER}.scales.query"),
    "scale_zero": (_layer(gelu=0.0), f"calibration.layers.{LAYER}.scales.inner"),
    "scale_text": (_layer(attention_output="0.1"), f"calibration.layers.{LAYER}.scales.context"),
    "scale_changed": (_layer(gelu=0.123), "quantization_config.digest"),
    "scale_missing": (_layers(lambda layers: layers[LAYER].pop("key")), f"{LAYER} lacks a slot 'key'"),
    "scale_missing_of_overflow": (
        _layers(lambda layers: layers[LAYER].pop("gelu")),
        "overflow of a slot 'inner' without a scale",
    ),
    "scale_unknown": (_layer(spare=0.1), f"calibration.layers.{LAYER}.spare"),
    "scale_of_version_2": (_layer(context=0.1), f"calibration.layers.{LAYER}.context"),
    "scales_beside": (_layer(scales={"query": 0.1}), f"calibration.layers.{LAYER}."),
    "overflow_missing": (_layers(lambda layers: layers[LAYER].pop("overflow")), "quantization_config.digest"),
    "overflow_null": (_layer(overflow=None), "quantization_config.digest"),
    "overflow_list": (_layer(overflow=[1]), f"calibration.layers.{LAYER}.overflow"),
    "neuron_unknown": (_layer(overflow={"neurons": [128], "scale": 0.1}), "has no neuron 128; allowed: 0 ... 127"),
    "neuron_negative": (_layer(overflow={"neurons": [-1], "scale": 0.1}), f"calibration.layers.{LAYER}.overflow"),
    "neurons_many": (_layer(overflow={"neurons": list(range(99)), "scale": 0.1}), "99 neurons"),
    "neurons_changed": (_layer(overflow={"neurons": [3], "scale": 0.1}), "quantization_config.digest"),
    "layer_unknown": (_layers(lambda layers: layers.update({"encoder.layer.1": layers[LAYER]})), "'encoder.layer.1'"),
    "layers_none": (_layers(lambda layers: layers.clear()), "quantization_config.calibration.layers"),
    "calibration_missing": (_drop("calibration"), "quantization_config.digest"),
    "fuse_missing": (_drop("fuse"), "a calibration is for a fused encoder"),
    "version_2": (_record(format_version=2), "quantization_config.digest"),
    "version_4": (_record(format_version=4), "format_version 4 is of emulated models"),
    "version_5": (_record(format_version=5), "format_version 5 is of linears of low rank and of zeros left out"),
    "version_6": (_record(format_version=6), "quantization_config.format_version"),
    "digest": (_record(digest="0" * 64), "quantization_config.digest"),
    "vocabulary": (_set(vocab_size=40), f"modules.{WORDS}.shape: must be [40, 64]"),
}


@pytest.mark.parametrize("rule", VERSION_1_RULES)
def test_a_spoiled_version_1_is_refused(version_1: Path, rule: str) -> None:
    edit, words = VERSION_1_RULES[rule]
    _edit_config(version_1, edit)
    with pytest.raises(CheckpointError) as caught:
        qbert.load(version_1)
    assert words in str(caught.value)
    with pytest.raises(QBertError):
        _without_pooler(version_1)


@pytest.mark.parametrize(
    "scheme_tensor", [f"{QUERY}.group_scale", f"{OUTPUT}.qdata", f"{UP}.outlier_delta", f"{WORDS}.qdata"]
)
def test_a_spoiled_tensor_of_version_1_is_refused(version_1: Path, scheme_tensor: str) -> None:
    state = {name: each.clone() for name, each in load_file(version_1 / "model.safetensors").items()}
    raw = state[scheme_tensor].view(-1).view(torch.uint8)
    raw[0] ^= 1
    save_file(state, version_1 / "model.safetensors", {"format": "pt"})
    for load in VERSION_1_LOADERS.values():
        with pytest.raises(CheckpointError):
            load(version_1)
