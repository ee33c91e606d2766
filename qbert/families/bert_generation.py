"""BERT as the encoder of a sequence-to-sequence model (Rothe et al., 2020): no token types, no pooler."""

from __future__ import annotations

from dataclasses import replace

from qbert.families import bert
from qbert.families.family import COUNTING, part

FAMILY = replace(
    bert.FAMILY,
    name="BERT-generation",
    models=("transformers.models.bert_generation.modeling_bert_generation.BertGenerationEncoder",),
    arguments=tuple(name for name in bert.FAMILY.arguments if name != "token_type_ids"),
    output="BaseModelOutputWithPastAndCrossAttentions",
    embeddings=replace(bert.FAMILY.embeddings, token_types=None),
    stock={
        **bert.FAMILY.stock,
        "embeddings": part("*Embeddings", buffers={"position_ids": COUNTING}),
        "encoder": part("BertEncoder"),
    },
    pool=None,
    poolers=(),
    readers=(),
)
