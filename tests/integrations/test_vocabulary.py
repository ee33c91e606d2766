"""What transformers does to a vocabulary by name, tying weights and resizing tables, where it is quantized."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

import qbert
from qbert import QBertError, Recipe, dequantize_, quantize_
from qbert.modules import QEmbedding, QLinear, QTiedLinear

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 40,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "Bert": lambda: transformers.BertConfig(**SIZES),
    "Roberta": lambda: transformers.RobertaConfig(**SIZES),
    "Electra": lambda: transformers.ElectraConfig(**SIZES, embedding_size=64),
    "DistilBert": lambda: transformers.DistilBertConfig(
        vocab_size=97, dim=64, n_layers=1, n_heads=2, hidden_dim=128, max_position_embeddings=40
    ),
    "MPNet": lambda: transformers.MPNetConfig(**SIZES),
}
TABLES = ("w8", "gobo4")
IDS = torch.tensor([[5, 17, 96, 33, 8, 2, 60], [7, 7, 9, 80, 12, 3, 4]])
LINEAR = Recipe("w8a8")
TIES, FORMER = "_tied_weights_keys", "_qbert_former_ties"
RESIZE, SET_TABLE = "resize_token_embeddings", "set_input_embeddings"


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def _model(family: str = "Bert", task: str = "ForMaskedLM", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = getattr(transformers, family + task)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _quantized(family: str = "Bert", table: str | None = "w8", task: str = "ForMaskedLM", **changes: Any) -> Any:
    return quantize_(_model(family, task, **changes), Recipe("w8a8", table))


@torch.no_grad()
def _output(model: Any) -> Tensor:
    return model(input_ids=IDS)[0]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _own(model: nn.Module) -> set[str]:
    """What the transformers models inside have of their own in place of their classes'."""
    return {name for each in model.modules() for name in (TIES, FORMER, RESIZE, SET_TABLE) if name in each.__dict__}


# ---- tying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("family", CONFIGS)
def test_tying_by_hand_does_nothing(family: str, table: str, recompute: bool) -> None:
    model = _quantized(family, table)
    assert isinstance(model.get_input_embeddings(), QEmbedding)
    assert isinstance(model.get_output_embeddings(), QTiedLinear)
    modules, state, logits = list(model.modules()), _state(model), _output(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for _ in range(2):
        model.tie_weights(recompute_mapping=recompute)
        assert torch.equal(_output(model), logits)
    assert list(model.modules()) == modules
    _assert_same(_state(model), state)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("family", CONFIGS)
def test_the_ties_that_are_left_are_made(family: str) -> None:
    """Of a quantized head the bias; of a model whose table stays float all of them."""
    model = _quantized(family)
    head = model.get_output_embeddings()
    tied = {name for name, each in model.named_parameters(remove_duplicate=False) if each is head.bias}
    left = model.get_expanded_tied_weights_keys(all_submodels=True)
    assert not any(name.endswith(".weight") for pair in left.items() for name in pair)
    assert set(left) | set(left.values()) <= tied
    if left:
        expected = head.bias
        head.bias = nn.Parameter(torch.zeros(97))
        model.tie_weights()
        assert head.bias is expected
    plain = _quantized(family, None)
    embedding, decoder = plain.get_input_embeddings(), plain.get_output_embeddings()
    decoder.weight = nn.Parameter(torch.zeros(97, 64))
    plain.tie_weights()
    assert decoder.weight is embedding.weight
    assert plain.get_expanded_tied_weights_keys(all_submodels=True) == _model(family).get_expanded_tied_weights_keys(
        all_submodels=True
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_copies_pickles_and_loaded_models_are_tied_alike(family: str, tmp_path: Path) -> None:
    model = _quantized(family, "gobo4")
    logits = _output(model)
    qbert.save(model, tmp_path / "checkpoint")
    copies = [
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), qbert.load(tmp_path / "checkpoint"),
        AutoModelForMaskedLM.from_pretrained(tmp_path / "checkpoint"),
    ]  # fmt: skip
    for each in copies:
        each.tie_weights()
        assert torch.equal(_output(each), logits)
        assert each.get_output_embeddings().owner is each.get_input_embeddings()
        each.save_pretrained(tmp_path / "again")
        assert torch.equal(_output(qbert.load(tmp_path / "again")), logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_dequantize_gives_the_ties_back(family: str) -> None:
    model = _model(family)
    ties, expanded = model._tied_weights_keys, dict(model.all_tied_weights_keys)
    quantize_(model, Recipe("w8a8", "w8"))
    assert _own(model) == {TIES, FORMER, RESIZE, SET_TABLE}
    assert model._tied_weights_keys != ties
    dequantize_(model)
    assert _own(model) == set()
    assert model._tied_weights_keys is ties is type(model)._tied_weights_keys
    assert dict(model.all_tied_weights_keys) == expanded
    model.get_output_embeddings().weight = nn.Parameter(torch.zeros(97, 64))
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    logits = _output(model)
    quantize_(model, Recipe("w8a8", "gobo4"))
    model.tie_weights()
    assert torch.nn.functional.cosine_similarity(_output(model).flatten(), logits.flatten(), dim=0) > 0.95
    assert _own(model.dequantize()) == set()


def test_models_with_nothing_quantized_have_nothing_of_their_own() -> None:
    for model in (_model(), _model("Bert", "Model")):
        assert _own(model) == set()
    outer = nn.ModuleDict({"quantized": _quantized(), "plain": _model()})
    assert _own(outer["plain"]) == set()
    assert _own(outer["quantized"]) == {TIES, FORMER, RESIZE, SET_TABLE}
    dequantize_(outer)
    assert _own(outer) == set()


class _Config(PreTrainedConfig):
    model_type = "heads_of_one_weight"

    def __init__(self, tie_word_embeddings: bool = True, **rest: Any) -> None:
        super().__init__(**rest)
        self.tie_word_embeddings = tie_word_embeddings


class _Heads(PreTrainedModel):
    """Ties by patterns of modules' names, as detection models have them."""

    config_class = _Config
    _tied_weights_keys = {r"heads.(?!0)\d+": "heads.0", "out.weight": "words.weight"}  # noqa: RUF012

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.words = nn.Embedding(97, 64)
        self.heads = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
        self.out = nn.Linear(64, 97, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        hidden = self.words(input_ids)
        return (self.out(sum(head(hidden) for head in self.heads)),)

    def get_input_embeddings(self) -> nn.Module:
        return self.words


def _heads() -> _Heads:
    torch.manual_seed(0)
    return _Heads(_Config()).eval()


@pytest.mark.parametrize(
    ("recipe", "left"),
    [
        (Recipe("w8a8", "w8"), {"heads.1.bias", "heads.2.bias"}),
        (Recipe("w8a8"), {"heads.1.bias", "heads.2.bias", "out.weight"}),
        (Recipe(None, "w8"), {f"heads.{index}.{name}" for index in (1, 2) for name in ("weight", "bias")}),
    ],
    ids=["all", "linears", "table"],
)
def test_ties_by_patterns(recipe: Recipe, left: set[str]) -> None:
    model = _heads()
    assert set(model.all_tied_weights_keys) == {
        *(f"heads.{index}.{name}" for index in (1, 2) for name in ("weight", "bias")), "out.weight",
    }  # fmt: skip
    patterns = model._tied_weights_keys
    quantize_(model, recipe)
    modules, state, output = list(model.modules()), _state(model), _output(model)
    for each in (model, copy.deepcopy(model)):
        assert set(each.get_expanded_tied_weights_keys(all_submodels=True)) == left
        each.tie_weights()
        _assert_same(_state(each), state)
        assert torch.equal(_output(each), output)
        assert each.heads[2].bias is each.heads[0].bias
    assert list(model.modules()) == modules
    kept = {name for name in patterns if name in model._tied_weights_keys}
    assert kept == {"all": set(), "linears": {"out.weight"}, "table": {next(iter(patterns))}}[_id(recipe)]
    dequantize_(model)
    assert model._tied_weights_keys is patterns
    model.heads[1].weight = nn.Parameter(torch.zeros(64, 64))
    model.tie_weights()
    assert model.heads[1].weight is model.heads[2].weight is model.heads[0].weight
    assert model.out.weight is model.words.weight


def _id(recipe: Recipe) -> str:
    return "all" if recipe.linear and recipe.embedding else "linears" if recipe.linear else "table"


def test_ties_that_a_model_sets_for_itself_come_back() -> None:
    """Some models write them in their constructor."""
    model = _heads()
    own = {"out.weight": "words.weight"}
    model._tied_weights_keys = own
    for _ in range(2):
        quantize_(model, Recipe("w8a8", "w8"))
        assert model._tied_weights_keys == {}
        model.tie_weights()
        dequantize_(model)
        assert model._tied_weights_keys == own
        assert TIES in model.__dict__
    copied = dequantize_(copy.deepcopy(quantize_(model, Recipe("w8a8", "w8"))))
    assert copied._tied_weights_keys == own


class _Pair(PreTrainedModel):
    """Two masked language models in one, each with ties of its own."""

    config_class = _Config

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        self.first = transformers.BertForMaskedLM(CONFIGS["Bert"]())
        self.second = transformers.DistilBertForMaskedLM(CONFIGS["DistilBert"]())
        self.post_init()

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.first(input_ids=input_ids).logits + self.second(input_ids=input_ids).logits,)


def test_models_inside_a_model() -> None:
    torch.manual_seed(0)
    model = _Pair(_Config()).eval()
    expanded = dict(model.all_tied_weights_keys)
    assert "second.vocab_projector.weight" in expanded
    quantize_(model, Recipe("w8a8", "w8", exclude=["first.bert.embeddings"]))
    output = _output(model)
    assert isinstance(model.second.vocab_projector, QTiedLinear)
    model.tie_weights()
    model.first.tie_weights()
    model.second.tie_weights()
    assert torch.equal(_output(model), output)
    embedding = model.first.bert.embeddings.word_embeddings
    assert model.first.cls.predictions.decoder.weight is embedding.weight
    model.first.cls.predictions.decoder.weight = nn.Parameter(torch.zeros(97, 64))
    model.tie_weights()
    assert model.first.cls.predictions.decoder.weight is embedding.weight
    dequantize_(model)
    assert _own(model) == set()
    assert dict(model.all_tied_weights_keys) == expanded
    assert set(model.second.all_tied_weights_keys) == {"vocab_projector.weight"}
    model.tie_weights()
    assert model.second.vocab_projector.weight is model.second.distilbert.embeddings.word_embeddings.weight


# ---- resizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["Model", "ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("family", CONFIGS)
def test_resizing_to_what_it_is_does_nothing(family: str, task: str) -> None:
    model = _quantized(family, "w8", task)
    table, modules, state, output = model.get_input_embeddings(), list(model.modules()), _state(model), _output(model)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    for arguments in ((97,), (), (None,), (97, None, False), (None, 1), (90, 97)):
        assert model.resize_token_embeddings(*arguments) is table
    assert model.resize_token_embeddings(new_num_tokens=97, mean_resizing=False) is table
    assert list(model.modules()) == modules
    _assert_same(_state(model), state)
    assert torch.equal(_output(model), output)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert model.config.vocab_size == 97


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [((104,), 104), ((96,), 96), ((97, 8), 104), ((None, 64), 128), ((104, None, False), 104), ((1,), 1)],
    ids=str,
)
@pytest.mark.parametrize("task", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("family", CONFIGS)
def test_resizing_a_quantized_table_says_the_cure(family: str, task: str, arguments: Any, rows: int) -> None:
    model = _quantized(family, "gobo4", task)
    modules, state, output = list(model.modules()), _state(model), _output(model)
    inner = getattr(model, model.base_model_prefix, model)
    for each in (model, inner, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        words = (
            rf"resize_token_embeddings: the vocabulary of this {type(each).__name__} is quantized and has 97 rows, not "
            rf"{rows}; call qbert\.dequantize_\(model\) first, resize it, and quantize it again"
        )
        with pytest.raises(QBertError, match=words):
            each.resize_token_embeddings(*arguments)
        assert each.config.vocab_size == 97
    assert list(model.modules()) == modules
    _assert_same(_state(model), state)
    assert torch.equal(_output(model), output)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_cure_cures(family: str, tmp_path: Path) -> None:
    model = _quantized(family)
    dequantize_(model)
    table = model.resize_token_embeddings(104, mean_resizing=False)
    assert table.weight.shape == (104, 64)
    assert model.get_output_embeddings().weight is table.weight
    quantize_(model, Recipe("w8a8", "w8"))
    assert _output(model).shape == (2, 7, 104)
    qbert.save(model, tmp_path / "checkpoint")
    assert torch.equal(_output(qbert.load(tmp_path / "checkpoint")), _output(model))


@pytest.mark.parametrize("task", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_float_table_is_resized_as_ever(family: str, task: str, tmp_path: Path) -> None:
    """Also under a fused encoder, which is then prepared anew."""
    model = quantize_(_model(family, task), LINEAR, fuse=True)
    before = _output(model)
    table = model.resize_token_embeddings(104, mean_resizing=False)
    assert isinstance(table, nn.Embedding)
    assert model.get_input_embeddings() is table
    assert table.weight.shape == (104, 64)
    after = _output(model)
    assert torch.allclose(after[..., : before.shape[-1]], before, atol=1e-5)
    with torch.no_grad():
        assert model(input_ids=torch.full((1, 3), 103))[0].isfinite().all()
    if task == "ForMaskedLM":
        assert model.get_output_embeddings().weight is table.weight
    qbert.save(model, tmp_path / "checkpoint")
    assert torch.equal(_output(qbert.load(tmp_path / "checkpoint")), after)


def test_a_quantized_head_of_its_own_is_refused_before_its_table_is_resized() -> None:
    model = quantize_(_model(tie_word_embeddings=False), Recipe("w8a8", keep_float=()))
    assert isinstance(model.get_output_embeddings(), QLinear)
    table, output = model.get_input_embeddings(), _output(model)
    assert isinstance(table, nn.Embedding)
    with pytest.raises(QBertError, match="is quantized and has 97 rows, not 104"):
        model.resize_token_embeddings(104)
    assert model.get_input_embeddings() is table
    assert table.weight.shape == (97, 64)
    assert torch.equal(_output(model), output)
    assert model.resize_token_embeddings(97) is table
    bare = model.bert  # which has no head
    assert bare.resize_token_embeddings(104, mean_resizing=False).weight.shape == (104, 64)


def test_its_signature_is_transformers() -> None:
    expected = inspect.signature(_model().resize_token_embeddings).parameters
    found = inspect.signature(_quantized().resize_token_embeddings).parameters
    assert [(each.name, each.default) for each in found.values()] == [
        (each.name, each.default) for each in expected.values()
    ]


def test_quantized_weights_count_as_parameters() -> None:
    model = _model()
    total, frozen = model.num_parameters(), model.num_parameters(exclude_embeddings=True)
    assert total == sum(parameter.numel() for parameter in model.parameters())
    quantize_(model, Recipe("w8a8", "w8"))
    assert (model.num_parameters(), model.num_parameters(exclude_embeddings=True)) == (total, frozen)
    assert model.bert.num_parameters() == _model().bert.num_parameters()
    assert model.num_parameters(only_trainable=True) == sum(parameter.numel() for parameter in model.parameters())
    assert dequantize_(model).num_parameters() == total


@pytest.mark.parametrize("family", CONFIGS)
def test_a_table_that_a_head_computes_with_is_not_exchanged_under_it(family: str) -> None:
    model = _quantized(family)
    with pytest.raises(
        QBertError, match=r"set_input_embeddings: .* is quantized, and .* computes with it; call qbert\.dequantize_"
    ):
        model.set_input_embeddings(nn.Embedding(97, 64))
    output = _output(model)
    model.set_input_embeddings(model.get_input_embeddings())
    assert torch.equal(_output(model), output)


def test_a_table_that_nothing_is_tied_to_is_exchanged(tmp_path: Path) -> None:
    model, table = _quantized("Bert", "w8", "Model"), nn.Embedding(97, 64)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    qbert.save(model, tmp_path / "saved")
    assert torch.equal(_output(qbert.load(tmp_path / "saved")), _output(model))
