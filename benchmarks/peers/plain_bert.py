"""BERT's encoder as a plain graph, on the weights of transformers' BertModel: what ONNX Runtime and OpenVINO are given.

Their optimizers look for the attention of BERT as it was always written: three projections, a reshape, two products with a
softmax between them, an additive mask. transformers 5 builds its mask by code that torch's tracing exporter records wrongly
(results differ once the batch has another shape), and the graph of the newer exporter is one in which ONNX Runtime's optimizer
finds no attention. From this module both find all of it; a test holds it to BertModel's results.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT = "last_hidden_state"


class PlainBert(nn.Module):
    """Embeddings and layers of a `BertModel`, without its pooler."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.embeddings = bert.embeddings
        self.layers = bert.encoder.layer
        self.heads = int(bert.config.num_attention_heads)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """(batch, width) int64 each -> (batch, width, hidden)."""
        embeddings: Any = self.embeddings
        positions = embeddings.position_embeddings(embeddings.position_ids[:, : input_ids.shape[1]])
        x = embeddings.word_embeddings(input_ids) + embeddings.token_type_embeddings(token_type_ids) + positions
        x = embeddings.LayerNorm(x)
        blocked = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
        layers: Any = self.layers
        for layer in layers:
            x = self._layer(layer, x, blocked)
        return x

    def _layer(self, layer: Any, x: Tensor, blocked: Tensor) -> Tensor:
        projections = layer.attention.self
        query, key, value = (self._split(each(x)) for each in (projections.query, projections.key, projections.value))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        context = torch.matmul(torch.softmax(scores + blocked, dim=-1), value).permute(0, 2, 1, 3).contiguous()
        context = context.view(context.shape[0], context.shape[1], context.shape[2] * context.shape[3])
        x = layer.attention.output.LayerNorm(layer.attention.output.dense(context) + x)
        inner = torch.nn.functional.gelu(layer.intermediate.dense(x))
        y: Tensor = layer.output.LayerNorm(layer.output.dense(inner) + x)
        return y

    def _split(self, x: Tensor) -> Tensor:
        """(batch, width, hidden) -> (batch, heads, width, head size)."""
        return x.view(x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads).permute(0, 2, 1, 3)
