"""ELECTRA (Clark et al., 2020): BERT without a pooler, with a projection from the embeddings' size where that is smaller."""

from __future__ import annotations

from dataclasses import replace

from qbert.families import bert
from qbert.families.family import CLASSIFIED

FAMILY = replace(
    bert.FAMILY,
    name="ELECTRA",
    models=("transformers.models.electra.modeling_electra.ElectraModel",),
    output="BaseModelOutputWithPastAndCrossAttentions",
    embeddings=replace(bert.FAMILY.embeddings, projection="embeddings_project"),
    pool=None,
    poolers=(),
    readers=(CLASSIFIED,),
)
