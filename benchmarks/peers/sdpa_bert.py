"""BERT's encoder in a few torch calls a layer, on the weights of transformers' BertModel: what a careful user of a GPU writes.

Query, key and value are one product; attention is `scaled_dot_product_attention` on a padded batch, or `varlen_attn` on tokens
that lie one after the other without padding. A test holds both to BertModel's results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# (query, key, value), each (tokens, heads, head size), with cu_seqlens and the longest length -> (tokens, heads, head size)
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


class _Layer(nn.Module):
    """One layer's weights, query, key and value put together.

    Buffers, not mere attributes: what torch.compile does not know to stay where it is, its CUDA graphs copy in every call.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor

    def __init__(self, layer: Any, heads: int) -> None:
        super().__init__()
        own, self.heads = layer.attention.self, heads
        projections = (own.query, own.key, own.value)
        self.register_buffer("qkv_weight", torch.cat([each.weight for each in projections]).detach())
        self.register_buffer("qkv_bias", torch.cat([each.bias for each in projections]).detach())
        self.attention, self.inner, self.output = layer.attention.output, layer.intermediate.dense, layer.output

    def qkv(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., 3, heads, head size)."""
        return F.linear(x, self.qkv_weight, self.qkv_bias).unflatten(-1, (3, self.heads, -1))

    def rest(self, x: Tensor, context: Tensor) -> Tensor:
        """(..., hidden) of the layer's input and of its attention -> the layer's output."""
        x = self.attention.LayerNorm(self.attention.dense(context) + x)
        y: Tensor = self.output.LayerNorm(self.output.dense(F.gelu(self.inner(x))) + x)
        return y


class SdpaBert(nn.Module):
    """On padded batches."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.embeddings = bert.embeddings
        self.layers = _layers(bert)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(batch, width) int64 each -> (batch, width, hidden); no mask where nothing is padding."""
        x: Tensor = self.embeddings(input_ids=input_ids)
        seen = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        layers: Any = self.layers
        for layer in layers:
            query, key, value = (each.transpose(1, 2) for each in layer.qkv(x).unbind(2))
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
            x = layer.rest(x, context.transpose(1, 2).flatten(2))
        return x


class PackedBert(nn.Module):
    """On tokens without padding.

    Args:
        varlen: attention within the sequences; torch's own by default.
    """

    def __init__(self, bert: Any, varlen: Varlen | None = None) -> None:
        super().__init__()
        self.embeddings = bert.embeddings
        self.layers = _layers(bert)
        self._varlen = varlen or _torch_varlen()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, width) int64 each -> (batch, width, hidden), zeros at padding. Taking it off and putting it back included."""
        batch, width = input_ids.shape
        kept = attention_mask.flatten().nonzero().flatten()
        lengths = attention_mask.sum(1, dtype=torch.int32)
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        packed = self.encode(input_ids.flatten()[kept], kept % width, cu_seqlens, width)
        padded = packed.new_zeros(batch * width, packed.shape[1]).index_copy_(0, kept, packed)
        return padded.view(batch, width, -1)

    def encode(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """(tokens,) int64 ids and positions -> (tokens, hidden)."""
        x = self.embeddings(input_ids=ids[None], position_ids=positions[None])[0]
        layers: Any = self.layers
        for layer in layers:
            query, key, value = layer.qkv(x).unbind(1)
            x = layer.rest(x, self._varlen(query, key, value, cu_seqlens, longest).flatten(1))
        return x


def _layers(bert: Any) -> nn.ModuleList:
    return nn.ModuleList(_Layer(each, int(bert.config.num_attention_heads)) for each in bert.encoder.layer)


def _torch_varlen() -> Varlen:
    from torch.nn.attention.varlen import varlen_attn

    function: Any = varlen_attn
    return lambda query, key, value, offsets, longest: function(query, key, value, offsets, offsets, longest, longest)
