"""QEmbedding."""

from __future__ import annotations

import torch
from torch import Tensor

from qbert import ops
from qbert.formats import Role
from qbert.modules.base import QuantizedModule
from qbert.ops.operations import Embedding
from qbert.weight import Weight


class QEmbedding(QuantizedModule):
    """`nn.Embedding` with a quantized table: rows (..., k) of integer ids (...).

    Args:
        weight: (rows, k), of an embedding scheme.
        padding_idx: as in `nn.Embedding`; kept for code that asks for it.
        dtype: of the rows; follows casts of the model.

    Raises (in forward):
        QBertError: an id outside the table.
    """

    role = Role.EMBEDDING
    operation = "embedding"
    # What libraries ask an `nn.Embedding` for before they look something up beside it.
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False

    def __init__(self, weight: Weight, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = ops.call(Embedding(ids, self.quantized, self.output_like.dtype))
        return rows

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}, layout={self.layout.value}"
