"""Encoders as plain graphs, on the weights of transformers' models: what ONNX Runtime and OpenVINO are given.

Their optimizers look for the attention of BERT as it was always written: three projections, a reshape, two products with a
softmax between them, an additive mask. transformers 5 builds its mask by code that torch's tracing exporter records wrongly
(results differ once the batch has another shape), and the graph of the newer exporter is one in which ONNX Runtime's optimizer
finds no attention. From these modules both find what there is to find; a test holds each to its model's results.

Padding stands on the right, so that positions are columns, for MPNet too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qbert.timing import Unavailable

OUTPUT = "last_hidden_state"
IDS_AND_MASK = ("input_ids", "attention_mask")
_BLOCKED = torch.finfo(torch.float32).min


class PlainEncoder(nn.Module):
    """One model's embeddings and layers, without its pooler.

    Attributes:
        inputs: names of what `forward` takes, in its order: ids, mask and, where the model has them, token types,
            (batch, width) int64 each. It returns (batch, width, hidden).
    """

    inputs: ClassVar[tuple[str, ...]] = (*IDS_AND_MASK, "token_type_ids")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.heads = int(model.config.num_attention_heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor) -> Tensor:
        """(batch, heads, width, head size) three times -> (batch, width, hidden); `blocked` is added to the scores."""
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        context = torch.matmul(torch.softmax(scores + blocked, dim=-1), value).permute(0, 2, 1, 3).contiguous()
        return context.view(context.shape[0], context.shape[1], context.shape[2] * context.shape[3])

    def attention_of(self, projections: Sequence[Any], x: Tensor, blocked: Tensor) -> Tensor:
        """Attention over query, key and value, each a linear of x (batch, width, hidden)."""
        query, key, value = (self._split(each(x)) for each in projections)
        return self.attend(query, key, value, blocked)

    def _split(self, x: Tensor) -> Tensor:
        """(batch, width, hidden) -> (batch, heads, width, head size)."""
        return x.view(x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads).permute(0, 2, 1, 3)


def blocked_padding(attention_mask: Tensor) -> Tensor:
    """(batch, width) of ones and zeros -> (batch, 1, 1, width): 0 at tokens, the least float at padding."""
    return (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * _BLOCKED


class PlainBert(PlainEncoder):
    """Of a `BertModel`."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.embeddings, self.layers = model.embeddings, model.encoder.layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        x = _bert_embeddings(self.embeddings, input_ids, token_type_ids)
        blocked = blocked_padding(attention_mask)
        layers: Any = self.layers
        for layer in layers:
            own = layer.attention.self
            context = self.attention_of((own.query, own.key, own.value), x, blocked)
            x = layer.attention.output.LayerNorm(layer.attention.output.dense(context) + x)
            x = _bert_feed_forward(layer, x)
        return x


class PlainMPNet(PlainEncoder):
    """Of an `MPNetModel`: a bias by the distance of two tokens, a value a head, is added to the scores of all layers."""

    inputs = IDS_AND_MASK
    biases: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.embeddings, self.layers = model.embeddings, model.encoder.layer
        self.first = int(model.embeddings.padding_idx) + 1
        self.reach = int(model.config.max_position_embeddings) - 1
        encoder = model.encoder
        buckets = encoder.relative_position_bucket(
            torch.arange(-self.reach, self.reach + 1), num_buckets=encoder.relative_attention_bias.num_embeddings
        )
        self.register_buffer("biases", encoder.relative_attention_bias.weight.detach()[buckets].T.contiguous())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeddings: Any = self.embeddings
        columns = embeddings.position_ids[0, : input_ids.shape[1]]
        positions = embeddings.position_embeddings(columns + self.first)
        x = embeddings.LayerNorm(embeddings.word_embeddings(input_ids) + positions)
        distances = columns[None, :] - columns[:, None]
        blocked = blocked_padding(attention_mask) + self.biases[:, distances + self.reach]
        layers: Any = self.layers
        for layer in layers:
            own = layer.attention.attn
            context = self.attention_of((own.q, own.k, own.v), x, blocked)
            x = layer.attention.LayerNorm(own.o(context) + x)
            x = _bert_feed_forward(layer, x)
        return x


class PlainAlbert(PlainEncoder):
    """Of an `AlbertModel`: layers share weights."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.embeddings, self.projection = model.embeddings, model.encoder.embedding_hidden_mapping_in
        self.groups = model.encoder.albert_layer_groups
        config = model.config
        self.order = [
            index * config.num_hidden_groups // config.num_hidden_layers for index in range(config.num_hidden_layers)
        ]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        x = self.projection(_bert_embeddings(self.embeddings, input_ids, token_type_ids))
        blocked = blocked_padding(attention_mask)
        groups: Any = self.groups
        for layer in (layer for group in self.order for layer in groups[group].albert_layers):
            own = layer.attention
            context = self.attention_of((own.query, own.key, own.value), x, blocked)
            x = own.LayerNorm(own.dense(context) + x)
            x = layer.full_layer_layer_norm(layer.ffn_output(layer.activation(layer.ffn(x))) + x)
        return x


class PlainModernBert(PlainEncoder):
    """Of a `ModernBertModel`: norms before the products, rotary positions, GeGLU, and windows in most layers."""

    inputs = IDS_AND_MASK

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.embeddings, self.layers, self.final_norm = model.embeddings, model.layers, model.final_norm
        self.window = int(model.config.sliding_window)
        self.kinds = list(model.config.layer_types)
        columns = torch.arange(int(model.config.max_position_embeddings))
        self.register_buffer("columns", columns)
        for kind in set(self.kinds):
            cosines, sines = model.rotary_emb(torch.empty(0), columns[None], kind)
            self.register_buffer(f"{kind}_cosines", cosines[0])
            self.register_buffer(f"{kind}_sines", sines[0])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embeddings: Any = self.embeddings
        layers: Any = self.layers
        x = embeddings.norm(embeddings.tok_embeddings(input_ids))
        blocked = self._blocked(attention_mask)
        turns = {kind: self._turns(kind, input_ids.shape[1]) for kind in set(self.kinds)}
        for kind, layer in zip(self.kinds, layers, strict=True):
            x = x + self._attention(layer, layer.attn_norm(x), blocked[kind], turns[kind])
            inner, gate = layer.mlp.Wi(layer.mlp_norm(x)).chunk(2, dim=-1)
            x = x + layer.mlp.Wo(layer.mlp.act(inner) * gate)
        normed: Tensor = self.final_norm(x)
        return normed

    def _blocked(self, attention_mask: Tensor) -> dict[str, Tensor]:
        everywhere = blocked_padding(attention_mask)
        columns = self.get_buffer("columns")[: attention_mask.shape[1]]
        far = (columns[None, :] - columns[:, None]).abs() > self.window
        # The smaller of the two, not their sum, which would not be finite.
        return {"full_attention": everywhere, "sliding_attention": torch.minimum(everywhere, far * _BLOCKED)}

    def _turns(self, kind: str, width: int) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"{kind}_cosines")[:width], self.get_buffer(f"{kind}_sines")[:width]

    def _attention(self, layer: Any, x: Tensor, blocked: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (self._split(each) for each in layer.attn.Wqkv(x).chunk(3, dim=-1))
        context: Tensor = layer.attn.Wo(self.attend(_turned(query, *turns), _turned(key, *turns), value, blocked))
        return context


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021): the halves of each head of x (batch, heads, width, head size) turn together."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


def _bert_embeddings(embeddings: Any, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
    positions = embeddings.position_embeddings(embeddings.position_ids[:, : input_ids.shape[1]])
    x = embeddings.word_embeddings(input_ids) + embeddings.token_type_embeddings(token_type_ids) + positions
    normed: Tensor = embeddings.LayerNorm(x)
    return normed


def _bert_feed_forward(layer: Any, x: Tensor) -> Tensor:
    inner = torch.nn.functional.gelu(layer.intermediate.dense(x))
    normed: Tensor = layer.output.LayerNorm(layer.output.dense(inner) + x)
    return normed


PLAIN: dict[str, type[PlainEncoder]] = {
    "bert": PlainBert, "mpnet": PlainMPNet, "albert": PlainAlbert, "modernbert": PlainModernBert,
}  # fmt: skip


def plain_encoder(model: Any) -> PlainEncoder:
    """The plain graph of a model of transformers.

    Raises:
        Unavailable: there is none of that type.
    """
    kind = model.config.model_type
    if kind not in PLAIN:
        raise Unavailable(f"no plain graph of {kind} is written for converters; there are {', '.join(PLAIN)}")
    return PLAIN[kind](model).eval()


def feed(inputs: Sequence[str], ids: Any, mask: Any) -> dict[str, Any]:
    """Arguments by name for a graph with these inputs: of arrays or tensors (batch, width); token types are all 0."""
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
    return {name: given[name] for name in inputs}
