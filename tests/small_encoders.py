"""Encoders of a few thousand weights, float and fused, and batches for them: what tests of the fused encoder share."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, DistilBertConfig, ElectraConfig, PretrainedConfig, RobertaConfig

import qbert
from qbert import Recipe, quantize_
from qbert.encoder import Calibration, Step, encoders
from qbert.testing import random_weight

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 40,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "Bert": BertConfig(**SIZES),
    "Roberta": RobertaConfig(**SIZES),
    "XLMRoberta": transformers.XLMRobertaConfig(**SIZES),
    "Camembert": transformers.CamembertConfig(**SIZES),
    "DistilBert": DistilBertConfig(
        vocab_size=97, dim=64, n_layers=2, n_heads=2, hidden_dim=128, max_position_embeddings=40
    ),
    "Electra": ElectraConfig(**SIZES, embedding_size=32),
    "Data2VecText": transformers.Data2VecTextConfig(**SIZES),
    "BertGeneration": transformers.BertGenerationConfig(**SIZES),
    "MPNet": transformers.MPNetConfig(**SIZES),
    "Albert": transformers.AlbertConfig(**SIZES, embedding_size=32),
    "ModernBert": transformers.ModernBertConfig(  # full attention, then two layers with a window of 4 tokens on each side
        **SIZES | {"num_hidden_layers": 3}, local_attention=8, pad_token_id=1, bos_token_id=2, eos_token_id=3, cls_token_id=2,
        sep_token_id=3,
    ),
}  # fmt: skip
FOUR = ("Bert", "Roberta", "DistilBert", "Electra")
EVERY = (*FOUR, "MPNet", "Albert", "ModernBert", "BertGeneration")  # one of each family
BY_DISTANCE = ("MPNet", "ModernBert")  # those whose attention goes by how far apart tokens stand
_CLASSES = {"BertGenerationModel": "BertGenerationEncoder"}  # where a bare encoder is no ...Model
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
A8 = ("w8a8", "w4a8", "gobo3a8", "gobo4a8")
VARIANTS = ("dynamic", "static")
# What int8 queries, keys, values and 8-bit probabilities may add to the error of the unfused quantized model.
LEAST_SQNR_DB = {"dynamic": 25.0, "static": 20.0}


def float_model(name: str = "BertModel", seed: int = 0, **changes: Any) -> Any:
    """Random weights with outliers, large enough that attention is not uniform."""
    family = max((family for family in CONFIGS if name.startswith(family)), key=len)
    config = copy.deepcopy(CONFIGS[family])
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = getattr(transformers, _CLASSES.get(name, name))(config).eval()
    with torch.no_grad():
        for index, module in enumerate(model.modules()):
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.copy_(random_weight(*module.weight.shape, seed=seed + index) * 3)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(std=0.1)
    return model


def padded_batch(rows: int = 4, width: int = 11, seed: int = 1, kind: str = "right") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 97, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        padding = (3 * row) % (width - 1)
        if padding and kind == "right":
            mask[row, -padding:] = 0
        elif padding and kind == "left":
            mask[row, :padding] = 0
        elif kind == "holes":
            mask[row, row::3] = 0
    pad = 1 if kind != "holes" else 0
    return {"input_ids": ids.masked_fill(mask == 0, pad) if kind != "holes" else ids, "attention_mask": mask}


def calibration_of(model: Any) -> Calibration:
    return qbert.calibrate(model, [padded_batch(8, 17, seed) for seed in range(4)])


@functools.cache
def calibrated(name: str, changes: tuple[tuple[str, Any], ...]) -> Calibration:
    return calibration_of(float_model(name, **dict(changes)))


def fused_model(
    name: str = "BertModel", variant: str = "dynamic", recipe: Recipe | str = "w8a8+none", **changes: Any
) -> Any:
    calibration = calibrated(name, tuple(changes.items())) if variant == "static" else None
    return quantize_(float_model(name, **changes), recipe, fuse=True, calibration=calibration)


def encoder_of(model: Any) -> Any:
    return next(base for _, base, _ in encoders(model))


def bound(step: Step, name: str) -> Any:
    """What a step of a program has bound under that name."""
    return dict(zip(step.run.__code__.co_freevars, step.run.__closure__ or (), strict=True))[name].cell_contents


@torch.no_grad()
def hidden_of(model: Any, **inputs: Any) -> Tensor:
    return model(**inputs)[0]
