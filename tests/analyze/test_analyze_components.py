"""Every linear, norm and table of the five families has a component, with every task head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from qbert.analyze import Component, analyze
from qbert.analyze.components import component_of

HIDDEN, FFN, LAYERS, HEADS, VOCAB = 32, 64, 2, 4, 100
BERT_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
CONFIGS: dict[str, dict[str, int]] = {
    "Bert": BERT_LIKE,
    "Roberta": BERT_LIKE,
    "DistilBert": {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": FFN, "n_layers": LAYERS, "n_heads": HEADS},
    "Electra": {**BERT_LIKE, "embedding_size": HIDDEN // 2},
    "MPNet": BERT_LIKE,
}
# Whose layers' parameters and products are counted in tests of their own: shared, or gated.
OTHERS: dict[str, dict[str, int]] = {
    "Albert": {**BERT_LIKE, "embedding_size": HIDDEN // 2},
    "ModernBert": {
        **BERT_LIKE,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
}
HEADS_OF_ALL = (
    "Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification",
    "ForQuestionAnswering",
)  # fmt: skip
CLASSES = [
    *(f"{family}{head}" for family in CONFIGS for head in HEADS_OF_ALL),
    "BertForPreTraining", "BertForNextSentencePrediction", "BertLMHeadModel", "RobertaForCausalLM",
    "ElectraForPreTraining", "ElectraForCausalLM", "AlbertModel", "ModernBertModel",
]  # fmt: skip


def tiny(name: str, device: str = "meta") -> Any:
    configs = CONFIGS | OTHERS
    family = next(each for each in configs if name.startswith(each))
    config = getattr(transformers, f"{family}Config")(**configs[family])
    with torch.device(device):
        return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize("name", CLASSES)
def test_no_weight_is_other(name: str) -> None:
    model = tiny(name)
    result = analyze(model, batch=2, seq=16, target="h100", measure=False)
    other = result.component(Component.OTHER)
    assert (other.parameters, other.matmul_flops) == (0, 0)
    assert not result.uncounted_ops


@pytest.mark.parametrize("name", CLASSES)
def test_sums_are_the_totals(name: str) -> None:
    model = tiny(name)
    result = analyze(model, batch=2, seq=16, target="h100", measure=False)
    assert result.total.parameters == sum(parameter.numel() for parameter in model.parameters())
    for field in ("parameters", "weight_bytes", "matmul_flops", "vector_flops", "bytes_moved", "launches"):
        assert sum(getattr(row, field) for row in result.components) == getattr(result.total, field), field
    assert sum(row.bytes_at_peak for row in result.components) == result.total.peak_bytes
    assert sum(row.predicted.ms for row in result.components) == pytest.approx(result.total.predicted.ms)


@pytest.mark.parametrize("family", CONFIGS)
def test_layer_parameters_by_hand(family: str) -> None:
    result = analyze(tiny(f"{family}Model"), batch=1, seq=8, target="h100", measure=False)
    square = HIDDEN * HIDDEN + HIDDEN
    expected = {
        Component.QKV_LINEARS: LAYERS * 3 * square,
        Component.ATTENTION_OUTPUT: LAYERS * square,
        Component.FFN: LAYERS * (2 * HIDDEN * FFN + FFN + HIDDEN),
        Component.NORMS: LAYERS * 2 * 2 * HIDDEN,
        # MPNet's scores have a table of 32 relative positions
        Component.ATTENTION_SCORES: 32 * HEADS if family == "MPNet" else 0,
    }
    assert {component: result.component(component).parameters for component in expected} == expected


def test_parameters_of_shared_and_gated_layers_by_hand() -> None:
    square = HIDDEN * HIDDEN + HIDDEN
    albert = analyze(tiny("AlbertModel"), batch=1, seq=8, target="h100", measure=False)
    modern = analyze(tiny("ModernBertModel"), batch=1, seq=8, target="h100", measure=False)
    assert albert.component(Component.QKV_LINEARS).parameters == 3 * square
    assert albert.component(Component.FFN).parameters == 2 * HIDDEN * FFN + FFN + HIDDEN
    assert albert.component(Component.NORMS).parameters == 2 * 2 * HIDDEN
    assert modern.component(Component.QKV_LINEARS).parameters == LAYERS * 3 * HIDDEN * HIDDEN
    assert modern.component(Component.FFN).parameters == LAYERS * 3 * HIDDEN * FFN
    assert (
        modern.component(Component.NORMS).parameters == LAYERS * 2 * HIDDEN
    )  # the first has one less, the end one more


@pytest.mark.parametrize("family", CONFIGS)
def test_flops_agree_with_torch(family: str) -> None:
    # eager attention: torch's own counter does not know the fused one of the CPU
    model = tiny(f"{family}Model", "cpu")
    model.config._attn_implementation = "eager"
    result = analyze(model, batch=3, seq=9, target="h100", measure=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.full((3, 9), 7))
    assert result.total.matmul_flops == counter.get_total_flops()


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Electra"])
def test_flops_do_not_depend_on_the_attention_kernel(family: str) -> None:
    model = tiny(f"{family}Model", "cpu")
    flops = []
    for implementation in ("eager", "sdpa"):
        model.config._attn_implementation = implementation
        result = analyze(model, batch=3, seq=9, target="h100", measure=False)
        flops.append([row.matmul_flops for row in result.components])
    assert flops[0] == flops[1]


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("encoder.layer.11.attention.output.dense", Component.ATTENTION_OUTPUT),
        ("encoder.layer.11.output.dense", Component.FFN),
        ("bert.encoder.layer.0.attention.self.query.inner", Component.QKV_LINEARS),  # wrapped by something
        ("encoder.layer.0.crossattention.self.query", Component.OTHER),
        ("", Component.OTHER),
        ("classifier_of_something", Component.OTHER),
    ],
)
def test_component_of(name: str, component: Component) -> None:
    assert component_of(name) is component
