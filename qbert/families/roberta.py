"""RoBERTa (Liu et al., 2019) and the name-sakes that compute the same: positions count what is not padding."""

from __future__ import annotations

from dataclasses import replace

from qbert.families import bert
from qbert.families.family import CLASSIFIED, Reader, positions_after_padding

FAMILY = replace(
    bert.FAMILY,
    name="RoBERTa",
    models=(
        "transformers.models.roberta.modeling_roberta.RobertaModel",
        "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaModel",
        "transformers.models.camembert.modeling_camembert.CamembertModel",
        "transformers.models.data2vec.modeling_data2vec_text.Data2VecTextModel",
    ),
    readers=(CLASSIFIED, Reader(("*ForMultipleChoice",))),
    positions=positions_after_padding,
    skips_padding=True,
    stock={**bert.FAMILY.stock, "embeddings": replace(bert.FAMILY.stock["embeddings"], reads=("padding_idx",))},
)
