"""L7. The fused encoder: up to seven operator calls a layer on packed tokens; between them int8 and one float stream.

It holds no weights of its own: everything here is prepared from a model's quantized modules, which stay where they are.
Per layer and token: ZeroQuant's scales per token (Yao et al., 2022) after a norm, where the row is at hand anyway; elsewhere
static scales from calibration, or, without one, scales per token from one more pass over a float tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qbert.bert import EmbeddingPaths, EncoderFamily, LayerPaths
from qbert.dispatch import select_layout, tokens_at_once
from qbert.errors import QBertError
from qbert.formats import INT8, SCHEMES, Role
from qbert.layout import Layout
from qbert.nn.calibration import Calibration, LayerScales, Overflow
from qbert.nn.modules import QEmbedding, QLinear
from qbert.nn.padding import Packing, Tokens
from qbert.nn.stack import Call, linear_call, rescaled, share_rows, stacked
from qbert.nn.watch import Watch
from qbert.ops import FLOAT_DTYPES, direct
from qbert.qtensor import QuantizedTensor
from qbert.quantizers import quantize
from qbert.reference import FLOAT_TABLE, dequantize
from qbert.target import Target, target_of

# gamma, beta, eps
Norm = tuple[Tensor, Tensor, float]
# the residual stream (t, h), its codes (t, h) int8 and their scales (t,)
State = tuple[Tensor, Tensor, Tensor]


def residual_dtype(target: Target, dtype: torch.dtype) -> torch.dtype:
    """Type of the residual stream, and of every other float tensor between two operators, of a model of `dtype` on `target`.

    On a CPU float32: a portion of the batch stays in the cache, and a conversion costs more than the bytes. On a GPU the
    model's own, as unfused: its bytes are what the operators around a layer's products wait for, and float32 has twice as many.
    """
    return dtype if target.device == "cuda" and dtype in FLOAT_DTYPES else torch.float32


class _Layer(Protocol):
    def __call__(self, state: State, cu_seqlens: Tensor, ones: Tensor) -> State: ...


@dataclass(frozen=True, slots=True)
class DynamicLayer:
    """A layer without calibration: what does not come out of a norm is written as a float and scaled token by token.

    Attributes:
        residual: type of the residual stream.
    """

    qkv: Call
    heads: int
    softmax_scale: float
    residual: torch.dtype
    attention_output: Call
    attention_norm: Norm
    ffn_in: Call
    ffn_out: Call
    output_norm: Norm

    def __call__(self, state: State, cu_seqlens: Tensor, ones: Tensor) -> State:
        hidden, q, s = state
        t, do = q.shape[0], direct(q.device.type)
        qkv = self.qkv.operator(q, s, *self.qkv.arguments)
        q, s = do.quantize_per_token(qkv.view(3 * t, -1))
        context = do.attention_int8(
            q.view(t, -1), s.view(t, 3), cu_seqlens, self.heads, self.softmax_scale, self.residual
        )
        q, s = do.quantize_per_token(context)
        hidden, q, s = _linear_add_norm(self.attention_output, q, s, hidden, self.attention_norm)
        inner = self.ffn_in.operator(q, s, *self.ffn_in.arguments)
        q, s = do.quantize_per_token(inner)
        return _linear_add_norm(self.ffn_out, q, s, hidden, self.output_norm)


@dataclass(frozen=True, slots=True)
class StaticLayer:
    """A calibrated layer: the static scales are folded into the weights' scales, and nothing between two norms is float.

    Attributes:
        scales: (3,) of queries, keys and values.
        context_scale: of the attention's result.
        overflow: the two products that add back what the few largest neurons lose to saturation (see `Overflow`).
    """

    qkv: Call
    scales: Tensor
    heads: int
    softmax_scale: float
    context_scale: float
    attention_output: Call
    attention_norm: Norm
    ffn_in: Call
    ffn_out: Call
    overflow: tuple[Call, Call] | None
    output_norm: Norm

    def __call__(self, state: State, cu_seqlens: Tensor, ones: Tensor) -> State:
        hidden, q, s = state
        do = direct(q.device.type)
        qkv = self.qkv.operator(q, s, *self.qkv.arguments)
        context = do.attention_int8_requant(
            qkv, self.scales, cu_seqlens, self.heads, self.softmax_scale, self.context_scale
        )
        hidden, q, s = _linear_add_norm(self.attention_output, context, ones, hidden, self.attention_norm)
        inner = self.ffn_in.operator(q, s, *self.ffn_in.arguments)
        if self.overflow is None:
            return _linear_add_norm(self.ffn_out, inner, ones, hidden, self.output_norm)
        rise, back = self.overflow
        y = self.ffn_out.operator(inner, ones, *self.ffn_out.arguments)
        excess = rise.operator(q, s, *rise.arguments)
        y += back.operator(excess, ones, *back.arguments)
        return do.add_layer_norm_quantize(y, hidden, *self.output_norm)


def _linear_add_norm(linear: Call, q: Tensor, s: Tensor, hidden: Tensor, norm: Norm) -> State:
    """LayerNorm(linear + hidden), whose type the linear's result has; by one operator where there is one for both."""
    do = direct(q.device.type)
    if linear.operator is do.w8a8_linear:
        qdata, scale, bias, _activation, _out, layout = linear.arguments
        return do.w8a8_linear_add_norm(q, s, qdata, scale, bias, hidden, *norm, layout)
    return do.add_layer_norm_quantize(linear.operator(q, s, *linear.arguments), hidden, *norm)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Word, position and token type tables, their norm, and ELECTRA's projection to the hidden size.

    Attributes:
        words, scheme, layout: as `embed_layer_norm_quantize` takes them.
        positions, token_types: (p, k) and (types, k) of the residual stream's type, which `embed_layer_norm_quantize` gives
            its result; one row of zeros where a family has no token types.
        padding_idx: of the position table, where positions start after it.
    """

    words: list[Tensor]
    scheme: str
    layout: str
    positions: Tensor
    token_types: Tensor
    norm: Norm
    projection: Call | None
    padding_idx: int | None

    def of_ids(self, ids: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> State:
        """From (t,) ids each."""
        tables = (self.words, self.scheme, self.layout, self.positions, self.token_types)
        embed = direct(ids.device.type).embed_layer_norm_quantize
        return self._projected(*embed(ids, position_ids, token_type_ids, *tables, *self.norm))

    def of_rows(self, rows: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> State:
        """From (t, k) float word rows of the caller's. Added up in the same order as in `of_ids`."""
        typed = rows.to(torch.float32) + _rows(self.token_types, token_type_ids)
        add_norm = direct(rows.device.type).add_layer_norm_quantize
        return self._projected(*add_norm(typed, _rows(self.positions, position_ids), *self.norm))

    def _projected(self, hidden: Tensor, q: Tensor, s: Tensor) -> State:
        if self.projection is None:
            return hidden, q, s
        hidden = self.projection.operator(q, s, *self.projection.arguments)
        return hidden, *direct(hidden.device.type).quantize_per_token(hidden)


class Encoder:
    """Everything that a forward needs, prepared from a model's modules.

    Attributes:
        watch: whether they are still what this was prepared from.
        dtype: of the model: what comes out is cast to it.
        residual: type of the residual stream.
    """

    def __init__(self, base: nn.Module, family: EncoderFamily, calibration: Calibration | None) -> None:
        self.watch = Watch()
        norm = base.get_submodule(family.embeddings.norm).get_parameter("weight")
        self.dtype, self.device = norm.dtype, norm.device
        self.residual = residual_dtype(target_of(self.device), self.dtype)
        self.embedding = _embedding(self.watch, base, family.embeddings, self.residual)
        heads = int(getattr(base.config, family.heads))
        self.layers: list[_Layer] = []
        for index in range(self.watch.layers(base, family.layers)):
            path = f"{family.layers}.{index}"
            parts = _Parts(self.watch, self.watch.module(base, path), family.layer, self.residual)
            scales = None if calibration is None else calibration.layers[path]
            self.layers.append(_dynamic_layer(parts, heads) if scales is None else _static_layer(parts, heads, scales))
        for name, module in base.named_modules():
            if name and name.partition(".")[0] != family.pooler:
                self.watch.calls(module)
        self.hidden_size = parts.output_norm[0].shape[0]
        self._ones = torch.ones(0)

    def run(self, state: State, packing: Packing, wanted: Collection[int]) -> list[Tensor | None]:
        """The residual stream (t, h) before the first layer (0) and after each (1 ...).

        Args:
            state: of the embedded tokens.
            wanted: which of them to keep; the last is always kept, the others are None.
        """
        parts = [
            self._through(_rows_of(state, tokens), cu_seqlens, wanted)
            for tokens, cu_seqlens in packing.portions(tokens_at_once(target_of(self.device)))
        ]
        if len(parts) == 1:
            return parts[0]
        return [None if stream[0] is None else torch.cat(stream) for stream in zip(*parts, strict=True)]

    def last_hidden(self, tokens: Tokens) -> Tensor:
        """The residual stream (t, h) after the last layer, from ids.

        Launches the same operators on the same addresses whatever the values are, as a CUDA graph needs it. Tokens after the
        last sequence's end belong to none: their rows are of no meaning, and no other row depends on them.
        """
        last = self._through(self.embedding.of_ids(*tokens[:3]), tokens.cu_seqlens, ())[-1]
        assert last is not None
        return last

    def _through(self, state: State, cu_seqlens: Tensor, wanted: Collection[int]) -> list[Tensor | None]:
        streams = [state[0] if 0 in wanted else None]
        ones = self._one_each(state[0].shape[0])
        for index, layer in enumerate(self.layers, 1):
            state = layer(state, cu_seqlens, ones)
            streams.append(state[0] if index in wanted or index == len(self.layers) else None)
        return streams

    def _one_each(self, tokens: int) -> Tensor:
        """(tokens,) ones: token scales of codes whose static scale is in the weight's already."""
        if self.device.type != "cpu":
            # Kept from call to call, they could be read on another stream before they are written on this one.
            return torch.ones(tokens, device=self.device)
        ones = self._ones
        if ones.shape[0] < tokens:
            self._ones = ones = torch.ones(tokens, device=self.device)
        return ones[:tokens]

    def extra_bytes(self) -> int:
        """Memory that is held beside the modules' own tensors."""
        own = {tensor.untyped_storage().data_ptr() for tensor in self.watch.watched}
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in _tensors_in((self.embedding, self.layers))
        }
        return sum(nbytes for storage, nbytes in held.items() if storage not in own)


def _rows_of(state: State, tokens: slice) -> State:
    hidden, q, s = state
    return hidden[tokens], q[tokens], s[tokens]


class _Parts:
    """The modules of one layer, and the type of what goes in and out of it."""

    def __init__(self, watch: Watch, layer: nn.Module, paths: LayerPaths, residual: torch.dtype) -> None:
        qkv: list[Any] = [watch.module(layer, path) for path in (paths.query, paths.key, paths.value)]
        linears: list[Any] = [
            watch.module(layer, path) for path in (paths.attention_output, paths.ffn_in, paths.ffn_out)
        ]
        norms = [watch.module(layer, path) for path in (paths.attention_norm, paths.output_norm)]
        share_rows(qkv)  # before they are watched: it puts other tensors in their places
        for module in (*qkv, *linears, *norms):
            watch.tensors(module)
        self.qkv: list[QLinear] = qkv
        self.attention_output, self.ffn_in, self.ffn_out = linears
        self.attention_norm, self.output_norm = (_norm(module) for module in norms)
        self.residual = residual

    def softmax_scale(self, heads: int) -> float:
        return (self.qkv[0].out_features // heads) ** -0.5


def _dynamic_layer(parts: _Parts, heads: int) -> DynamicLayer:
    qkv = stacked([module.quantized for module in parts.qkv])
    return DynamicLayer(
        qkv=linear_call(qkv, _stacked_biases(parts.qkv, (1.0, 1.0, 1.0)), "none", parts.residual),
        heads=heads,
        softmax_scale=parts.softmax_scale(heads),
        residual=parts.residual,
        attention_output=_float_call(parts.attention_output, parts.residual),
        attention_norm=parts.attention_norm,
        ffn_in=_float_call(parts.ffn_in, parts.residual, "gelu"),
        ffn_out=_float_call(parts.ffn_out, parts.residual),
        output_norm=parts.output_norm,
    )


def _static_layer(parts: _Parts, heads: int, scales: LayerScales) -> StaticLayer:
    projected = (scales.query, scales.key, scales.value)
    factors = tuple(1.0 / scale for scale in projected)
    qkv = stacked([rescaled(each.quantized, factor) for each, factor in zip(parts.qkv, factors, strict=True)])
    attention_output = rescaled(parts.attention_output.quantized, scales.attention_output)
    ffn_out = rescaled(parts.ffn_out.quantized, scales.gelu)
    return StaticLayer(
        qkv=linear_call(qkv, _stacked_biases(parts.qkv, factors), "none", 1.0),
        scales=torch.tensor(projected, dtype=torch.float32, device=parts.attention_norm[0].device),
        heads=heads,
        softmax_scale=parts.softmax_scale(heads),
        context_scale=scales.attention_output,
        attention_output=linear_call(attention_output, _bias(parts.attention_output), "none", parts.residual),
        attention_norm=parts.attention_norm,
        ffn_in=linear_call(parts.ffn_in.quantized, _bias(parts.ffn_in), "gelu", scales.gelu),
        ffn_out=linear_call(ffn_out, _bias(parts.ffn_out), "none", parts.residual),
        overflow=None if scales.overflow is None else _overflow(parts, scales.gelu, scales.overflow),
        output_norm=parts.output_norm,
    )


def _overflow(parts: _Parts, gelu_scale: float, overflow: Overflow) -> tuple[Call, Call]:
    """GELU(x - top) of the neurons that outgrow `top`, and their way to the hidden size; w8a8 whatever the layer's scheme."""
    neurons = torch.tensor(overflow.neurons, device=parts.attention_norm[0].device)
    up = dequantize(parts.ffn_in.quantized)[neurons]
    down = dequantize(parts.ffn_out.quantized)[:, neurons].contiguous()
    bias = _bias(parts.ffn_in)
    shifted = (up.new_zeros(len(neurons)) if bias is None else bias[neurons]) - INT8.qmax * gelu_scale
    return (
        linear_call(_small_weight(up), shifted, "gelu", overflow.scale),
        linear_call(rescaled(_small_weight(down), overflow.scale), None, "none", parts.residual),
    )


def _small_weight(weight: Tensor) -> QuantizedTensor:
    # A forged checkpoint may stand for weights beyond float32; they come out as infinite where all neurons are.
    quantized = quantize(weight.nan_to_num(), SCHEMES["w8a8"])
    return quantized.to_layout(select_layout(quantized.scheme, Role.LINEAR, target_of(weight.device)))


def _float_call(module: QLinear, out: torch.dtype, activation: str = "none") -> Call:
    return linear_call(module.quantized, _bias(module), activation, out)


def _embedding(watch: Watch, base: nn.Module, paths: EmbeddingPaths, residual: torch.dtype) -> Embedding:
    words, norm = watch.module(base, paths.words), watch.module(base, paths.norm)
    positions: Any = watch.module(base, paths.positions)
    types = None if paths.token_types is None else watch.module(base, paths.token_types)
    projection: Any = getattr(base, paths.projection, None) if paths.projection else None
    if projection is not None:
        projection = watch.module(base, str(paths.projection))
    for module in (words, positions, types, norm, projection):
        if module is not None:
            watch.tensors(module)
    if isinstance(words, QEmbedding):
        weight = words.quantized
        table, scheme, layout = list(weight.tensors.values()), weight.scheme.name, weight.layout
    else:
        table, scheme, layout = [words.get_parameter("weight").detach()], FLOAT_TABLE, Layout.PLAIN
    places = _float_table(positions, residual)
    return Embedding(
        words=table,
        scheme=scheme,
        layout=layout.value,
        positions=places,
        token_types=places.new_zeros(1, places.shape[1]) if types is None else _float_table(types, residual),
        norm=_norm(norm),
        projection=None if projection is None else _float_call(projection, residual),
        padding_idx=positions.padding_idx,
    )


def _float_table(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """(rows, k) of `dtype`: these tables are small, so a quantized one is expanded once."""
    if isinstance(module, QEmbedding):
        return dequantize(module.quantized).to(dtype)
    return module.get_parameter("weight").detach().to(dtype)


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of a small table. On a GPU torch checks the ids there; on a CPU it would count negative ones from the end."""
    if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= table.shape[0]):
        raise QBertError(
            f"position or token type ids must be 0 ... {table.shape[0] - 1} here, got {ids.tolist()!r:.80}"
        )
    return table.index_select(0, ids)


def _norm(module: nn.Module) -> Norm:
    assert isinstance(module, nn.LayerNorm)
    return module.weight.detach().to(torch.float32), module.bias.detach().to(torch.float32), module.eps


def _bias(module: QLinear) -> Tensor | None:
    return None if module.bias is None else module.bias.detach().to(torch.float32)


def _stacked_biases(modules: Sequence[QLinear], factors: Sequence[float]) -> Tensor | None:
    """The biases, each times its factor, as one; None where there is none."""
    if all(module.bias is None for module in modules):
        return None
    biases = (_bias(module) for module in modules)
    zeros = (torch.zeros(module.out_features, device=module.get_buffer("scale").device) for module in modules)
    return torch.cat(
        [zero if bias is None else bias * factor for bias, zero, factor in zip(biases, zeros, factors, strict=True)]
    )


def _tensors_in(thing: object) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from _tensors_in(each)
    elif is_dataclass(thing) and not isinstance(thing, type):
        for field in fields(thing):
            yield from _tensors_in(getattr(thing, field.name))
