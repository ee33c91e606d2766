"""The real quantized modules: same logical parameters and FLOPs as the float model, true bytes."""

from __future__ import annotations

import copy

import pytest
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from qbert.analyze import AnalyzeResult, Component, analyze
from qbert.convert import quantize_
from qbert.recipe import Recipe

HIDDEN, FFN = 64, 128
LINEARS = (Component.QKV_LINEARS, Component.ATTENTION_OUTPUT, Component.FFN)


@pytest.fixture(scope="module")
def model() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=200, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=4
    )
    return BertForMaskedLM(config)


def analyzed(model: nn.Module) -> AnalyzeResult:
    return analyze(model, batch=2, seq=16, target="h100", dtype="fp16", measure=False)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16", "gobo3"])
def test_linears(model: BertForMaskedLM, scheme: str) -> None:
    before, after = analyzed(model), analyzed(quantize_(copy.deepcopy(model), scheme))
    for component in Component:
        rows = before.component(component), after.component(component)
        assert rows[0].parameters == rows[1].parameters
        assert rows[0].matmul_flops == rows[1].matmul_flops
    for component in LINEARS:
        assert after.component(component).weight_bytes < 0.4 * before.component(component).weight_bytes
        assert after.component(component).bytes_moved < before.component(component).bytes_moved
    assert not after.uncounted_ops


def test_tied_table(model: BertForMaskedLM) -> None:
    quantized = quantize_(copy.deepcopy(model), Recipe("w8a8", embedding="w8"))
    before, after = analyzed(model), analyzed(quantized)
    assert after.total.parameters == before.total.parameters
    assert after.component(Component.POOLER_HEAD).matmul_flops == before.component(Component.POOLER_HEAD).matmul_flops
