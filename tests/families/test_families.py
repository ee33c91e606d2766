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

from qbert.encoder.parts import Flow, LayerParts, Slot, parts_of
from qbert.families import FAMILIES, PositionTable, albert, family_of, modernbert, mpnet
from qbert.families.family import positions_after_padding, positions_by_column

NAMES = {"Bert": "BERT", "Roberta": "RoBERTa", "XLMRoberta": "RoBERTa", "Camembert": "RoBERTa", "DistilBert": "DistilBERT",
         "Electra": "ELECTRA", "Data2VecText": "RoBERTa", "MPNet": "MPNet", "Albert": "ALBERT", "ModernBert": "ModernBERT",
         "BertGeneration": "BERT-generation"}  # fmt: skip
WITHOUT_POOLER = ("DistilBert", "Electra", "ModernBert", "BertGeneration")


def test_families_are_what_transformers_has() -> None:
    for family in FAMILIES:
        for path in family.models:
            module, _, name = path.rpartition(".")
            model_class = getattr(__import__(module, fromlist=[name]), name)
            parameters = list(inspect.signature(model_class.forward).parameters)
            assert tuple(parameters[1:-1]) == family.arguments


def test_names_say_what_they_are() -> None:
    assert [family.name for family in FAMILIES] == [
        "BERT", "RoBERTa", "ELECTRA", "DistilBERT", "MPNet", "ALBERT", "ModernBERT", "BERT-generation"
    ]  # fmt: skip
    paths = [path for family in FAMILIES for path in family.models]
    assert len(set(paths)) == len(paths) == len(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_family_of_an_encoder(name: str) -> None:
    model = float_model(f"{name}Model")
    family = family_of(model)
    assert family is not None
    assert family.name == NAMES[name]
    head = float_model("BertGenerationDecoder" if name == "BertGeneration" else f"{name}ForTokenClassification")
    assert family_of(head) is None
    inside = [family_of(module) for module in head.modules() if family_of(module) is not None]
    assert inside == [family]


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
    assert (paths.token_types is None) == (name in ("DistilBert", "MPNet", "ModernBert", "BertGeneration"))
    assert (paths.positions is None) == (name == "ModernBert")
    assert isinstance(model.get_submodule(paths.norm), torch.nn.LayerNorm)
    assert (paths.projection is not None) == (name in ("Electra", "Albert"))
    assert (family.pool is not None) == hasattr(model, "pooler") == (name not in WITHOUT_POOLER)
    assert (family.distances is not None) == (name in ("MPNet", "ModernBert"))
    for each in family.poolers:
        model.get_submodule(each)
    for path in family.calls(model, family.layers).values():
        for linear in family.layer.linears:
            assert isinstance(model.get_submodule(path).get_submodule(linear), torch.nn.Linear)
    assert family.setting(model.config, "heads") == 2
    assert family.setting(model.config, "activation") == {"Albert": "gelu_new"}.get(name, "gelu")
    assert isinstance(getattr(transformers.modeling_outputs, family.output), type)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layers_linears_and_norms_are_all_in_its_program(name: str) -> None:
    model = float_model(f"{name}Model")
    family = family_of(model)
    assert family is not None
    parts = parts_of(family)
    modules = dict(model.get_submodule(list(family.calls(model, family.layers).values())[-1]).named_modules())
    linears = {path for path, module in modules.items() if isinstance(module, torch.nn.Linear)}
    norms = {path for path, module in modules.items() if isinstance(module, torch.nn.LayerNorm)}
    assert set(parts.linears) == set(family.layer.linears) == linears
    assert len(parts.linears) == (4 if name == "ModernBert" else 6)
    assert {*parts.norms, *([] if parts.next_norm is None else [parts.next_norm])} == norms
    assert parts.qkv == family.layer.qkv


@pytest.mark.parametrize("name", [*FOUR, "MPNet", "Albert"])
def test_slots_are_seen_where_the_unfused_model_has_their_values(name: str) -> None:
    family = next(each for each in FAMILIES if each.name == NAMES[name])
    parts, layer = parts_of(family), family.layer
    assert parts.slots == {
        "query": Slot(layer.qkv[0], "output"),
        "key": Slot(layer.qkv[1], "output"),
        "value": Slot(layer.qkv[2], "output"),
        "context": Slot(layer.attention_output, "input"),
        "inner": Slot(layer.ffn_out, "input", activated=True),
    }
    assert list(parts.slots) == ["query", "key", "value", "context", "inner"]
    assert parts.activations == {"activation"}
    assert parts.flow == [
        (layer.qkv, "hidden", "context", 1),
        ((layer.attention_output,), "context", "hidden", 1),
        ((layer.ffn_in,), "hidden", "inner", 1),
        ((layer.ffn_out,), "inner", "hidden", 1),
    ]
    assert parts_of(family) is parts
    assert (parts.bias is None) == (name != "MPNet")
    assert parts.rotary is None
    assert parts.window is None


def test_slots_of_a_rotated_and_gated_layer() -> None:
    parts = parts_of(modernbert.FAMILY)
    assert parts.slots == {
        "query": Slot("attn.Wqkv", "output", part=(0, 3), rotary=modernbert.rotary),
        "key": Slot("attn.Wqkv", "output", part=(1, 3), rotary=modernbert.rotary),
        "value": Slot("attn.Wqkv", "output", part=(2, 3)),
        "context": Slot("attn.Wo", "input"),
    }  # what comes out of a gate gets its scales token by token
    assert parts.flow == [
        (("attn.Wqkv",), "hidden", "context", 3),
        (("attn.Wo",), "context", "hidden", 1),
        (("mlp.Wi",), "hidden", "inner", 2),
        (("mlp.Wo",), "inner", "hidden", 1),
    ]
    assert (parts.norms, parts.next_norm) == (["mlp_norm"], "attn_norm")
    assert parts.activations == {"activation"}


def test_calls_of_shared_layers() -> None:
    """As transformers calls them: each group as often as the others, in it every layer."""
    config = transformers.AlbertConfig(
        num_hidden_layers=6, num_hidden_groups=3, inner_group_num=2, hidden_size=8, num_attention_heads=2,
        intermediate_size=8, embedding_size=4, vocab_size=5,
    )  # fmt: skip
    model, called = transformers.AlbertModel(config).eval(), []
    for name, module in model.named_modules():
        if type(module).__name__ == "AlbertLayer":
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))
    calls = albert.FAMILY.calls(model, albert.FAMILY.layers)
    assert list(calls.values()) == called
    assert list(calls) == [f"encoder.layer.{index}" for index in range(12)]
    assert len(set(called)) == 6


def test_buckets_of_distances_are_those_of_transformers() -> None:
    distances = torch.arange(-600, 601)
    expected = transformers.models.mpnet.modeling_mpnet.MPNetEncoder.relative_position_bucket(distances)
    assert torch.equal(mpnet.buckets(distances), expected)
    beyond = distances.abs() >= mpnet.REACH
    clamped = mpnet.buckets(distances.clamp(-mpnet.REACH, mpnet.REACH))
    assert torch.equal(clamped[beyond], expected[beyond])


def test_another_program_has_other_slots() -> None:
    """What a family's program writes is all that calibration and eligibility know of a layer."""

    def program(b: Any, paths: Any) -> None:
        b.linear("up", reads="hidden", writes="middle")
        b.linear("gate", reads="middle", writes="inner", activation="gate")
        b.linear_add_norm("down", "norm", reads="inner")

    family = dataclasses.replace(FAMILIES[0], name="of this test", program=program)
    expected = LayerParts(
        flow=[
            Flow(("up",), "hidden", "middle"), Flow(("gate",), "middle", "inner"), Flow(("down",), "inner", "hidden"),
        ],
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
    assert {family.name for family in FAMILIES if family.skips_padding} == {"RoBERTa", "MPNet"}
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
