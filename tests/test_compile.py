"""`torch.compile` of an unfused quantized model: one graph, for every scheme."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_encoders import FOUR, float_model, hidden_of, padded_batch

from qbert import Recipe, quantize_
from qbert.formats import Role, scheme_names


def _compiled(model: Any, backend: str) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


def _quantized(name: str, linear: str, embedding: str | None = None) -> Any:
    sizes = dict.fromkeys(
        ("dim", "hidden_size", "embedding_size", "hidden_dim", "intermediate_size"), 128
    )  # a group of 128
    return quantize_(float_model(name, num_hidden_layers=1, n_layers=1, **sizes), Recipe(linear, embedding))


@pytest.mark.parametrize("linear", scheme_names(Role.LINEAR))
def test_every_linear_scheme_is_one_graph(linear: str) -> None:
    model, batch = _quantized("DistilBertModel", linear), padded_batch()
    assert torch.equal(hidden_of(_compiled(model, "eager"), **batch), hidden_of(model, **batch))


@pytest.mark.parametrize("embedding", scheme_names(Role.EMBEDDING))
def test_every_embedding_scheme_is_one_graph(embedding: str) -> None:
    model, batch = _quantized("DistilBertModel", "w8a8", embedding), padded_batch()
    assert torch.equal(hidden_of(_compiled(model, "eager"), **batch), hidden_of(model, **batch))


@pytest.mark.parametrize("family", FOUR)
def test_every_family_is_one_graph(family: str) -> None:
    """Traced down to operators, whose results' types and shapes the fakes must have said."""
    model, batch = _quantized(f"{family}Model", "w8a8", "w8"), padded_batch()
    assert torch.equal(hidden_of(_compiled(model, "aot_eager"), **batch), hidden_of(model, **batch))
