"""Recipes: what a pattern matches, what wins over what, and which mistakes are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from torch import nn

from qbert import QBertError, Recipe, quantize_
from qbert.families import KEEP_FLOAT
from qbert.formats import SCHEMES, Role, scheme_names
from qbert.modules import collect_specs
from qbert.recipe import as_recipe, matches

QUERY = "bert.encoder.layer.1.attention.self.query"


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("pooler", "pooler.dense"),
        ("pooler", "bert.pooler.dense"),
        ("pooler.dense", "bert.pooler.dense"),
        ("bert.pooler.dense", "bert.pooler.dense"),
        ("query", QUERY),
        ("encoder.layer.1", QUERY),
        ("layer.1", QUERY),
        ("layer.*.attention", QUERY),
        ("layer.?", QUERY),
        ("layer.[0-4]", QUERY),
        ("encoder.*", QUERY),  # the customary spelling of "everything below"
        ("pooler.*", "pooler"),
        ("*", "anything"),
        ("q*y", QUERY),
        ("*attention*", QUERY),
        ("decoder$", "decoder"),
        ("decoder$", "lm_head.decoder"),
        ("self.query$", QUERY),
        ("q*y$", QUERY),
    ],
)
def test_pattern_matches(pattern: str, name: str) -> None:
    assert matches(name, pattern)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("encoder.layer.1", "encoder.layer.10.output.dense"),  # whole components only
        ("encoder.layer.1", "encoder.layer.11"),
        ("layer.1", "encoder.mylayer.1"),
        ("pool", "pooler.dense"),
        ("ooler", "pooler.dense"),
        ("cls", "bert.clss.decoder"),
        ("score", "scores.dense"),
        ("pooler.dense.weight", "pooler.dense"),
        ("Query", QUERY),  # names are case-sensitive
        ("query.dense", QUERY),
        ("layer.?", "encoder.layer.10.output"),
        ("", "pooler"),
        ("decoder$", "model.decoder.layers.0.fc1"),
        ("self$", QUERY),
        ("uery$", QUERY),
        ("$", "pooler"),
    ],
)
def test_pattern_does_not_match(pattern: str, name: str) -> None:
    assert not matches(name, pattern)


def test_defaults_quantize_linears_and_keep_heads_and_embeddings_float() -> None:
    recipe = Recipe()
    assert recipe.decide(QUERY, Role.LINEAR).scheme is SCHEMES["w8a8"]
    assert recipe.decide("pooler.dense", Role.LINEAR).scheme is SCHEMES["w8a8"]  # as in the GOBO paper
    embedding = recipe.decide("embeddings.word_embeddings", Role.EMBEDDING)
    assert (embedding.scheme, embedding.reason) == (None, "the recipe leaves embeddings float")
    for head in KEEP_FLOAT:
        inside = () if head.endswith("$") else (f"{head}.dense", f"model.{head}.out_proj")
        for name in (head.removesuffix("$"), f"model.{head.removesuffix('$')}", *inside):
            decision = recipe.decide(name, Role.LINEAR)
            assert (decision.scheme, decision.reason) == (None, f"stays float: {head!r} is on the skip list")


def test_exclude_wins_over_everything() -> None:
    recipe = Recipe("w8a8", "w8", exclude=["layer.1"], overrides={"query": "w4a8", "layer.1": "gobo3"})
    decision = recipe.decide(QUERY, Role.LINEAR)
    assert (decision.scheme, decision.reason) == (None, "excluded by 'layer.1'")


def test_overrides_win_over_the_skip_list_and_the_default() -> None:
    recipe = Recipe("w8a8", overrides={"classifier": "w8a16", "query": "w4a8"})
    assert recipe.decide("classifier", Role.LINEAR).scheme is SCHEMES["w8a16"]
    assert recipe.decide(QUERY, Role.LINEAR).scheme is SCHEMES["w4a8"]
    assert recipe.decide(QUERY, Role.LINEAR).reason == "override 'query'"
    assert Recipe(overrides={"query": "w4a8-g64"}).decide(QUERY, Role.LINEAR).scheme is SCHEMES["w4a8"]  # an alias


def test_the_first_override_that_matches_wins() -> None:
    first = Recipe(overrides={"query": "w4a8", "layer.1": "gobo3"})
    second = Recipe(overrides={"layer.1": "gobo3", "query": "w4a8"})
    assert first.decide(QUERY, Role.LINEAR).scheme is SCHEMES["w4a8"]
    assert second.decide(QUERY, Role.LINEAR).scheme is SCHEMES["gobo3"]


def test_an_override_can_leave_a_module_float() -> None:
    decision = Recipe(overrides={"query": None}).decide(QUERY, Role.LINEAR)
    assert (decision.scheme, decision.reason) == (None, "override 'query'")


def test_an_override_brings_in_what_the_defaults_leave_float() -> None:
    recipe = Recipe(linear=None, overrides={"query": "w8a8", "word_embeddings": "w8"})
    assert recipe.decide(QUERY, Role.LINEAR).scheme is SCHEMES["w8a8"]
    assert recipe.decide("embeddings.word_embeddings", Role.EMBEDDING).scheme is SCHEMES["w8"]
    assert recipe.decide("other", Role.LINEAR).reason == "the recipe leaves linears float"


def test_the_skip_list_can_be_emptied() -> None:
    assert Recipe(keep_float=()).decide("classifier", Role.LINEAR).scheme is SCHEMES["w8a8"]


@pytest.mark.parametrize("name", scheme_names(Role.LINEAR))
def test_a_schemes_name_stands_for_all_linears(name: str) -> None:
    assert as_recipe(f"{name}+none") == Recipe(linear=name)
    recipe = Recipe(exclude=("x",))
    assert as_recipe(recipe) is recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"linear": "int8"}, "unknown scheme 'int8'; allowed for linears: w8a8, w8a16,"),
        ({"linear": "w8"}, "scheme is not for linears: 'w8'"),
        ({"linear": ""}, "unknown scheme ''"),
        ({"linear": "W8A8"}, "unknown scheme 'W8A8'"),
        ({"embedding": "w8a8"}, "scheme is not for embeddings: 'w8a8'; allowed for embeddings: gobo3,"),
        ({"embedding": "gobo3a8"}, "scheme is not for embeddings"),
        ({"overrides": {"query": "w3"}}, "override 'query': unknown scheme 'w3'; allowed: None"),
        ({"exclude": "pooler"}, "exclude is the string 'pooler'; allowed: a list of patterns"),
        ({"keep_float": "cls"}, "keep_float is the string 'cls'"),
    ],
)
def test_mistakes_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(QBertError) as caught:
        Recipe(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_an_override_for_the_other_role_is_refused_where_it_matches() -> None:
    recipe = Recipe(overrides={"query": "w8"})
    with pytest.raises(QBertError, match="not for linears: 'w8'"):
        recipe.decide(QUERY, Role.LINEAR)
    assert recipe.decide("key", Role.LINEAR).scheme is SCHEMES["w8a8"]


def test_the_default_group_size_may_be_spelled_out() -> None:
    assert Recipe("w4a8-g64").decide(QUERY, Role.LINEAR).scheme is SCHEMES["w4a8"]
    assert Recipe("w4a8-g32").decide(QUERY, Role.LINEAR).scheme is SCHEMES["w4a8-g32"]


def test_plain_data_round_trip_through_json() -> None:
    recipe = Recipe("gobo3", "w4", ["pooler"], {"query": None, "key": "w8a8"}, ["cls"])
    data = json.loads(json.dumps(recipe.to_dict()))
    assert data == {
        "linear": "gobo3", "embedding": "w4", "exclude": ["pooler"], "overrides": {"query": None, "key": "w8a8"},
        "keep_float": ["cls"],
    }  # fmt: skip
    assert Recipe(**data).to_dict() == recipe.to_dict()
    assert list(data["overrides"]) == ["query", "key"]  # their order decides


def test_recipes_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().linear = "w4a8"  # type: ignore[misc]


# ---- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "linear", "embedding"),
    [
        ("w8a8", "w8a8", "w8"),
        ("w8a8+none", "w8a8", None),
        ("w8a8+gobo4", "w8a8", "gobo4"),
        ("gobo3", "gobo3", None),
        ("gobo3+gobo4", "gobo3", "gobo4"),
        ("none+w8", None, "w8"),
    ],
)
def test_a_word_stands_for_a_recipe(word: str, linear: str | None, embedding: str | None) -> None:
    assert as_recipe(word) == Recipe(linear, embedding)


@pytest.mark.parametrize(("word", "wrong"), [("w9a9", "w9a9"), ("w8a8+w9", "w9"), ("w8a8+", "''"), ("", "''")])
def test_a_word_that_stands_for_nothing_is_refused(word: str, wrong: str) -> None:
    with pytest.raises(QBertError, match=wrong):
        as_recipe(word)


def test_who_asks_for_8_bits_gets_them_for_the_tables_too() -> None:
    model = quantize_(nn.ModuleDict({"table": nn.Embedding(8, 8), "linear": nn.Linear(8, 8)}))
    assert {name: spec.scheme for name, spec in collect_specs(model).items()} == {"table": "w8", "linear": "w8a8"}
