"""From a model's modules to a program: one builder, with static scales where there is a calibration and dynamic ones where not.

Static scales are folded into the weights' float scales, biases and outliers, so no code is rounded twice. Dynamic: what does
not come out of a norm is written as a float and scaled token by token (ZeroQuant, Yao et al., 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbert.encoder import steps
from qbert.encoder.calibration import Calibration, LayerScales, Overflow
from qbert.encoder.program import CU_SEQLENS, HIDDEN, ONES, Layer, Program, Step, codes_of, freeing, scales_of
from qbert.encoder.steps import BoundLinear, Heads, Label, Tables, Tokens
from qbert.encoder.stock import found_in
from qbert.encoder.watch import Watch
from qbert.families import EncoderFamily, PositionTable
from qbert.formats import INT8, SCHEMES, Role
from qbert.modules import QEmbedding, QLinear, QuantizedModule
from qbert.ops.abi import FLOAT_DTYPES, Activation
from qbert.ops.operations import Norm, Out, Table
from qbert.ops.table import select_layout
from qbert.quantizers import quantize
from qbert.target import Target, target_of
from qbert.weight import Weight
from qbert.weight.codec import decode
from qbert.weight.stack import rescaled, share_rows, stacked

KEPT = (HIDDEN, codes_of(HIDDEN), scales_of(HIDDEN), CU_SEQLENS, ONES)  # what goes from layer to layer


def residual_dtype(target: Target, dtype: torch.dtype) -> torch.dtype:
    """Type of the residual stream, and of every other float tensor between two operators, of a model of `dtype` on `target`.

    On a CPU float32: a portion of the batch stays in the cache, and a conversion costs more than the bytes. On a GPU the
    model's own, as unfused: its bytes are what the operators around a layer's products wait for, and float32 has twice as many.
    """
    return dtype if target.device == "cuda" and dtype in FLOAT_DTYPES else torch.float32


def build(watch: Watch, base: nn.Module, family: EncoderFamily, calibration: Calibration | None) -> Program:
    """The program of a bare encoder that has no `eligibility.obstacle`; `watch` learns what it was made of."""
    norm = base.get_submodule(family.embeddings.norm).get_parameter("weight")
    target = target_of(norm.device)
    residual = residual_dtype(target, norm.dtype)
    settings = {name: family.setting(base.config, name) for name in family.settings}
    layers = []
    for index in range(watch.layers(base, family.layers)):
        name = f"{family.layers}.{index}"
        scales = None if calibration is None else calibration.layers[name]
        builder = LayerBuilder(watch, watch.module(base, name), name, Where(target, residual), scales, settings)
        family.program(builder, family.layer)
        layers.append(builder.layer())
    embedding, of_rows, positions = _embedding(watch, base, family, residual)
    watch.configuration(base, family.settings.values())
    watch.calls(base, found_in(base, family))
    return Program(
        family,
        embedding,
        of_rows,
        tuple(layers),
        _hidden_size(base, family),
        norm.dtype,
        residual,
        norm.device,
        positions,
    )


class Where(NamedTuple):
    """Where a program runs, and the type of its residual stream there."""

    target: Target
    residual: torch.dtype


class LayerBuilder:
    """Writes the steps of one layer (see `families.family.LayerBuilder`).

    Args:
        scales: static ones; None to take scales token by token.
        settings: of the model's configuration.
    """

    def __init__(
        self,
        watch: Watch,
        layer: nn.Module,
        name: str,
        where: Where,
        scales: LayerScales | None,
        settings: dict[str, Any],
    ) -> None:
        self._watch, self._layer, self._name, self._settings = watch, layer, name, settings
        (self._target, self._residual), self._scales = where, scales
        self._steps: list[Step] = []
        self._written: dict[
            str, tuple[QLinear, Activation, Tokens]
        ] = {}  # slot -> the linear that filled it, and from what
        self._heads = Heads(0, 0, 0.0)
        self._ffn = 0

    def layer(self) -> Layer:
        """What was written."""
        done = freeing(self._steps, KEPT)
        return Layer(self._name, done, self._heads.count, self._heads.size, self._ffn, self._scales is not None)

    def attention(self, query: str, key: str, value: str) -> None:
        modules: list[Any] = [self._watch.module(self._layer, path) for path in (query, key, value)]
        for module, rows in zip(modules, share_rows([_weight(each) for each in modules]) or (), strict=False):
            module.register_buffer("qdata", rows)  # before it is watched: another tensor is in its place now
        for module in modules:
            self._watch.tensors(module)
        label = Label("query, key, value", "attention linear")
        self._heads = self._heads_of(query, modules[0])
        names, width = ("query", "key", "value"), modules[0].out_features
        if self._scales is None:
            out: Out = self._residual
            weight, bias = stacked([_weight(each) for each in modules]), _stacked_biases(modules, (1.0, 1.0, 1.0))
            bound = BoundLinear(weight, bias, Activation.NONE, self._residual)
            self._steps.append(steps.linear(label, bound, self._tokens(HIDDEN), "qkv", self._target))
            self._steps.append(steps.quantize(label.name, "qkv", width, self._residual, self._target, parts=3))
            scales: Tensor | str = scales_of("qkv")
        else:
            out, static = self._scales.scales["context"], [self._scales.scales[name] for name in names]
            factors = [1.0 / scale for scale in static]
            weight = stacked([rescaled(_weight(each), factor) for each, factor in zip(modules, factors, strict=True)])
            bound = BoundLinear(weight, _stacked_biases(modules, factors), Activation.NONE, 1.0)
            self._steps.append(steps.linear(label, bound, self._tokens(HIDDEN), codes_of("qkv"), self._target))
            scales = torch.tensor(static, dtype=torch.float32, device=weight.device)
        self._quantized(
            "attention",
            "context",
            width,
            lambda writes: steps.attention(self._heads, scales, out, writes, self._target),
        )

    def linear(self, path: str, reads: str, writes: str, activation: str | None = None) -> None:
        module = self._linear_at(path)
        done = Activation.named(self._settings[activation]) if activation is not None else Activation.NONE
        out = self._residual if self._scales is None else self._scales.scales[writes]
        bound, tokens = BoundLinear(_weight(module), _bias(module), done, out), self._tokens(reads)
        label = Label("feed-forward in", "ffn")
        self._written[writes] = module, done, tokens
        self._ffn = module.out_features
        self._quantized(
            label.name, writes, module.out_features, lambda slot: steps.linear(label, bound, tokens, slot, self._target)
        )

    def linear_add_norm(self, linear: str, norm: str, reads: str) -> None:
        module, held = self._linear_at(linear), self._watch.module(self._layer, norm)
        self._watch.tensors(held)
        first = reads == "context"
        label = Label("attention output", "attention linear") if first else Label("feed-forward out", "ffn")
        weight = _weight(module)
        if self._scales is not None and reads in self._scales.scales:
            weight = rescaled(weight, self._scales.scales[reads])
        bound = BoundLinear(weight, _bias(module), Activation.NONE, self._residual)
        overflow = None if self._scales is None else self._scales.overflow.get(reads)
        if overflow is None:
            self._steps += steps.linear_add_norm(label, bound, self._tokens(reads), _norm(held), self._target)
        else:
            self._steps.append(steps.linear(label, bound, self._tokens(reads), "sum", self._target))
            self._steps += self._overflow(module, reads, overflow)
            self._steps.append(steps.add_norm(label.name, "sum", _norm(held), self._residual, self._target))

    def _overflow(self, down: QLinear, slot: str, overflow: Overflow) -> list[Step]:
        """GELU(x - top) of the neurons that outgrow `top`, and their way to "sum"; w8a8 whatever the layer's scheme."""
        assert self._scales is not None
        up, activation, tokens = self._written[slot]
        for each in (up, down):  # whose memory the program shares, too
            self._watch.copied((*each._parameters.values(), *each._buffers.values()))
        neurons = torch.tensor(overflow.neurons, device=up.quantized.device)
        rising = decode(_weight(up))[neurons]
        bias = _bias(up)
        top = INT8.qmax * self._scales.scales[slot]
        shifted = (rising.new_zeros(len(neurons)) if bias is None else bias[neurons]) - top
        back = rescaled(_small_weight(decode(_weight(down))[:, neurons].contiguous()), overflow.scale)
        rise = BoundLinear(_small_weight(rising), shifted, activation, overflow.scale)
        excess = Label("overflow in", "ffn"), Label("overflow out", "ffn")
        return [
            steps.linear(excess[0], rise, tokens, "excess", self._target),
            steps.linear(
                excess[1],
                BoundLinear(back, None, Activation.NONE, self._residual),
                Tokens("excess", ONES),
                "more",
                self._target,
            ),
            steps.add("overflow sum", "more", "sum", down.out_features),
        ]

    def _quantized(self, name: str, slot: str, width: int, step: Callable[[str], Step]) -> None:
        """A step that fills a quantized slot: codes at once where its scale is static, else floats, then their codes."""
        if self._scales is not None:
            self._steps.append(step(codes_of(slot)))
            return
        self._steps += [step(slot), steps.quantize(name, slot, width, self._residual, self._target)]

    def _tokens(self, slot: str) -> Tokens:
        static = self._scales is not None and slot in self._scales.scales
        return Tokens(codes_of(slot), ONES if static else scales_of(slot))

    def _linear_at(self, path: str) -> QLinear:
        module = self._watch.module(self._layer, path)
        self._watch.tensors(module)
        assert isinstance(module, QLinear)
        return module

    def _heads_of(self, query: str, module: QLinear) -> Heads:
        """The layer's own: its modules may have been pruned to fewer heads than the configuration says."""
        attention = self._layer.get_submodule(query.rpartition(".")[0])
        size = head_size(attention, module.out_features, int(self._settings["heads"]))
        return Heads(module.out_features // size, size, float(getattr(attention, "scaling", size**-0.5)))


def head_size(attention: nn.Module, width: int, heads: int) -> int:
    """Channels of a head: what the attention module says of itself, else the width over the configuration's heads."""
    return int(getattr(attention, "attention_head_size", 0)) or width // heads


def _small_weight(weight: Tensor) -> Weight:
    # A forged checkpoint may stand for weights beyond float32; they come out as infinite where all neurons are.
    quantized = quantize(weight.nan_to_num(), SCHEMES["w8a8"])
    return quantized.to_layout(select_layout(quantized.scheme, Role.LINEAR, target_of(weight.device)))


# ---- embeddings -----------------------------------------------------------------------------------------------------


def _embedding(
    watch: Watch, base: nn.Module, family: EncoderFamily, residual: torch.dtype
) -> tuple[tuple[Step, ...], tuple[Step, ...], PositionTable]:
    """Steps from ids, steps from word rows, and what is to be known of the position table."""
    paths = family.embeddings
    words, held_norm = watch.module(base, paths.words), watch.module(base, paths.norm)
    positions: Any = watch.module(base, paths.positions)
    types = None if paths.token_types is None else watch.module(base, paths.token_types)
    projection: Any = getattr(base, paths.projection, None) if paths.projection else None
    if projection is not None:
        projection = watch.module(base, str(paths.projection))
    for module in (words, positions, types, held_norm, projection):
        if module is not None:
            watch.tensors(module)
    places = _float_table(positions, residual)
    no_types = places.new_zeros(1, places.shape[1])
    tables = Tables(_word_table(words), places, no_types if types is None else _float_table(types, residual))
    target, norm = target_of(places.device), _norm(held_norm)
    projected: list[Step] = []
    if projection is not None:
        bound = BoundLinear(_weight(projection), _bias(projection), Activation.NONE, residual)
        label = Label("projection", "embedding")
        projected = [
            steps.linear(label, bound, Tokens(codes_of(HIDDEN), scales_of(HIDDEN)), HIDDEN, target),
            steps.quantize(label.name, HIDDEN, projection.out_features, residual, target),
        ]
    rows, padding_idx = places.shape[0], positions.padding_idx
    return (
        freeing([steps.embed_norm(tables, norm, target), *projected], KEPT),
        freeing([steps.norm_of_rows(tables, norm, target), *projected], KEPT),
        PositionTable(rows, padding_idx),
    )


def _word_table(words: nn.Module) -> Table:
    return _weight(words) if isinstance(words, QEmbedding) else words.get_parameter("weight").detach()


def _float_table(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """(rows, k) of `dtype`: these tables are small, so a quantized one is expanded once."""
    if isinstance(module, QEmbedding):
        return decode(_weight(module)).to(dtype)
    return module.get_parameter("weight").detach().to(dtype)


def _hidden_size(base: nn.Module, family: EncoderFamily) -> int:
    """Columns of the residual stream: those that a layer's query takes."""
    query: Any = base.get_submodule(f"{family.layers}.0.{family.layer.query}")
    return int(query.in_features)


# ---- what modules hold ----------------------------------------------------------------------------------------------


def _weight(module: QuantizedModule) -> Weight:
    """The module's matrix, in tensors that keep their memory even when `tensor.data = ...` puts other under the module's."""
    held = module.quantized
    return Weight(held.scheme, held.shape, held.layout, {name: each.detach() for name, each in held.tensors.items()})


def _norm(module: nn.Module) -> Norm:
    assert isinstance(module, nn.LayerNorm)
    return Norm(module.weight.detach().to(torch.float32), module.bias.detach().to(torch.float32), module.eps)


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
