"""Which component of the "BERT Breakdown" every module of a BERT-type encoder, or step of a fused one, belongs to, as data.

The components are those of Ganesh et al., "Compressing Large-Scale Transformer-Based Models: A Case Study on BERT"
(TACL 2021), figure 3. A name that no pattern knows is `Component.OTHER`: shown, never dropped.
"""

from __future__ import annotations

import enum
import functools
import re

from qbert.families import TASK_HEADS


class Component(enum.StrEnum):
    """One row of the breakdown, in the order in which a token meets them."""

    EMBEDDINGS = "embeddings"  # all tables, their LayerNorm, ELECTRA's projection to the hidden size
    QKV_LINEARS = "qkv_linears"
    ATTENTION_SCORES = "attention_scores"  # QK^T, softmax, PV, and the reshapes around them
    ATTENTION_OUTPUT = "attention_output"  # the linear after the heads
    FFN = "ffn"  # both linears and the activation between them
    NORMS = "norms"  # residual add + LayerNorm of the encoder layers
    POOLER_HEAD = "pooler_head"
    OTHER = "other"


LABELS: dict[Component, str] = {
    Component.EMBEDDINGS: "embeddings",
    Component.QKV_LINEARS: "QKV linears",
    Component.ATTENTION_SCORES: "attention scores",
    Component.ATTENTION_OUTPUT: "attention output",
    Component.FFN: "FFN",
    Component.NORMS: "add + norm",
    Component.POOLER_HEAD: "pooler / head",
    Component.OTHER: "other",
}

# Every pattern begins at a dot or at the start, so the same names are found under "bert.", "roberta.", "distilbert."...
_START = r"(?:^|\.)"
_END = r"(?:\.|$)"  # the module itself and whatever a wrapper put below it
_BERT_LAYER = _START + r"encoder\.layer\.\d+"  # BERT, RoBERTa, ELECTRA, MPNet
_DISTIL_LAYER = _START + r"transformer\.layer\.\d+"
_ALBERT_LAYER = _START + r"albert_layer_groups\.\d+\.albert_layers\.\d+"
_MODERN_LAYER = _START + r"layers\.\d+"

_HEAD_NAMES = ("pooler", "pooler_activation", *TASK_HEADS, "vocab_layer_norm")  # the last is DistilBERT's

# First match wins: leaves stand before the containers whose own (functional) work is what is left of them.
PATTERNS: tuple[tuple[Component, str], ...] = (
    (Component.EMBEDDINGS, _START + r"(?:embeddings|embeddings_project|embedding_hidden_mapping_in)" + _END),
    # BERT, RoBERTa, ELECTRA
    (Component.QKV_LINEARS, _BERT_LAYER + r"\.attention\.self\.(?:query|key|value)" + _END),
    (Component.ATTENTION_SCORES, _BERT_LAYER + r"\.attention\.self(?:\.dropout)?$"),
    (Component.ATTENTION_OUTPUT, _BERT_LAYER + r"\.attention\.output\.dense" + _END),
    (Component.NORMS, _BERT_LAYER + r"\.attention\.output(?:\.LayerNorm|\.dropout)?$"),
    (Component.FFN, _BERT_LAYER + r"\.(?:intermediate|output\.dense)" + _END),
    (Component.NORMS, _BERT_LAYER + r"\.output(?:\.LayerNorm|\.dropout)?$"),
    # MPNet: its attention container adds the residual; its encoder computes the position bias of the scores
    (Component.QKV_LINEARS, _BERT_LAYER + r"\.attention\.attn\.[qkv]" + _END),
    (Component.ATTENTION_OUTPUT, _BERT_LAYER + r"\.attention\.attn\.o" + _END),
    (Component.ATTENTION_SCORES, _BERT_LAYER + r"\.attention\.attn(?:\.dropout)?$"),
    (Component.NORMS, _BERT_LAYER + r"\.attention(?:\.LayerNorm|\.dropout)?$"),
    (Component.ATTENTION_SCORES, _START + r"encoder(?:\.relative_attention_bias)?$"),
    # DistilBERT: its layer itself adds the residuals
    (Component.QKV_LINEARS, _DISTIL_LAYER + r"\.attention\.[qkv]_lin" + _END),
    (Component.ATTENTION_OUTPUT, _DISTIL_LAYER + r"\.attention\.out_lin" + _END),
    (Component.ATTENTION_SCORES, _DISTIL_LAYER + r"\.attention(?:\.dropout)?$"),
    (Component.FFN, _DISTIL_LAYER + r"\.ffn" + _END),
    (Component.NORMS, _DISTIL_LAYER + r"(?:\.sa_layer_norm|\.output_layer_norm)?$"),
    # ALBERT: its attention adds a residual besides, its layer the other
    (Component.QKV_LINEARS, _ALBERT_LAYER + r"\.attention\.(?:query|key|value)" + _END),
    (Component.ATTENTION_OUTPUT, _ALBERT_LAYER + r"\.attention\.dense" + _END),
    (Component.NORMS, _ALBERT_LAYER + r"\.attention\.(?:LayerNorm|output_dropout)$"),
    (Component.ATTENTION_SCORES, _ALBERT_LAYER + r"\.attention(?:\.attention_dropout)?$"),
    (Component.FFN, _ALBERT_LAYER + r"\.(?:ffn|ffn_output|activation)" + _END),
    (Component.NORMS, _ALBERT_LAYER + r"(?:\.full_layer_layer_norm|\.dropout)?$"),
    # ModernBERT: rotations belong to the scores
    (Component.QKV_LINEARS, _MODERN_LAYER + r"\.attn\.Wqkv" + _END),
    (Component.ATTENTION_OUTPUT, _MODERN_LAYER + r"\.attn\.Wo" + _END),
    (Component.ATTENTION_SCORES, _MODERN_LAYER + r"\.attn(?:\.out_drop)?$"),
    (Component.ATTENTION_SCORES, _START + r"rotary_emb$"),
    (Component.FFN, _MODERN_LAYER + r"\.mlp" + _END),
    (Component.NORMS, _MODERN_LAYER + r"(?:\.attn_norm|\.mlp_norm)?$"),
    (Component.NORMS, _START + r"final_norm$"),
    (Component.POOLER_HEAD, _START + f"(?:{'|'.join(_HEAD_NAMES)})" + _END),
)

_COMPILED = tuple((component, re.compile(pattern)) for component, pattern in PATTERNS)


@functools.cache
def component_of(name: str) -> Component:
    """Component of the module with this qualified name (as in `named_modules()`); OTHER where no pattern knows it."""
    for component, pattern in _COMPILED:
        if pattern.search(name):
            return component
    return Component.OTHER


# Parts of a fused encoder's program; and the steps that are another component than their part: codes are of what reads them.
_OF_PARTS: dict[str, Component] = {
    "embedding": Component.EMBEDDINGS,
    "attention linear": Component.QKV_LINEARS,
    "attention": Component.ATTENTION_SCORES,
    "ffn": Component.FFN,
    "norm": Component.NORMS,
}
_OF_STEPS: dict[str, Component] = {
    "projection codes": Component.EMBEDDINGS,
    "query, key, value codes": Component.ATTENTION_SCORES,
    "attention codes": Component.ATTENTION_OUTPUT,
    "attention output": Component.ATTENTION_OUTPUT,
    "feed-forward in codes": Component.FFN,
    "attention output, thin": Component.ATTENTION_OUTPUT,
    "attention output, thin codes": Component.ATTENTION_OUTPUT,
    "feed-forward in, thin codes": Component.FFN,
    "feed-forward out, thin codes": Component.FFN,
}


def component_of_step(name: str, part: str) -> Component:
    """Component of a fused encoder's step (`qbert.encoder.Step`) with this name and part; OTHER where neither is known."""
    return _OF_STEPS.get(name) or _OF_PARTS.get(part, Component.OTHER)
