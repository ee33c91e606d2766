"""Quantized modules in autocast: types as of the float modules that they stand for, in whole models too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qbert
from qbert import Recipe
from qbert.formats import Role, scheme_names
from tests.small_encoders import CONFIGS, encoder_of, float_model, padded_batch

DTYPES = (torch.bfloat16, torch.float16)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 48), nn.Linear(48, 64, bias=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", scheme_names(Role.LINEAR))
@torch.no_grad()
def test_a_linear_gives_autocasts_type(scheme: str, dtype: torch.dtype) -> None:
    model = small()[:1]
    quantized = qbert.quantize_(copy.deepcopy(model), scheme)
    for given in (torch.float32, *DTYPES):
        x = torch.randn(5, 128).to(given)
        with torch.autocast("cpu", dtype=dtype):
            found = quantized(x)
            assert found.dtype == model(x).dtype == dtype
            with torch.autocast("cpu", enabled=False):
                assert quantized(x).dtype == given
        assert torch.equal(found, quantized(x.to(dtype)))
    assert quantized(torch.randn(5, 128)).dtype == torch.float32


@torch.no_grad()
def test_an_embedding_and_a_tied_linear_give_the_types_of_float_ones() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(97, 64), "head": nn.Linear(64, 97)})
    model["head"].weight = model["words"].weight
    quantized = qbert.quantize_(copy.deepcopy(model), Recipe("w8a8", "w8", keep_float=()))
    ids = torch.arange(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for each in (model, quantized):
            rows = each["words"](ids)
            assert rows.dtype == torch.float32
            assert each["head"](rows).dtype == torch.bfloat16


def test_autocast_is_compiled_without_a_graph_break() -> None:
    quantized = qbert.quantize_(small(), "w8a8+none")
    compiled, x = torch.compile(quantized, fullgraph=True, backend="eager"), torch.randn(5, 128)
    with torch.no_grad():
        plain = compiled(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = compiled(x)
            assert torch.equal(cast, quantized(x))
    assert (plain.dtype, cast.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_models_in_autocast(family: str, fuse: bool) -> None:
    batch = padded_batch()
    model = encoder_of(float_model(f"{family}Model"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**batch)[0]
    quantized = qbert.quantize_(model, "w8a8+none", fuse=fuse)
    plain = quantized(**batch)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantized(**batch)[0]
    assert found.dtype == (
        plain.dtype if fuse else expected.dtype
    )  # a fused encoder's stream is of the model's own type
    kept = batch["attention_mask"].bool()
    assert torch.cosine_similarity(found[kept].float(), plain[kept], -1).min() > 0.99
