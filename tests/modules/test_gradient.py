"""Gradients pass through quantized modules to what is trained, or a call to backward says why not."""

from __future__ import annotations

import copy

import pytest
import torch
from small_encoders import VARIANTS, float_model, fused_model, padded_batch
from torch import Tensor, nn

from qbert import QBertError, Recipe, dequantize_, quantize_
from qbert.formats import Role, scheme_names
from qbert.testing import random_weight

COMPILED = ("w8a8", "gobo4")  # one whose matrix a compiler could trace, and one whose values it would have to look at


def _layers(scheme: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A quantized linear, and a float one with the weight that it stands for."""
    linear = nn.Linear(128, 64)
    with torch.no_grad():
        linear.weight.copy_(random_weight(64, 128, seed=3))
    quantized = quantize_(nn.Sequential(linear).to(dtype), Recipe(scheme))
    return quantized, dequantize_(copy.deepcopy(quantized))


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    model(x).float().square().sum().backward()
    return {"input": x.grad, **{name: each.grad for name, each in model.named_parameters() if each.grad is not None}}


def _close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= 0.03 * float(expected.norm())


@pytest.mark.parametrize("scheme", scheme_names(Role.LINEAR))
def test_gradients_are_those_of_the_weight_that_the_codes_stand_for(scheme: str) -> None:
    quantized, floats = _layers(scheme)
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0))
    found, expected = _gradients(quantized, x), _gradients(floats, x)
    assert found.keys() == {"input", "0.bias"}  # the weight is not trained
    assert all(_close(found[name], expected[name]) for name in found)


def test_gradients_are_exact_where_nothing_is_rounded() -> None:
    quantized, floats = _layers("gobo4")
    grad = torch.randn(7, 64)
    for model in (quantized, floats):
        x = torch.ones(7, 128, requires_grad=True)
        model(x).backward(grad)
        model.found = x.grad
    torch.testing.assert_close(quantized.found, floats.found)


@pytest.mark.parametrize("scheme", COMPILED)
def test_compiled_gradients_are_the_same(scheme: str) -> None:
    quantized, _ = _layers(scheme)
    x = torch.randn(4, 128)
    expected = _gradients(copy.deepcopy(quantized), x)
    torch._dynamo.reset()
    found = _gradients(torch.compile(quantized, fullgraph=True, backend="aot_eager"), x)
    assert all(torch.allclose(found[name], expected[name]) for name in ("input",))


def test_gradients_come_in_the_types_of_what_they_are_for() -> None:
    quantized, _ = _layers("w8a8", torch.bfloat16)
    found = _gradients(quantized, torch.randn(4, 128, dtype=torch.bfloat16))
    assert {each.dtype for each in found.values()} == {torch.bfloat16}
    quantized, _ = _layers("w8a8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _gradients(quantized, torch.randn(4, 128))
    assert {each.dtype for each in found.values()} == {torch.float32}


def test_nothing_of_the_input_is_kept_for_the_way_back() -> None:
    quantized, _ = _layers("w8a8")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        quantized(torch.randn(4, 128, requires_grad=True))
    assert kept == []


def test_every_float_parameter_of_a_quantized_encoder_gets_the_gradient_of_the_float_one() -> None:
    model = float_model("BertForMaskedLM")
    quantized = quantize_(copy.deepcopy(model), Recipe("w8a8", "w8"))  # its head is tied to the table
    floats = dequantize_(copy.deepcopy(quantized))
    ids = padded_batch()["input_ids"]
    for each in (quantized, floats):
        each.embeds = each.bert.embeddings.word_embeddings(ids).detach().requires_grad_()
        torch.logsumexp(each(inputs_embeds=each.embeds).logits, -1).mean().backward()
    assert torch.cosine_similarity(quantized.embeds.grad.flatten(), floats.embeds.grad.flatten(), 0) > 0.98
    expected = dict(floats.named_parameters())
    for name, parameter in quantized.named_parameters():
        if (wanted := expected[name].grad) is not None and float(wanted.norm()) > 1e-4:
            assert torch.cosine_similarity(parameter.grad.flatten(), wanted.flatten(), 0) > 0.9, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_backward_that_reaches_a_fused_encoder_says_what_to_do(variant: str) -> None:
    model, batch = fused_model("BertForSequenceClassification", variant), padded_batch()
    with pytest.raises(QBertError, match=r"has no backward: call qbert\.unfuse_\(model\) .*requires_grad_\(False\)"):
        model(**batch).logits.sum().backward()
    embeds = torch.randn(2, 6, 64, requires_grad=True)
    model.requires_grad_(False)
    with pytest.raises(QBertError, match="has no backward"):
        model(inputs_embeds=embeds).logits.sum().backward()


def test_a_head_over_a_frozen_fused_encoder_is_trained() -> None:
    model, batch = fused_model("BertForSequenceClassification"), padded_batch()
    model.bert.requires_grad_(False)
    model(**batch).logits.square().sum().backward()
    assert float(model.classifier.weight.grad.norm()) > 0


def test_what_a_fused_encoder_gives_may_be_written_to() -> None:
    hidden = fused_model()(**padded_batch()).last_hidden_state
    assert hidden.requires_grad  # as of an unfused one
    hidden.mul_(2)[:, 0] = 0
