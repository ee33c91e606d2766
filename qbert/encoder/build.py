"""From a model's modules to a program: one builder, with static scales where there is a calibration and dynamic ones where not.

Static scales are folded into the weights' float scales, biases and outliers, so no code is rounded twice. Dynamic: what does
not come out of a norm is written as a float and scaled token by token (ZeroQuant, Yao et al., 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qbert.encoder import steps
from qbert.encoder.calibration import Calibration, LayerScales, Overflow
from qbert.encoder.parts import QKV
from qbert.encoder.program import CU_SEQLENS, HIDDEN, ONES, Layer, Program, Step, codes_of, freeing, scales_of
from qbert.encoder.steps import BoundLinear, Heads, Label, Projected, Tables, Tokens
from qbert.encoder.stock import found_in
from qbert.encoder.watch import Watch
from qbert.families import EncoderFamily, PositionTable
from qbert.families.family import BiasOf, RotaryOf, WindowOf
from qbert.formats import SCHEMES, Role
from qbert.modules import FactoredLinear, QEmbedding, QLinear, QuantizedModule
from qbert.ops.abi import FLOAT_DTYPES, Activation, Keeps
from qbert.ops.operations import Norm, Out, Table
from qbert.ops.table import select_layout
from qbert.quantizers import quantize
from qbert.target import Target, target_of
from qbert.weight import Weight
from qbert.weight.codec import decode
from qbert.weight.stack import rescaled, share_rows, split, stacked

_THIN = ("first", "second")  # the linears of one of low rank
KEPT = (HIDDEN, codes_of(HIDDEN), scales_of(HIDDEN), CU_SEQLENS, ONES)  # what goes from layer to layer


def residual_dtype(target: Target, dtype: torch.dtype) -> torch.dtype:
    """Type of the residual stream, and of every other float tensor between two operators, of a model of `dtype` on `target`.

    On a CPU float32: a portion of the batch stays in the cache, and a conversion costs more than the bytes. On a GPU the
    model's own, as unfused: its bytes are what the operators around a layer's products wait for, and float32 has twice as many.
    """
    return dtype if target.device == "cuda" and dtype in FLOAT_DTYPES else torch.float32


class Where(NamedTuple):
    """Where a program runs, and the type of its residual stream there."""

    target: Target
    residual: torch.dtype


@dataclass(frozen=True)
class Site:
    """What the builders of all layers of an encoder share.

    Attributes:
        watch: learns what a program is made of.
        settings: of the model's configuration.
        hidden_size: columns of the residual stream.
        tables: biases and rotations made so far, so that layers with equal ones have the same.
    """

    watch: Watch
    base: nn.Module
    family: EncoderFamily
    where: Where
    settings: dict[str, Any]
    hidden_size: int
    tables: list[Tensor] = field(default_factory=list)

    def shared(self, table: Tensor) -> Tensor:
        """The table, or an equal one that was there before."""
        for held in self.tables:
            if held.shape == table.shape and torch.equal(held, table):
                return held
        self.tables.append(table)
        return table


def build(watch: Watch, base: nn.Module, family: EncoderFamily, calibration: Calibration | None) -> Program:
    """The program of a bare encoder that has no `eligibility.obstacle`; `watch` learns what it was made of."""
    norm = base.get_submodule(family.embeddings.norm).get_parameter("weight")
    target = target_of(norm.device)
    where = Where(target, residual_dtype(target, norm.dtype))
    settings = {name: family.setting(base.config, name) for name in family.settings}
    width = _hidden_size(base, family)
    layers, last_of_first = _layers(Site(watch, base, family, where, settings, width), calibration)
    embedding, of_rows, positions = _embedding(watch, base, family, where.residual)
    watch.configuration(base, (*family.settings.values(), *family.reads))
    watch.calls(base, found_in(base, family))
    return Program(
        family,
        embedding,
        of_rows,
        layers,
        last_of_first,
        width,
        norm.dtype,
        where.residual,
        norm.device,
        positions,
    )


def _layers(site: Site, calibration: Calibration | None) -> tuple[tuple[Layer, ...], Layer]:
    """The layers in the order of their calls, and the last of them where only first tokens are read of it.

    What is called again with the same scales, none, is built once.
    """
    family, built = site.family, dict[str, Layer]()
    calls = family.calls(site.base, family.layers)
    for path in dict.fromkeys((family.layers, *(path.rpartition(".")[0] for path in calls.values()))):
        site.watch.layers(site.base, path)
    if family.distances is not None:
        site.watch.tensors(site.watch.module(site.base, family.distances))
    layers = []
    for (name, path), following in zip(calls.items(), (*list(calls.values())[1:], None), strict=True):
        scales = None if calibration is None else calibration.layers[name]
        layer = built.get(path) if scales is None else None
        if layer is None:
            builder = LayerBuilder(site, name, path, following, scales)
            family.program(builder, family.layer)
            layer = built[path] = builder.layer()
        layers.append(replace(layer, name=name))
    last = LayerBuilder(site, name, path, None, scales, first=True)
    family.program(last, family.layer)
    return tuple(layers), last.layer()


class LayerBuilder:
    """Writes the steps of one layer (see `families.family.LayerBuilder`).

    Args:
        name: of the call, as the calibration has it.
        path, following: of the layer and of the one called next, None after the last.
        scales: static ones; None to take scales token by token.
        first: what is read of the layer is each sequence's first token.
    """

    def __init__(
        self, site: Site, name: str, path: str, following: str | None, scales: LayerScales | None, first: bool = False
    ) -> None:
        self._site, self._name, self._following, self._scales = site, name, following, scales
        self._first, self._of_first = first, False
        self._watch, self._settings = site.watch, site.settings
        self._target, self._residual = site.where
        self._layer = self._watch.module(site.base, path)
        self._steps: list[Step] = []
        self._written: dict[
            str, tuple[QLinear, Activation, Tokens]
        ] = {}  # slot -> the linear that filled it, and from what
        self._heads = Heads(0, 0, 0.0)
        self._ffn = 0

    def layer(self) -> Layer:
        """What was written."""
        done = freeing(self._steps, KEPT)
        return Layer(self._name, done, self._heads.number, self._heads.size, self._ffn, self._scales is not None)

    def attention(
        self, *qkv: str, bias: BiasOf | None = None, rotary: RotaryOf | None = None, window: WindowOf | None = None
    ) -> None:
        modules: list[Any] = [self._watch.module(self._layer, path) for path in qkv]
        for module, rows in zip(modules, share_rows([_weight(each) for each in modules]) or (), strict=False):
            module.register_buffer("qdata", rows)  # before it is watched: another tensor is in its place now
        for module in modules:
            self._watch.tensors(module)
        width = sum(module.out_features for module in modules) // len(QKV)
        self._heads = self._heads_of(qkv[0], width)._replace(
            window=None if window is None else window(self._site.base, self._layer),
            bias=self._table(bias),
            rotary=self._table(rotary),
        )
        out = self._out("context")
        projected = self._projected([_rows(each) for each in modules], width, out)
        self._quantized(
            "attention",
            "context",
            width,
            lambda writes: steps.attention(self._heads, projected, out, writes, self._target),
        )
        if self._first and projected.first is None:
            context = self._tokens("context")
            self._take_first([codes_of("context"), *([] if context.scales == ONES else [context.scales])])

    def _projected(self, rows: Sequence[Rows], width: int, out: Out) -> Projected:
        """The products of queries, keys and values, as attention reads them.

        Static codes come out of the product, scales of each token need a step more; what is yet to be rotated stays float,
        and attention rounds it. Where only first tokens are read, and a kernel can do with that, they alone have queries.
        """
        given = (
            [self._scales.scales[name] for name in QKV] if self._scales is not None and self._static("query") else None
        )
        floats, label = self._heads.rotary is not None, "query, key, value"
        dtype = self._residual if floats else torch.int8
        factors = None if given is None or floats else [1.0 / each for each in given]
        held = None if given is None else _static(given, rows[0].weight.qdata.device)
        name = (lambda slot: slot) if floats else codes_of
        each_has = factors is None and not floats
        if not (self._first and steps.attends_first(self._heads, dtype, out, self._target)):
            self._product(label, rows, factors, "qkv", width)
            return Projected(name("qkv"), scales_of("qkv") if each_has else held, dtype)
        query, *others = rows if len(rows) == len(QKV) else _split(rows[0])
        self._product("key, value", others, factors and factors[1:], "kv", width)
        self._take_first()
        self._product("query", [query], factors and factors[:1], "queries", width)
        first = name("queries"), scales_of("queries") if each_has else None
        return Projected(name("kv"), scales_of("kv") if each_has else held, dtype, first)

    def _product(self, name: str, rows: Sequence[Rows], factors: Sequence[float] | None, slot: str, width: int) -> None:
        """One product with several weights: of `factors`, codes; without, floats, and their codes where they stay as they are.

        Args:
            width: output channels that get a scale together.
        """
        weights, out = [each.weight for each in rows], self._residual if factors is None else 1.0
        if factors is not None:
            weights = [rescaled(each, factor) for each, factor in zip(weights, factors, strict=True)]
        weight, biases = stacked(weights), _stacked_biases(rows, factors or (1.0,) * len(rows))
        bound = BoundLinear(weight, biases, Activation.NONE, out)
        label, writes = Label(name, "attention linear"), slot if factors is None else codes_of(slot)
        self._add(steps.linear(label, bound, self._tokens(HIDDEN), writes, self._target))
        if factors is None and self._heads.rotary is None:
            self._add(steps.quantize(name, slot, width, self._residual, self._target, parts=weight.n // width))

    def _take_first(self, others: Sequence[str] = ()) -> None:
        """From here on the stream, and what else was computed of it, is first tokens."""
        slots = (*steps.HIDDEN_STATE, *others)
        self._add(steps.first_tokens(slots, self._site.hidden_size, self._residual, self._scales is not None))
        self._of_first = True

    def _add(self, *written: Step) -> None:
        self._steps += [replace(each, first=True) for each in written] if self._of_first else written

    def linear(self, path: str, reads: str, writes: str, activation: str | None = None, gated: bool = False) -> None:
        label = Label("feed-forward in", "ffn")
        module, tokens, _, bias = self._last_of(path, reads, label)
        done = Activation.named(self._settings[activation]) if activation is not None else Activation.NONE
        bound = BoundLinear(_weight(module), bias, done, self._out(writes), gated, self._zero(writes))
        self._written[writes] = module, done, tokens
        self._ffn = bound.width
        self._quantized(
            label.name, writes, bound.width, lambda slot: steps.linear(label, bound, tokens, slot, self._target)
        )

    def linear_add_norm(self, linear: str, norm: str, reads: str) -> None:
        self._sum(linear, self._watch.module(self._layer, norm), reads, Keeps.NORM)

    def linear_add(self, linear: str, norm: str, reads: str) -> None:
        self._sum(linear, self._watch.module(self._layer, norm), reads, Keeps.SUM)

    def linear_add_last(self, linear: str, norm: str, reads: str) -> None:
        if self._following is not None:
            self._sum(linear, self._watch.module(self._site.base, f"{self._following}.{norm}"), reads, Keeps.SUM)
            return
        final = self._site.family.final_norm
        assert final is not None
        self._sum(linear, self._watch.module(self._site.base, final), reads, Keeps.NORM)

    def _sum(self, linear: str, norm: nn.Module, reads: str, keeps: Keeps) -> None:
        """A linear from a slot, the stream added to it, and the norm of that."""
        self._watch.tensors(norm)
        held, first = _norm(norm), reads == "context"
        label = Label("attention output", "attention linear") if first else Label("feed-forward out", "ffn")
        _, tokens, weight, bias = self._last_of(linear, reads, label)
        bound = BoundLinear(weight, bias, Activation.NONE, self._residual)
        overflow = None if self._scales is None else self._scales.overflow.get(reads)
        if overflow is None:
            self._add(*steps.linear_add_norm(label, bound, tokens, held, keeps, self._target))
        else:
            self._add(steps.linear(label, bound, tokens, "sum", self._target))
            self._add(*self._overflow(linear, reads, overflow))
            self._add(steps.add_norm(label.name, "sum", held, keeps, self._residual, self._target))

    def _last_of(self, path: str, reads: str, label: Label) -> tuple[QLinear, Tokens, Weight, Tensor | None]:
        """The linear at a path, or the second of two thin ones, the first of which is written now: the module, what it reads,
        its weight with the static scale of that, if it has one, and its bias less what a code of 0 adds up to.

        What is between the two gets its scales token by token, calibrated or not: it has a few hundred channels, and they
        were made alike (`qbert.compress.factorize`), so one pass over them costs less than another calibrated slot would bring.
        """
        held = self._watch.module(self._layer, path)
        linears = [self._linear_at(f"{path}.{part}") for part in _THIN] if isinstance(held, FactoredLinear) else []
        first = linears[0] if linears else self._linear_at(path)
        weight, tokens, bias = _weight(first), self._tokens(reads), _bias(first)
        if self._scales is not None and self._static(reads):
            weight = rescaled(weight, self._scales.scales[reads])
            bias = _less_zero(bias, weight, self._zero(reads))
        if not linears:
            return first, tokens, weight, bias
        thin, width = f"{reads}.thin", first.out_features
        bound = BoundLinear(weight, bias, Activation.NONE, self._residual)
        name = f"{label.name}, thin"
        self._add(steps.linear(label._replace(name=name), bound, tokens, thin, self._target))
        self._add(steps.quantize(name, thin, width, self._residual, self._target))
        return linears[1], Tokens(codes_of(thin), scales_of(thin)), _weight(linears[1]), _bias(linears[1])

    def _overflow(self, path: str, slot: str, overflow: Overflow) -> list[Step]:
        """GELU(x - top) of the neurons that outgrow `top`, and their way to "sum"; w8a8 whatever the layer's scheme."""
        assert self._scales is not None
        up, activation, tokens = self._written[slot]
        held = self._layer.get_submodule(path)
        downs: list[Any] = [held.first, held.second] if isinstance(held, FactoredLinear) else [held]
        for each in (up, *downs):  # whose memory the program shares, too
            self._watch.copied((*each._parameters.values(), *each._buffers.values()))
        neurons = torch.tensor(overflow.neurons, device=up.quantized.device)
        rising = decode(_weight(up))[neurons]
        bias = _bias(up)
        top = self._scales.top(slot)
        shifted = (rising.new_zeros(len(neurons)) if bias is None else bias[neurons]) - top
        falling = decode(_weight(downs[0]))[:, neurons]
        for each in downs[1:]:
            falling = decode(_weight(each)) @ falling
        back = rescaled(_small_weight(falling.contiguous()), overflow.scale)
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
            steps.add("overflow sum", "more", "sum", falling.shape[0]),
        ]

    def _quantized(self, name: str, slot: str, width: int, step: Callable[[str], Step]) -> None:
        """A step that fills a quantized slot: codes at once where its scale is static, else floats, then their codes."""
        if self._static(slot):
            self._add(step(codes_of(slot)))
            return
        self._add(step(slot), steps.quantize(name, slot, width, self._residual, self._target))

    def _static(self, slot: str) -> bool:
        return self._scales is not None and slot in self._scales.scales

    def _out(self, slot: str) -> Out:
        """What fills a quantized slot gives: codes with its static scale, or floats."""
        return self._scales.scales[slot] if self._scales is not None and self._static(slot) else self._residual

    def _zero(self, slot: str) -> int:
        """The code of 0 in a quantized slot."""
        return 0 if self._scales is None else self._scales.zeros.get(slot, 0)

    def _tokens(self, slot: str) -> Tokens:
        return Tokens(codes_of(slot), ONES if self._static(slot) else scales_of(slot))

    def _linear_at(self, path: str) -> QLinear:
        module = self._watch.module(self._layer, path)
        self._watch.tensors(module)
        assert isinstance(module, QLinear)
        return module

    def _heads_of(self, query: str, width: int) -> Heads:
        """The layer's own: its modules may have been pruned to fewer heads than the configuration says."""
        attention = self._layer.get_submodule(query.rpartition(".")[0])
        size = head_size(attention, width, int(self._settings["heads"]))
        return Heads(width // size, size, float(getattr(attention, "scaling", size**-0.5)))

    def _table(self, made_by: BiasOf | RotaryOf | None) -> Tensor | None:
        return None if made_by is None else self._site.shared(made_by(self._site.base, self._layer))


def _static(scales: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(scales, dtype=torch.float32, device=device)


def head_size(attention: nn.Module, width: int, heads: int) -> int:
    """Channels of a head: what the attention module says of itself, else the width over the configuration's heads."""
    said = getattr(attention, "attention_head_size", 0) or getattr(attention, "head_dim", 0)
    return int(said) or width // heads


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
    positions, types = (
        None if path is None else watch.module(base, path) for path in (paths.positions, paths.token_types)
    )
    projection: Any = watch.module(base, str(paths.projection)) if has_projection(base, family) else None
    for module in (words, positions, types, held_norm, projection):
        if module is not None:
            watch.tensors(module)
    norm = _norm(held_norm)
    none = norm.gamma.new_zeros(1, norm.gamma.shape[0], dtype=residual)  # in place of a table that a family has not
    places, kinds = (none if table is None else _float_table(table, residual) for table in (positions, types))
    tables, target = Tables(_word_table(words), places, kinds), target_of(none.device)
    projected: list[Step] = []
    if projection is not None:
        bound = BoundLinear(_weight(projection), _bias(projection), Activation.NONE, residual)
        label = Label("projection", "embedding")
        projected = [
            steps.linear(label, bound, Tokens(codes_of(HIDDEN), scales_of(HIDDEN)), HIDDEN, target),
            steps.quantize(label.name, HIDDEN, projection.out_features, residual, target),
        ]
    return (
        freeing([steps.embed_norm(tables, norm, target), *projected], KEPT),
        freeing([steps.norm_of_rows(tables, norm, target), *projected], KEPT),
        _position_table(base, positions),
    )


def has_projection(base: nn.Module, family: EncoderFamily) -> bool:
    """Whether a linear stands between the embeddings and the first layer."""
    parent, _, name = (family.embeddings.projection or "").rpartition(".")
    return bool(name) and hasattr(base.get_submodule(parent), name)


def _position_table(base: Any, positions: Any) -> PositionTable:
    """Of the table; without one, the configuration says how many positions there are."""
    if positions is None:
        return PositionTable(int(base.config.max_position_embeddings), None)
    return PositionTable(positions.num_embeddings, positions.padding_idx)


def _word_table(words: nn.Module) -> Table:
    return _weight(words) if isinstance(words, QEmbedding) else words.get_parameter("weight").detach()


def _float_table(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """(rows, k) of `dtype`: these tables are small, so a quantized one is expanded once."""
    if isinstance(module, QEmbedding):
        return decode(_weight(module)).to(dtype)
    return module.get_parameter("weight").detach().to(dtype)


def _hidden_size(base: nn.Module, family: EncoderFamily) -> int:
    """Columns of the residual stream: those that a layer's query takes."""
    first = next(iter(family.calls(base, family.layers).values()))
    query: Any = base.get_submodule(f"{first}.{family.layer.qkv[0]}")
    return int(query.in_features)


# ---- what modules hold ----------------------------------------------------------------------------------------------


def _weight(module: QuantizedModule) -> Weight:
    """The module's matrix, in tensors that keep their memory even when `tensor.data = ...` puts other under the module's."""
    held = module.quantized
    return Weight(held.scheme, held.shape, held.layout, {name: each.detach() for name, each in held.tensors.items()})


def _norm(module: nn.Module) -> Norm:
    assert isinstance(module, nn.LayerNorm)
    gamma = module.weight.detach().to(torch.float32)
    beta = torch.zeros_like(gamma) if module.bias is None else module.bias.detach().to(torch.float32)
    return Norm(gamma, beta, module.eps)


def _bias(module: QLinear) -> Tensor | None:
    return None if module.bias is None else module.bias.detach().to(torch.float32)


def _less_zero(bias: Tensor | None, weight: Weight, zero: int) -> Tensor | None:
    """The bias of a product with codes of which `zero` stands for 0: all are too large by as much, whatever the token."""
    if zero == 0:
        return bias
    too_much = (decode(weight).to(torch.float64).sum(1) * zero).to(torch.float32)
    return -too_much if bias is None else bias - too_much


class Rows(NamedTuple):
    """A weight (n, k) and its bias (n,) float32, if any: what a product has of one module, or a part of it."""

    weight: Weight
    bias: Tensor | None


def _rows(module: QLinear) -> Rows:
    return Rows(_weight(module), _bias(module))


def _split(rows: Rows) -> list[Rows]:
    """Those of queries, keys and values that one module has."""
    weights = split(rows.weight, len(QKV))
    biases = (None,) * len(QKV) if rows.bias is None else rows.bias.chunk(len(QKV))
    return [Rows(*each) for each in zip(weights, biases, strict=True)]


def _stacked_biases(rows: Sequence[Rows], factors: Sequence[float]) -> Tensor | None:
    """The biases, each times its factor, as one; None where there is none."""
    if all(each.bias is None for each in rows):
        return None
    zeros = (torch.zeros(each.weight.n, device=each.weight.qdata.device) for each in rows)
    pairs = zip(rows, zeros, factors, strict=True)
    return torch.cat([zero if each.bias is None else each.bias * factor for each, zero, factor in pairs])
