"""The families as data: what transformers has under those names, and the program that each writes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import pytest
import torch
import transformers
from small_encoders import CONFIGS, FOUR, float_model

from qbert.encoder.parts import LayerParts, Slot, parts_of
from qbert.families import FAMILIES, PositionTable, family_of
from qbert.families.family import positions_after_padding, positions_by_column

NAMES = {"Bert": "BERT", "Roberta": "RoBERTa", "XLMRoberta": "RoBERTa", "Camembert": "RoBERTa", "DistilBert": "DistilBERT",
         "Electra": "ELECTRA"}  # fmt: skip


def test_families_are_what_transformers_has() -> None:
    for family in FAMILIES:
        for path in family.models:
            module, _, name = path.rpartition(".")
            model_class = getattr(__import__(module, fromlist=[name]), name)
            parameters = list(inspect.signature(model_class.forward).parameters)
            assert tuple(parameters[1:-1]) == family.arguments


def test_names_say_what_they_are() -> None:
    assert [family.name for family in FAMILIES] == ["BERT", "RoBERTa", "ELECTRA", "DistilBERT"]
    paths = [path for family in FAMILIES for path in family.models]
    assert len(set(paths)) == len(paths) == 6


@pytest.mark.parametrize("name", CONFIGS)
def test_the_family_of_an_encoder(name: str) -> None:
    model = float_model(f"{name}Model")
    family = family_of(model)
    assert family is not None
    assert family.name == NAMES[name]
    head = float_model(f"{name}ForTokenClassification")
    assert family_of(head) is None
    assert family_of(head.base_model) is family


def test_what_is_no_encoder_of_a_family() -> None:
    class Own(transformers.BertModel):
        pass

    for other in (Own(copy.deepcopy(CONFIGS["Bert"])), torch.nn.Linear(2, 2), None, "BertModel"):
        assert family_of(other) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_every_path_is_there(name: str) -> None:
    model = float_model(f"{name}Model")
    family = family_of(model)
    assert family is not None
    paths = family.embeddings
    for path in (paths.words, paths.positions, paths.token_types):
        if path is not None:
            assert isinstance(model.get_submodule(path), torch.nn.Embedding)
    assert (paths.token_types is None) == (name == "DistilBert")
    assert isinstance(model.get_submodule(paths.norm), torch.nn.LayerNorm)
    assert (paths.projection is not None) == (name == "Electra")
    assert (family.pooler is not None) == hasattr(model, "pooler") == (name not in ("DistilBert", "Electra"))
    for layer in model.get_submodule(family.layers):
        for path in family.layer.linears:
            assert isinstance(layer.get_submodule(path), torch.nn.Linear)
    assert family.setting(model.config, "heads") == 2
    assert family.setting(model.config, "activation") == "gelu"
    assert isinstance(getattr(transformers.modeling_outputs, family.output), type)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layers_linears_and_norms_are_all_in_its_program(name: str) -> None:
    model = float_model(f"{name}Model")
    family = family_of(model)
    assert family is not None
    layer, parts = model.get_submodule(f"{family.layers}.0"), parts_of(family)
    modules = dict(layer.named_modules())
    linears = {path for path, module in modules.items() if isinstance(module, torch.nn.Linear)}
    norms = {path for path, module in modules.items() if isinstance(module, torch.nn.LayerNorm)}
    assert set(parts.linears) == set(family.layer.linears) == linears
    assert len(parts.linears) == 6
    assert set(parts.norms) == norms
    assert parts.together == (family.layer.query, family.layer.key, family.layer.value)


@pytest.mark.parametrize("name", FOUR)
def test_slots_are_seen_where_the_unfused_model_has_their_values(name: str) -> None:
    family = next(each for each in FAMILIES if each.name == NAMES[name])
    parts, layer = parts_of(family), family.layer
    assert parts.slots == {
        "query": Slot(layer.query, "output"),
        "key": Slot(layer.key, "output"),
        "value": Slot(layer.value, "output"),
        "context": Slot(layer.attention_output, "input"),
        "inner": Slot(layer.ffn_out, "input", activated=True),
    }
    assert list(parts.slots) == ["query", "key", "value", "context", "inner"]
    assert parts.activations == {"activation"}
    assert parts.flow == [
        ((layer.query, layer.key, layer.value), "hidden", "context"),
        ((layer.attention_output,), "context", "hidden"),
        ((layer.ffn_in,), "hidden", "inner"),
        ((layer.ffn_out,), "inner", "hidden"),
    ]
    assert parts_of(family) is parts


def test_another_program_has_other_slots() -> None:
    """What a family's program writes is all that calibration and eligibility know of a layer."""

    def program(b: Any, paths: Any) -> None:
        b.linear("up", reads="hidden", writes="middle")
        b.linear("gate", reads="middle", writes="inner", activation="gate")
        b.linear_add_norm("down", "norm", reads="inner")

    family = dataclasses.replace(FAMILIES[0], name="of this test", program=program)
    expected = LayerParts(
        flow=[(("up",), "hidden", "middle"), (("gate",), "middle", "inner"), (("down",), "inner", "hidden")],
        linears=["up", "gate", "down"], norms=["norm"], activations={"gate"}, _activated={"inner"},
        slots={"middle": Slot("gate", "input"), "inner": Slot("down", "input", activated=True)},
    )  # fmt: skip
    assert parts_of(family) == expected
    assert parts_of(FAMILIES[0]) != expected


def test_how_families_count_positions() -> None:
    ids = torch.tensor([[7, 8, 1, 9], [1, 1, 5, 6]])
    columns = torch.arange(4).repeat(2)
    table = PositionTable(rows=20, padding_idx=1)
    flat = lambda x: x.reshape(-1)
    assert positions_by_column(columns, ids, flat, table).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert positions_after_padding(columns, ids, flat, table).tolist() == [2, 3, 1, 4, 1, 1, 2, 3]
    assert positions_after_padding(columns, None, flat, table).tolist() == [2, 3, 4, 5, 2, 3, 4, 5]
    assert positions_after_padding(columns, None, flat, PositionTable(20, None)).tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert {family.name for family in FAMILIES if family.skips_padding} == {"RoBERTa"}
    for family in FAMILIES:
        assert (family.positions is positions_after_padding) == family.skips_padding


def test_positions_are_packed_once() -> None:
    """Positions of packed tokens are asked for as a batch, then packed like everything else."""
    ids, packed = torch.tensor([[7, 1], [8, 9]]), []

    def pack(x: torch.Tensor) -> torch.Tensor:
        packed.append(x)
        return x[ids.ne(1)]

    found = positions_after_padding(torch.tensor([0, 0, 1]), ids, pack, PositionTable(9, 1))
    assert found.tolist() == [2, 2, 3]
    assert len(packed) == 1
