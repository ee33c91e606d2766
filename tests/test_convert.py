"""quantize_ and dequantize_: which modules of which models change, and that nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import BertConfig, DistilBertConfig, ElectraConfig, MPNetConfig, PretrainedConfig, RobertaConfig

import qbert
from qbert import QBertError, Recipe, dequantize_, quantize_
from qbert.convert import float_reasons, install_, plan, when_changed
from qbert.errors import CheckpointError
from qbert.modules import ModuleSpec, QEmbedding, QLinear, QTiedLinear, QuantizedModule, collect_specs
from qbert.weight.codec import decode

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 40,
}  # fmt: skip
DISTIL = {
    "vocab_size": 97, "dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128, "max_position_embeddings": 40,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "Bert": BertConfig(**SIZES),
    "Roberta": RobertaConfig(**SIZES),
    "DistilBert": DistilBertConfig(**DISTIL),
    "Electra": ElectraConfig(**SIZES, embedding_size=32),
    "MPNet": MPNetConfig(**SIZES),
}
TASKS = (
    "Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForMultipleChoice", "ForPreTraining", "ForNextSentencePrediction", "ForCausalLM", "LMHeadModel",
)  # fmt: skip
CLASSES = [
    f"{family}{task}"
    for family in CONFIGS
    for task in TASKS
    if isinstance(getattr(transformers, f"{family}{task}", None), type)
]
# Every linear of these models that is not part of the encoder, by the name it has in the model.
HEADS = {
    "BertForMaskedLM": {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    "BertLMHeadModel": {"cls.predictions.transform.dense", "cls.predictions.decoder"},
    "BertForPreTraining": {
        "cls.predictions.transform.dense", "cls.predictions.decoder", "cls.seq_relationship",
    },
    "BertForNextSentencePrediction": {"cls.seq_relationship"},
    "RobertaForMaskedLM": {"lm_head.dense", "lm_head.decoder"},
    "RobertaForCausalLM": {"lm_head.dense", "lm_head.decoder"},
    "RobertaForSequenceClassification": {"classifier.dense", "classifier.out_proj"},
    "DistilBertForMaskedLM": {"vocab_transform", "vocab_projector"},
    "DistilBertForSequenceClassification": {"pre_classifier", "classifier"},
    "DistilBertForMultipleChoice": {"pre_classifier", "classifier"},
    "ElectraForMaskedLM": {"generator_predictions.dense", "generator_lm_head"},
    "ElectraForCausalLM": {"generator_predictions.dense", "generator_lm_head"},
    "ElectraForPreTraining": {"discriminator_predictions.dense", "discriminator_predictions.dense_prediction"},
    "ElectraForSequenceClassification": {"classifier.dense", "classifier.out_proj"},
    "ElectraForMultipleChoice": {"sequence_summary.summary", "classifier"},
    "MPNetForMaskedLM": {"lm_head.dense", "lm_head.decoder"},
    "MPNetForSequenceClassification": {"classifier.dense", "classifier.out_proj"},
}  # fmt: skip


def _model(name: str = "BertModel", seed: int = 0, **changes: Any) -> nn.Module:
    family = next(family for family in CONFIGS if name.startswith(family))
    config = copy.deepcopy(CONFIGS[family])
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return getattr(transformers, name)(config).eval()


def _ids(model: nn.Module, rows: int = 2, width: int = 9) -> Tensor:
    shape = (rows, 2, width) if "MultipleChoice" in type(model).__name__ else (rows, width)
    return torch.randint(5, 97, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _outputs(model: nn.Module) -> list[Tensor]:
    return [each for each in model(input_ids=_ids(model)).to_tuple() if isinstance(each, Tensor)]


def _linears(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _heads(name: str) -> set[str]:
    if name.endswith("Model") and name not in HEADS:
        return set()
    return HEADS.get(name, {"qa_outputs"} if name.endswith("QuestionAnswering") else {"classifier"})


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_untouched(model: nn.Module, before: dict[str, Tensor], modules: list[nn.Module]) -> None:
    assert list(model.modules()) == modules
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)
    assert float_reasons(model) == {}


# ---- transformers' models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_encoder_linears_are_quantized_and_heads_stay_float(name: str) -> None:
    model = _model(name)
    linears, expected = _linears(model), _outputs(model)
    assert quantize_(model, "w8a8+none") is model
    assert _linears(model) == _heads(name)
    quantized = {each for each, module in model.named_modules() if isinstance(module, QLinear)}
    assert quantized == linears - _heads(name)
    assert len(quantized) >= 12  # six a layer
    assert not any(isinstance(module, QEmbedding | QTiedLinear) for module in model.modules())
    for found, exact in zip(_outputs(model), expected, strict=True):
        assert found.shape == exact.shape
        assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("name", CLASSES)
def test_embeddings_are_quantized_on_request_and_tied_heads_follow(name: str) -> None:
    model = _model(name)
    tied = {
        each
        for each, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is model.get_input_embeddings().weight
    }
    expected = _outputs(model)
    quantize_(model, Recipe("w8a8", "w8"))
    left = [each for each, module in model.named_modules() if isinstance(module, nn.Embedding)]
    assert all(each.endswith("relative_attention_bias") for each in left)
    assert {each for each, module in model.named_modules() if isinstance(module, QTiedLinear)} == tied
    assert _linears(model) == _heads(name) - tied
    for found, exact in zip(_outputs(model), expected, strict=True):
        assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.98


def test_tied_heads_exist_where_they_should() -> None:
    """The test above would pass if nothing were tied."""
    for family in CONFIGS:
        model = quantize_(_model(f"{family}ForMaskedLM"), Recipe("w8a8", "w8"))
        tied = [module for module in model.modules() if isinstance(module, QTiedLinear)]
        assert len(tied) == 1
        assert tied[0].owner is model.get_input_embeddings()


def test_an_untied_head_is_not_tied() -> None:
    model = _model("BertForMaskedLM", tie_word_embeddings=False)
    quantize_(model, Recipe("w8a8", "w8"))
    assert isinstance(model.cls.predictions.decoder, nn.Linear)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16-g32", "gobo3", "gobo4a8"])
def test_other_schemes_run_in_a_model(scheme: str) -> None:
    model = quantize_(_model("BertForMaskedLM"), Recipe(scheme, "gobo4"))
    assert all(output.isfinite().all() for output in _outputs(model))
    schemes = {module.scheme.name for module in model.modules() if isinstance(module, QLinear)}
    assert schemes == {scheme}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_half_precision(dtype: torch.dtype) -> None:
    model = quantize_(_model().to(dtype), Recipe("w8a8", "w8"))
    assert _outputs(model)[0].dtype == dtype
    assert model.embeddings.word_embeddings(_ids(model)).dtype == dtype
    assert model.pooler.dense.scale.dtype == torch.float32


def test_quantizing_a_part_leaves_the_rest() -> None:
    model = _model("BertForSequenceClassification")
    quantize_(model.bert.encoder.layer[1], "w8a8+none")
    assert isinstance(model.bert.encoder.layer[0].output.dense, nn.Linear)
    assert isinstance(model.bert.encoder.layer[1].output.dense, QLinear)
    assert _outputs(model)[0].isfinite().all()


class _SentenceEncoder(nn.Module):
    """As sentence-transformers': a module in a list, with the transformers model in an attribute of it."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Module()
        inner.auto_model = _model("BertModel")
        self.stages = nn.ModuleList([inner, nn.Linear(64, 32)])

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.stages[0].auto_model(input_ids=ids).last_hidden_state
        return nn.functional.normalize(self.stages[1](hidden.mean(dim=1)), dim=-1)


@torch.no_grad()
def test_a_wrapper_around_a_transformers_model() -> None:
    wrapper = _SentenceEncoder().eval()
    ids = _ids(wrapper)
    exact = wrapper(ids)
    quantize_(wrapper, Recipe("w8a8", "w8"))
    inner = wrapper.stages[0].auto_model
    assert isinstance(inner.encoder.layer[0].output.dense, QLinear)
    assert isinstance(wrapper.stages[1], QLinear)
    assert nn.functional.cosine_similarity(wrapper(ids), exact).min() > 0.99
    assert set(inner.config.quantization_config.record.modules) == set(collect_specs(inner))
    dequantize_(wrapper)
    assert not hasattr(inner.config, "quantization_config")
    assert not getattr(inner, "is_quantized", False)


# ---- plain torch models ---------------------------------------------------------------------------------------------


def test_sequential_and_nested_containers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(11, 64),
        nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.ModuleList([nn.Linear(64, 8, bias=False), nn.ReLU()])}),
    )
    quantize_(model, Recipe("w4a8", "w4"))
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, QuantizedModule)}
    assert kinds == {"0": QEmbedding, "1.a": QLinear, "1.b.0": QLinear}
    assert model[1]["b"][0].bias is None


@torch.no_grad()
def test_a_module_that_stands_in_several_places_stays_one() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(shared, nn.Linear(16, 4)))
    x = torch.randn(3, 16)
    exact = model(x)
    quantize_(model, "w8a8+none")
    assert isinstance(model[0], QLinear)
    assert model[0] is model[2] is model[3][0]
    assert len([module for module in model.modules() if isinstance(module, QLinear)]) == 2
    assert torch.allclose(model(x), exact, atol=0.02)
    dequantize_(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2] is model[3][0]


class _TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.second.weight = self.third.weight = self.first.weight


@torch.no_grad()
def test_linears_that_share_a_weight_stay_tied() -> None:
    torch.manual_seed(0)
    model = _TiedLinears()
    biases = model.first.bias, model.second.bias
    quantize_(model, "w8a8+none")
    assert isinstance(model.first, QLinear)
    assert isinstance(model.second, QTiedLinear)
    assert isinstance(model.third, QTiedLinear)
    assert model.second.owner is model.third.owner is model.first
    assert (model.first.bias, model.second.bias, model.third.bias) == (*biases, None)
    x = torch.randn(5, 16)
    assert torch.equal(model.second(x), model.third(x) + model.second.bias)
    assert torch.equal(model.first(x), model.third(x) + model.first.bias)
    dequantize_(model)
    assert model.second.weight is model.third.weight is model.first.weight


class _LanguageModel(nn.Module):
    """The head comes first in the order of modules, the embedding it is tied to later."""

    def __init__(self, **embedding: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(64, 20, bias=False)
        self.words = nn.Embedding(20, 64, **embedding)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


@torch.no_grad()
def test_the_embedding_owns_a_weight_that_a_linear_shares() -> None:
    model, ids = _LanguageModel(), torch.arange(20)
    exact = model(ids)
    quantize_(model, Recipe("w8a8", "w8"))
    assert isinstance(model.head, QTiedLinear)
    assert model.head.owner is model.words
    assert torch.allclose(model(ids), exact, atol=0.5, rtol=0.02)
    dequantize_(model)
    assert type(model.head) is nn.Linear
    assert type(model.words) is nn.Embedding
    assert model.head.weight is model.words.weight


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe("w8a8"), "the recipe leaves embeddings float"),
        (Recipe("w8a8", "w8", exclude=["head"]), "shares its weight with 0.head: excluded by 'head'"),
        (Recipe("w8a8", "w8", overrides={"head": None}), "shares its weight with 0.head: override 'head'"),
        (Recipe("w8a8", "w8", exclude=["words"]), "excluded by 'words'"),
    ],
    ids=["no_embedding_scheme", "head_excluded", "head_overridden", "embedding_excluded"],
)
def test_a_shared_weight_is_quantized_everywhere_or_nowhere(recipe: Recipe, reason: str) -> None:
    model = nn.Sequential(_LanguageModel(), nn.Linear(20, 20))
    quantize_(model, recipe)
    assert model[0].head.weight is model[0].words.weight
    assert float_reasons(model)["0.words"] == reason
    assert float_reasons(model)["0.head"] == "tied to 0.words"
    assert isinstance(model[1], QLinear)


def test_a_head_on_the_skip_list_follows_its_quantized_embedding() -> None:
    model = _LanguageModel()
    quantize_(model, Recipe("w8a8", "w8", keep_float=["head"]))
    assert isinstance(model.head, QTiedLinear)


def test_embeddings_that_share_a_weight_stay_float() -> None:
    model = nn.Sequential(nn.Embedding(9, 64), nn.Embedding(9, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    quantize_(model, Recipe("w8a8", "w8"))
    assert type(model[0]) is type(model[1]) is nn.Embedding
    assert "2 embeddings share the weight" in float_reasons(model)["0"]


@torch.no_grad()
def test_torchs_own_transformer_blocks_stay_float() -> None:
    """They hand the weights to fused functions; a quantized module in there would not be asked."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.ModuleDict({"blocks": nn.TransformerEncoder(layer, 2), "last": nn.Linear(16, 16)}).eval()
    x = torch.randn(2, 5, 16)
    exact = model["blocks"](x)
    quantize_(model, "w8a8+none")
    assert isinstance(model["last"], QLinear)
    assert torch.equal(model["blocks"](x), exact)
    reasons = float_reasons(model)
    assert reasons["blocks.layers.0.linear1"] == "torch's TransformerEncoderLayer reads the weight directly"
    assert not any(isinstance(module, QuantizedModule) for module in model["blocks"].modules())


@torch.no_grad()
def test_multihead_attention_stays_float() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.MultiheadAttention(16, 2), nn.Linear(16, 16)]).eval()
    x = torch.randn(5, 1, 16)
    exact = model[0](x, x, x)[0]
    quantize_(model, "w8a8+none")
    assert isinstance(model[1], QLinear)
    assert torch.equal(model[0](x, x, x)[0], exact)


def test_a_weight_shared_with_torchs_own_block_stays_float() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32)
    outside, other = nn.Linear(16, 32), nn.Linear(16, 16)
    outside.weight = block.linear1.weight
    model = nn.ModuleDict({"outside": outside, "block": block, "other": other})
    quantize_(model, "w8a8+none")
    assert type(block.linear1) is type(model["outside"]) is nn.Linear
    assert block.linear1.weight is model["outside"].weight
    assert isinstance(model["other"], QLinear)


@torch.no_grad()
def test_weights_that_are_computed_stay_float() -> None:
    torch.manual_seed(0)
    pruned, normed, parametrized = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
    prune.l1_unstructured(pruned, "weight", 0.5)
    with pytest.warns(FutureWarning):
        weight_norm(normed)
    parametrizations.orthogonal(parametrized)
    model = nn.Sequential(pruned, normed, parametrized, nn.Linear(16, 16))
    x = torch.randn(2, 16)
    exact = model[:3](x)
    quantize_(model, "w8a8+none")
    assert isinstance(model[3], QLinear)
    assert torch.equal(model[:3](x), exact)
    reason = "its weight is computed from others (weight norm, pruning)"
    assert float_reasons(model) == {"0": reason, "1": reason}


def test_subclasses_are_left_alone() -> None:
    class OwnLinear(nn.Linear):
        pass

    model = nn.Sequential(OwnLinear(8, 8), nn.Linear(8, 8))
    quantize_(model, "w8a8+none")
    assert type(model[0]) is OwnLinear
    assert isinstance(model[1], QLinear)


def test_an_embedding_that_renormalizes_stays_float() -> None:
    model = nn.Sequential(nn.Embedding(9, 64, max_norm=1.0), nn.Embedding(9, 64))
    quantize_(model, Recipe(None, "w8"))
    assert type(model[0]) is nn.Embedding
    assert float_reasons(model)["0"] == "max_norm=1.0 rewrites the table while looking up"
    assert isinstance(model[1], QEmbedding)


def test_mode_padding_and_biases_are_carried_over() -> None:
    model = nn.Sequential(nn.Embedding(9, 64, padding_idx=3), nn.Linear(64, 8), nn.Linear(8, 8)).eval()
    model[2].train()
    bias = model[1].bias
    quantize_(model, Recipe("w8a8", "w8"))
    assert model[0].padding_idx == 3
    assert model[1].bias is bias
    assert [module.training for module in model] == [False, False, True]
    dequantize_(model)
    assert model[0].padding_idx == 3
    assert model[1].bias is bias
    assert [module.training for module in model] == [False, False, True]


@torch.no_grad()
def test_forward_hooks_are_carried_over() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    seen: list[str] = []
    before = model[0].register_forward_pre_hook(lambda module, args: seen.append(f"before {type(module).__name__}"))
    after = model[0].register_forward_hook(
        lambda module, args, kwargs, output: seen.append(f"after {type(module).__name__}"), with_kwargs=True
    )
    x = torch.randn(1, 8)
    model(x)
    quantize_(model, "w8a8+none")(x)
    dequantize_(model)(x)
    assert seen == ["before Linear", "after Linear", "before QLinear", "after QLinear", "before Linear", "after Linear"]
    before.remove()
    after.remove()
    model(x)
    assert len(seen) == 6


# ---- what is refused, and that nothing has changed then -------------------------------------------------------------


def _spoiled(value: float) -> nn.Module:
    model = _model()
    with torch.no_grad():
        model.pooler.dense.weight[3, 5] = value  # the last linear of all
    return model


@pytest.mark.parametrize("recipe", ["w8a8", "gobo3", Recipe("w4a8", "w8")], ids=["w8a8", "gobo3", "w4a8_w8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_weight_that_is_not_finite_leaves_the_model_untouched(value: float, recipe: Recipe | str) -> None:
    model = _spoiled(value)
    before, modules = _snapshot(model), list(model.modules())
    started: list[str] = []
    with pytest.raises(QBertError, match=r"pooler\.dense: weight has 1 NaN or infinite values"):
        quantize_(model, recipe, progress=lambda done, total, name: started.append(name))
    assert started == []  # every weight is looked at before the first is worked on
    _assert_untouched(model, before, modules)
    assert not hasattr(model.config, "quantization_config")


def test_a_progress_callback_that_raises_leaves_the_model_untouched() -> None:
    model = _model()
    before, modules = _snapshot(model), list(model.modules())

    def stop(done: int, total: int, name: str) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_(model, "gobo3", progress=stop)
    _assert_untouched(model, before, modules)


def test_a_weight_far_from_a_gaussian_of_encoders_leaves_the_model_untouched() -> None:
    """GOBO's threshold would keep most of these weights as outliers; this is found while quantizing, not before."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight.mul_(500)
    before, modules = _snapshot(model), list(model.modules())
    with pytest.raises(QBertError, match="1: gobo: "):
        quantize_(model, "gobo4")
    _assert_untouched(model, before, modules)


def _one(module_class: type[nn.Module], *arguments: int, **keywords: Any) -> nn.Module:
    return nn.Sequential(module_class(*arguments, **keywords))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("build", "recipe", "message"),
    [
        (lambda: _one(nn.Linear, 8, 8).double(), "w8a8", "0: weight is float64; allowed: float32, bfloat16, float16"),
        (lambda: _one(nn.Linear, 48, 8), "w4a8", "0: k is 48, which groups of 64 do not divide (scheme w4a8)"),
        (lambda: _one(nn.Linear, 64, 8), "w4a16-g128", "0: k is 64, which groups of 128 do not divide"),
        (lambda: _one(nn.Embedding, 8, 40), Recipe(None, "w4"), "0: k is 40"),
        (lambda: _one(nn.Linear, 0, 8), "w8a8", "0: weight has shape (8, 0)"),
        (lambda: _one(nn.Linear, 8, 0), "w8a8", "0: weight has shape (0, 8)"),
        (lambda: _one(nn.ReLU), "w8a8", "nothing to quantize in Sequential: it has no nn.Linear or nn.Embedding"),
        (lambda: _one(nn.Embedding, 8, 8), "w8a8+none", "nothing to quantize in Sequential: the recipe leaves"),
        (lambda: _one(nn.Linear, 8, 8), Recipe(exclude=["*"]), "nothing to quantize in Sequential: excluded by '*'"),
        (lambda: _one(nn.Linear, 8, 8, device="meta"), "w8a8", "its weight is on the meta device"),
        (lambda: nn.Linear(8, 8), "w8a8", "the model is itself an Linear"),
        (lambda: nn.Embedding(8, 8), Recipe(None, "w8"), "the model is itself an Embedding"),
        (lambda: _one(nn.Linear, 8, 8), "w9a9", "unknown scheme 'w9a9'; allowed for linears: w8a8,"),
        (lambda: _one(nn.Linear, 8, 8), Recipe(overrides={"1": "w8a8"}), "override '1' matches no linear or embedding"),
        (lambda: _one(nn.Linear, 8, 8), Recipe(overrides={"0": "w8"}), "scheme is not for linears: 'w8'"),
    ],
    ids=[
        "float64", "group_64", "group_128", "embedding_group", "k_0", "n_0", "empty", "nothing_asked", "all_excluded",
        "meta", "bare_linear", "bare_embedding", "unknown_scheme", "idle_override", "override_role",
    ],
)  # fmt: skip
def test_what_cannot_be_quantized_is_refused(
    build: Callable[[], nn.Module], recipe: Recipe | str, message: str
) -> None:
    model = build()
    modules, names = list(model.modules()), list(model.state_dict())
    with pytest.raises(QBertError) as caught:
        quantize_(model, recipe)
    assert message in str(caught.value)
    assert list(model.modules()) == modules
    assert list(model.state_dict()) == names


def test_integer_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(QBertError, match="0: weight is int8"):
        quantize_(model, "w8a8+none")


def test_quantizing_twice_is_refused() -> None:
    model = quantize_(_model(), "w8a8+none")
    before = _snapshot(model)
    with pytest.raises(QBertError, match=r"is quantized already; call qbert\.dequantize_ first"):
        quantize_(model, "w4a8")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    quantize_(dequantize_(model), "w4a8")


# ---- plan, progress, observers --------------------------------------------------------------------------------------


def test_plan_says_what_quantize_will_do_and_does_nothing() -> None:
    model = _model("BertForMaskedLM")
    before, modules = _snapshot(model), list(model.modules())
    entries = plan(model, Recipe("w8a8", "w8", exclude=["layer.1.output"]))
    _assert_untouched(model, before, modules)
    by_name = {entry.name: entry for entry in entries}
    assert by_name["bert.encoder.layer.1.output.dense"].decision.reason == "excluded by 'layer.1.output'"
    assert by_name["cls.predictions.decoder"].owner == "bert.embeddings.word_embeddings"
    assert by_name["bert.encoder.layer.0.output.dense"].decision.scheme.name == "w8a8"
    quantize_(model, Recipe("w8a8", "w8", exclude=["layer.1.output"]))
    planned = {entry.name for entry in entries if entry.decision.scheme}
    assert planned == set(collect_specs(model))
    assert {name: e.decision.reason for name, e in by_name.items() if not e.decision.scheme} == float_reasons(model)


def test_progress_counts_every_weight_once() -> None:
    model, calls = _model("BertForMaskedLM"), []
    quantize_(model, Recipe("w8a8", "w8"), progress=lambda *call: calls.append(call))
    total = len([module for module in model.modules() if isinstance(module, QuantizedModule)])
    assert [done for done, _, _ in calls] == list(range(total + 1))
    assert {each for _, each, _ in calls} == {total}
    names = [name for _, _, name in calls]
    assert names[-1] == ""
    assert set(names[:-1]) == {name for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


def test_observers_hear_of_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qbert.convert._observers", [])
    heard: list[tuple[nn.Module, Recipe | None, bool]] = []
    when_changed(lambda model, recipe: heard.append((model, recipe, isinstance(model[0], QLinear))))
    model, recipe = nn.Sequential(nn.Linear(8, 8)), Recipe("w8a16")
    quantize_(model, recipe)
    with pytest.raises(QBertError):
        quantize_(model, recipe)
    dequantize_(model)
    assert heard == [(model, recipe, True), (model, None, False)]


# ---- dequantize_ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("linear", "embedding"), [("w8a8", "w8"), ("w4a8", "w4"), ("gobo3", "gobo4")])
def test_dequantize_restores_the_model_with_the_weights_it_computed_with(linear: str, embedding: str) -> None:
    recipe, model = Recipe(linear, embedding), _model("BertForMaskedLM")
    types = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: (tensor.shape, tensor.dtype) for name, tensor in model.named_parameters(remove_duplicate=False)}
    ties = dict(model.all_tied_weights_keys)
    quantize_(model, recipe)
    weights = {name: decode(m.quantized) for name, m in model.named_modules() if isinstance(m, QuantizedModule)}
    assert dequantize_(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {n: (t.shape, t.dtype) for n, t in model.named_parameters(remove_duplicate=False)} == parameters
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert dict(model.all_tied_weights_keys) == ties
    assert not hasattr(model.config, "quantization_config")
    assert float_reasons(model) == {}


@pytest.mark.parametrize(
    ("model_dtype", "asked", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dequantized_type(model_dtype: torch.dtype, asked: torch.dtype | None, expected: torch.dtype) -> None:
    model = quantize_(_model().to(model_dtype), Recipe("w8a8", "w8"))
    exact = decode(model.pooler.dense.quantized).to(expected)
    dequantize_(model, asked)
    assert model.pooler.dense.weight.dtype == model.embeddings.word_embeddings.weight.dtype == expected
    assert torch.equal(model.pooler.dense.weight, exact)


def test_weight_only_models_compute_the_same_after_dequantize() -> None:
    model = quantize_(_model(), Recipe("gobo3", "w8"))
    before = _outputs(model)
    dequantize_(model)
    for found, expected in zip(_outputs(model), before, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_dequantizing_a_float_model_is_refused() -> None:
    with pytest.raises(QBertError, match="Sequential has no quantized module; nothing to dequantize"):
        dequantize_(nn.Sequential(nn.Linear(8, 8)))


# ---- install_ -------------------------------------------------------------------------------------------------------


def test_install_puts_empty_modules_where_a_checkpoint_says() -> None:
    quantized = quantize_(_model("BertForMaskedLM"), Recipe("gobo3", "w8"))
    specs = collect_specs(quantized)
    with torch.device("meta"):
        skeleton = transformers.BertForMaskedLM(copy.deepcopy(CONFIGS["Bert"]))
    install_(skeleton, specs, Recipe("gobo3", "w8"))
    assert collect_specs(skeleton) == specs
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in quantized.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in skeleton.state_dict().items()} == expected
    assert float_reasons(skeleton) == float_reasons(quantized)


def _spec(**changes: Any) -> ModuleSpec:
    return ModuleSpec(**({"kind": "linear", "scheme": "w8a8", "shape": (4, 8)} | changes))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"2": _spec()}, "modules.2: must name a module of Sequential"),
        ({"": _spec()}, "modules.: must be an Linear in the model, got Sequential"),
        ({"0.weight": _spec()}, "modules.0.weight: must name a module"),
        ({"0": _spec(kind="embedding", scheme="w8")}, "modules.0: must be an Embedding in the model, got Linear"),
        ({"1": _spec()}, "modules.1: must be an Linear in the model, got ReLU"),
        ({"0": _spec(shape=(8, 4))}, "modules.0.shape: must be [4, 8], got [8, 4]"),
        ({"0": _spec(kind="tied_linear", tied_to="9")}, "modules.0.tied_to: must name a quantized module"),
        ({"0": _spec(kind="tied_linear", tied_to="0")}, "modules.0.tied_to: must name a quantized module"),
    ],
)
def test_install_refuses_what_does_not_fit(specs: dict[str, ModuleSpec], message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    with pytest.raises(CheckpointError) as caught:
        install_(model, specs, Recipe())
    assert message in str(caught.value)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (0, 8)}, {"shape": (4, -8)}, {"shape": (2**31, 8)}, {"shape": (4,)}, {"shape": (4, 8, 1)},
        {"outliers": 1}, {"scheme": "gobo3", "outliers": 33}, {"scheme": "gobo3", "outliers": -1}, {"scheme": "w4a8"},
        {"scheme": "w9"}, {"scheme": "w8"}, {"kind": "conv"}, {"tied_to": "x"}, {"kind": "tied_linear"}, {"bits": 8},
    ],
    ids=str,
)  # fmt: skip
def test_specs_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        _spec(**changes)


def test_public_names() -> None:
    assert qbert.quantize_ is quantize_
    assert qbert.dequantize_ is dequantize_
