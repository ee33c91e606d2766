"""Task heads stay float by default, in every class of every family; DeBERTa's relative tables do, whatever the recipe."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import qbert
from qbert import Recipe
from qbert.formats import Role, scheme_names
from qbert.modules import QEmbedding, QLinear, QTiedLinear

SIZES = {
    "vocab_size": 97, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 40, "pad_token_id": 1,
}  # fmt: skip
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}
CONFIGS: dict[str, PretrainedConfig] = {
    "Bert": transformers.BertConfig(**SIZES),
    "Roberta": transformers.RobertaConfig(**SIZES),
    "XLMRoberta": transformers.XLMRobertaConfig(**SIZES),
    "Camembert": transformers.CamembertConfig(**SIZES),
    "Data2VecText": transformers.Data2VecTextConfig(**SIZES),
    "Electra": transformers.ElectraConfig(**SIZES, embedding_size=32),
    "DistilBert": transformers.DistilBertConfig(
        vocab_size=97, dim=128, n_layers=2, n_heads=2, hidden_dim=128, max_position_embeddings=40, pad_token_id=1
    ),
    "MPNet": transformers.MPNetConfig(**SIZES),
    "Albert": transformers.AlbertConfig(**SIZES, embedding_size=32),
    "ModernBert": transformers.ModernBertConfig(**SIZES),
    "BertGeneration": transformers.BertGenerationConfig(**SIZES),
    "Deberta": transformers.DebertaConfig(**SIZES, **RELATIVE),
    "DebertaV2": transformers.DebertaV2Config(**SIZES, **RELATIVE, norm_rel_ebd="layer_norm", share_att_key=True),
}
POOLER = "pooler"  # of the encoder, by its name, even where DeBERTa's classes hold it beside the encoder


def _classes() -> list[tuple[type[PreTrainedModel], PretrainedConfig]]:
    """Every class with a head of these families that transformers has."""
    found = []
    for config in CONFIGS.values():
        module = inspect.getmodule(transformers.AutoModel._model_mapping[type(config)])
        for name in module.__all__:
            kind = getattr(module, name)
            headless = name.endswith(("PreTrainedModel", "Model", "Encoder", "Layer")) and not name.endswith(
                "LMHeadModel"
            )
            if inspect.isclass(kind) and issubclass(kind, PreTrainedModel) and not headless:
                found.append((kind, config))
    return found


CLASSES = _classes()
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "decoder": {"is_decoder": True},
    "new lm head": {"legacy": False},  # DeBERTa's
}


def random_model(kind: type[PreTrainedModel], config: PretrainedConfig, **changes: object) -> PreTrainedModel:
    """Weights so large that what a layer does is seen."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


def names(model: nn.Module, *kinds: type[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def test_all_families_have_their_classes() -> None:
    assert len(CLASSES) >= 60
    for name in ("AlbertForPreTraining", "ModernBertForMaskedLM", "DebertaV2ForMaskedLM", "BertGenerationDecoder"):
        assert name in {kind.__name__ for kind, _ in CLASSES}


@pytest.mark.parametrize(("kind", "config"), CLASSES, ids=lambda each: getattr(each, "__name__", ""))
def test_the_encoder_is_quantized_and_nothing_else(kind: type[PreTrainedModel], config: PretrainedConfig) -> None:
    for variant in (changes for changes in VARIANTS.values() if all(hasattr(config, name) for name in changes)):
        model = random_model(kind, config, **variant)
        linears = names(model, nn.Linear)
        encoder = f"{model.base_model_prefix}."
        expected = {each for each in linears if each.startswith(encoder) or POOLER in each.split(".")}
        assert expected, "the base model is where its prefix says"
        qbert.quantize_(model, "w8a8+none")
        assert names(model, QLinear, QTiedLinear) == expected
        assert names(model, nn.Linear) == linears - expected


# ---- DeBERTa --------------------------------------------------------------------------------------------------------

DEBERTA = {
    "v1": (transformers.DebertaModel, CONFIGS["Deberta"], {}),
    "v1 talking heads": (transformers.DebertaModel, CONFIGS["Deberta"], {"talking_head": True}),
    "v2": (transformers.DebertaV2Model, CONFIGS["DebertaV2"], {}),
    "v2 own projections": (transformers.DebertaV2Model, CONFIGS["DebertaV2"], {"share_att_key": False, "norm_rel_ebd": "none"}),
    "v3": (transformers.DebertaV2Model, CONFIGS["DebertaV2"],
           {"position_buckets": 8, "position_biased_input": False, "type_vocab_size": 0}),
}  # fmt: skip
IDS = torch.randint(5, 97, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, -4:] = 0


def in_autocast(model: nn.Module) -> torch.Tensor | str:
    """Hidden states, or what stands in the way: v1's biases of queries are no linears and stay float32, and so does the least
    score, which bfloat16 cannot hold, quantized or not."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden: torch.Tensor = model(IDS, attention_mask=MASK)[0]
            return hidden
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("version", DEBERTA)
@torch.no_grad()
def test_deberta_runs_under_every_scheme(version: str) -> None:
    kind, config, changes = DEBERTA[version]
    recipes = [Recipe(scheme) for scheme in scheme_names(Role.LINEAR)]
    recipes += [Recipe("w8a8", scheme) for scheme in scheme_names(Role.EMBEDDING)]
    for recipe in recipes:
        model = random_model(kind, config, **changes)
        tables = {name: each.weight for name, each in model.named_modules() if name.endswith("rel_embeddings")}
        assert len(tables) == 1
        qbert.quantize_(model, recipe, fuse=True)  # which says that it is not
        assert all(model.get_submodule(name).weight is table for name, table in tables.items())
        assert bool(names(model, QEmbedding)) == (recipe.embedding is not None)
        found = model(IDS, attention_mask=MASK)[0]
        cast = in_autocast(model)
        expected = qbert.dequantize_(model)(IDS, attention_mask=MASK)[0]  # what the codes stand for
        assert cosine(found[MASK.bool()], expected[MASK.bool()]) > 0.995, recipe
        expected = in_autocast(model)
        if isinstance(expected, str):
            assert version.startswith("v1")
            assert cast == expected
        else:
            assert cast.dtype == expected.dtype
            assert cosine(cast[MASK.bool()], expected[MASK.bool()]) > 0.99, recipe


@pytest.mark.parametrize("legacy", [True, False])
@torch.no_grad()
def test_debertas_words_are_predicted_from_a_quantized_table(legacy: bool) -> None:
    """The newer head multiplies with the word table's weight, past its forward."""
    for kind, family in (
        (transformers.DebertaForMaskedLM, "Deberta"),
        (transformers.DebertaV2ForMaskedLM, "DebertaV2"),
    ):
        model = random_model(kind, CONFIGS[family], legacy=legacy)
        expected = model(IDS).logits
        qbert.quantize_(model, Recipe("w8a8", "w8"))
        assert cosine(model(IDS).logits, expected) > 0.995
