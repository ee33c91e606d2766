"""The shapes of a compressed encoder as data: what was kept of the original, and how a model is brought to those shapes.

After layers, heads, neurons or words were taken out, a model has other shapes than its class builds. A `ShapePlan` says which;
it stands in a checkpoint's record, and the skeleton of a model is resized by it before weights are put in. Classes and the
names in a `state_dict` stay what they were. Layers and words are counted in the model's configuration as well; a plan with all
heads and one width of all feed-forward networks is `plain`: such a model is an ordinary one of transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from qbert.encoder import encoders
from qbert.encoder.build import head_size
from qbert.errors import CheckpointError, QBertError
from qbert.families import EncoderFamily
from qbert.families.family import Reshaping
from qbert.families.mpnet import KEPT_HEADS, narrowed_bias
from qbert.modules import FactoredLinear

_MOST = 2**31 - 1
_PLAN = "_qbert_shapes"  # attribute of a bare encoder
_WHERE = "quantization_config.shapes"

Count = Annotated[int, Field(ge=1, le=_MOST)]
Index = Annotated[int, Field(ge=0, le=_MOST)]
# Linears of a layer that may be of low rank, by their names in `families.family.LayerPaths`. Queries, keys and values are one
# product, whose parts cannot each have two.
Factorable = Literal["attention_output", "ffn_in", "ffn_out"]
FACTORABLE: tuple[Factorable, ...] = ("attention_output", "ffn_in", "ffn_out")


class Original(BaseModel):
    """What the uncompressed model had: layers, heads of a layer, width of its feed-forward network, rows of the word table."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layers: Count
    heads: Count
    ffn: Count
    vocabulary: Count


class LayerShape(BaseModel):
    """One layer that was kept.

    Attributes:
        source: its index in the original.
        heads: which of its heads are left, by their indexes in the original, ascending.
        ffn: how many neurons its feed-forward network has left.
        ranks: of the linears that are two thin ones each (`qbert.modules.FactoredLinear`), by their names; none where nothing
            was factorized, and then it is not written, so that older versions read the plan.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: Index
    heads: Annotated[tuple[Index, ...], Field(strict=False, min_length=1)]
    ffn: Count
    ranks: dict[Factorable, Count] = {}

    @model_serializer(mode="wrap")
    def _without_no_ranks(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {name: value for name, value in data.items() if name != "ranks" or value}

    @model_validator(mode="after")
    def _ascending(self) -> LayerShape:
        if any(a >= b for a, b in itertools.pairwise(self.heads)):
            raise ValueError(f"heads must ascend, got {list(self.heads)[:20]}")
        return self


class ShapePlan(BaseModel):
    """What is left of an encoder.

    Attributes:
        of: the original's sizes.
        layers: those that were kept, in order.
        vocabulary: rows of the word table.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    of: Original
    layers: Annotated[tuple[LayerShape, ...], Field(strict=False, min_length=1)]
    vocabulary: Count

    @model_validator(mode="after")
    def _within_the_original(self) -> ShapePlan:
        sources = [each.source for each in self.layers]
        if any(a >= b for a, b in itertools.pairwise(sources)) or sources[-1] >= self.of.layers:
            raise ValueError(f"layers must ascend below {self.of.layers}, got {sources[:20]}")
        for each in self.layers:
            if each.heads[-1] >= self.of.heads:
                raise ValueError(f"layer {each.source} keeps head {each.heads[-1]}; there were {self.of.heads}")
            if each.ffn > self.of.ffn:
                raise ValueError(f"layer {each.source} has {each.ffn} neurons; there were {self.of.ffn}")
        if self.vocabulary > self.of.vocabulary:
            raise ValueError(f"a vocabulary of {self.vocabulary}; there were {self.of.vocabulary} words")
        return self

    @property
    def plain(self) -> bool:
        """Whether transformers' own class builds these shapes from a configuration."""
        whole = all(len(each.heads) == self.of.heads and not each.ranks for each in self.layers)
        return whole and len({each.ffn for each in self.layers}) == 1

    @property
    def factorized(self) -> bool:
        """Whether some linear is two thin ones."""
        return any(each.ranks for each in self.layers)

    @property
    def whole(self) -> bool:
        """Whether nothing is gone."""
        return self.plain and (len(self.layers), self.layers[0].ffn, self.vocabulary) == (
            self.of.layers, self.of.ffn, self.of.vocabulary,
        )  # fmt: skip

    def __str__(self) -> str:
        heads, ffn = ([len(each.heads) for each in self.layers], [each.ffn for each in self.layers])
        kept = " ".join(str(each.source) for each in self.layers)
        layers = f"{len(self.layers)} of {self.of.layers} layers" + (
            f" ({kept})" if len(self.layers) < self.of.layers else ""
        )
        words = f"vocabulary {self.vocabulary:,} of {self.of.vocabulary:,}"
        factored = ((name, _ranks(self.layers, name)) for name in FACTORABLE)
        ranks = "".join(f", rank of {name} {each}" for name, each in factored if each)
        return f"{layers}, heads {_run(heads, self.of.heads)}, FFN {_run(ffn, self.of.ffn)}{ranks}, {words}"


def _run(counts: Sequence[int], of: int) -> str:
    """`12 of 12` where all layers have as many, else one a layer."""
    return f"{counts[0]} of {of}" if len(set(counts)) == 1 else f"{' '.join(map(str, counts))} of {of}"


def _ranks(layers: Sequence[LayerShape], name: Factorable) -> str:
    """One a layer, `-` where it is whole; nothing where all are."""
    found = [layer.ranks.get(name) for layer in layers]
    return " ".join("-" if each is None else str(each) for each in found) if any(found) else ""


@dataclass(frozen=True)
class Shaped:
    """The one encoder of a model whose shapes can be changed.

    Attributes:
        base: the bare encoder.
        paths: of its layers, in order.
        where: where it says its sizes.
    """

    base: Any
    family: EncoderFamily
    where: Reshaping
    paths: tuple[str, ...]

    @property
    def layers(self) -> nn.ModuleList:
        """The list of layers."""
        return cast(nn.ModuleList, self.base.get_submodule(self.family.layers))

    def attention(self, layer: Any) -> Any:
        """The module that a layer's queries come from."""
        return layer.get_submodule(self.family.layer.qkv[0].rpartition(".")[0])

    def head_dim(self, layer: Any) -> int:
        """Channels of one head."""
        attention, query = self.attention(layer), layer.get_submodule(self.family.layer.qkv[0])
        heads = int(self.family.setting(self.base.config, "heads"))
        return head_size(attention, int(query.out_features), heads)

    def words(self) -> Any:
        """The word table."""
        return self.base.get_submodule(self.family.embeddings.words)


def shaped(model: nn.Module) -> Shaped:
    """The encoder of a model, to be compressed.

    Raises:
        QBertError: none or several, or one of a family whose layers cannot be changed.
    """
    found = list(encoders(model))
    if len(found) != 1:
        raise QBertError(f"{type(model).__name__} has {len(found)} encoders of a known family; needed: one")
    _, base, family = found[0]
    if isinstance(family.reshaping, str):
        raise QBertError(f"{family.name} cannot be taken apart: {family.reshaping}")
    return Shaped(base, family, family.reshaping, tuple(family.calls(base, family.layers).values()))


def plan_of(model: nn.Module) -> ShapePlan:
    """What is left of the original in a model; of one that was never compressed, everything.

    Raises:
        QBertError: see `shaped`.
    """
    encoder = shaped(model)
    held = _held(encoder.base, encoder.family)
    return _whole(encoder) if held is None else held


def recorded_plan(model: nn.Module) -> ShapePlan | None:
    """The plan that a checkpoint of this model must carry; None where nothing was taken out, or of models with no plan."""
    plans = [_held(base, family) for _, base, family in encoders(model)]
    held = plans[0] if len(plans) == 1 else None
    return None if held is None or held.whole else held


def _held(base: nn.Module, family: EncoderFamily) -> ShapePlan | None:
    """The plan that stands beside an encoder, with as many words as the table has now: transformers resizes it, too.

    A table that has outgrown the original's counts as the original's, since words were added to all there were.
    """
    held = base.__dict__.get(_PLAN)
    if not isinstance(held, ShapePlan):
        return None
    rows = int(getattr(base.get_submodule(family.embeddings.words), "num_embeddings", held.vocabulary))
    if rows == held.vocabulary:
        return held
    of = held.of.model_copy(update={"vocabulary": max(rows, held.of.vocabulary)})
    return held.model_copy(update={"of": of, "vocabulary": rows})


@dataclass(frozen=True)
class Kept:
    """Where the weights of a compressed model, quantized or not, stood in a float model that it was made from.

    Attributes:
        plan: of the compressed model; None of a whole one, and of one that has all that the other has.
    """

    plan: ShapePlan | None = None
    _layers: dict[str, tuple[str, LayerShape, tuple[int, ...], EncoderFamily]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, original: nn.Module) -> Kept:
        """Of a model and the original, or a model between the two.

        Raises:
            QBertError: a layer or a head that the original does not have.
        """
        plan = recorded_plan(model)
        if plan is None:
            return cls()
        (path, encoder), (path_there, there) = _with_path(model), _with_path(original)
        held = plan_of(original)
        sources = held.layers
        if held.of.layers != plan.of.layers:
            if not held.whole or len(held.layers) != len(plan.layers):
                raise QBertError(f"it had {plan.of.layers} layers, the model to compare with has {len(held.layers)}")
            sources = plan.layers  # read from transformers' own files, which do not say what is gone
        places = {shape.source: place for place, shape in enumerate(sources)}
        layers = {}
        for shape, name in zip(plan.layers, encoder.paths, strict=True):
            if shape.source not in places:
                raise QBertError(f"{name} was layer {shape.source}, which is not in the model to compare with")
            place = places[shape.source]
            layers[_joined(path, name)] = (
                _joined(path_there, there.paths[place]), shape, held.layers[place].heads, encoder.family,
            )  # fmt: skip
        return cls(plan, layers)

    def source(self, name: str) -> str:
        """Name in the original of the module that has this one here."""
        for layer, (there, *_) in self._layers.items():
            if name.startswith(layer + "."):
                return there + name.removeprefix(layer)
        return name

    def part(self, name: str, weight: Tensor) -> Tensor:
        """What was kept of the original's weight, as far as it is recorded: of the heads."""
        for layer, (_, shape, heads, family) in self._layers.items():
            path = name.removeprefix(layer + ".")
            if path == name or shape.heads == heads or not set(shape.heads) <= set(heads):
                continue
            axis = 0 if path in family.layer.qkv else 1 if path == family.layer.attention_output else None
            if axis is not None:
                kept = torch.tensor([heads.index(head) for head in shape.heads])
                return weight.unflatten(axis, (len(heads), -1)).index_select(axis, kept).flatten(axis, axis + 1)
        return weight


def _with_path(model: nn.Module) -> tuple[str, Shaped]:
    encoder = shaped(model)
    return next(name for name, base, _ in encoders(model) if base is encoder.base), encoder


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _whole(encoder: Shaped) -> ShapePlan:
    heads = int(encoder.family.setting(encoder.base.config, "heads"))
    widths = [_ffn_of(encoder, layer) for layer in encoder.layers]
    words = _rows(encoder.words())
    shapes = (LayerShape(source=index, heads=tuple(range(heads)), ffn=width) for index, width in enumerate(widths))
    of = Original(layers=len(widths), heads=heads, ffn=max(widths), vocabulary=words)
    return ShapePlan(of=of, layers=tuple(shapes), vocabulary=words)


def _ffn_of(encoder: Shaped, layer: Any) -> int:
    return int(layer.get_submodule(encoder.family.layer.ffn_in).out_features)


def _rows(table: Any) -> int:
    return int(table.num_embeddings)


def note(encoder: Shaped, plan: ShapePlan) -> None:
    """Writes down what is left: in the model's configuration what transformers reads there, the rest beside the encoder."""
    config = encoder.base.config
    setattr(config, encoder.where.layers, len(plan.layers))
    setattr(config, encoder.where.ffn, max(each.ffn for each in plan.layers))
    config.vocab_size = plan.vocabulary
    encoder.base.__dict__[_PLAN] = plan


# ---- a skeleton brought to a plan's shapes --------------------------------------------------------------------------


def resize_(model: nn.Module, plan: ShapePlan) -> None:
    """Gives a model that was built from a compressed model's configuration the shapes of its plan; values are not set.

    Raises:
        CheckpointError: a plan of another model: other layers, heads, widths or words than the configuration builds.
    """
    try:
        encoder = shaped(model)
    except QBertError as error:
        raise CheckpointError(_WHERE, "must be of a model whose shapes can change", str(error)) from None
    _check_fits(encoder, plan)
    for layer, shape in zip(encoder.layers, plan.layers, strict=True):
        head_dim = encoder.head_dim(layer)
        paths = encoder.family.layer
        for path in paths.qkv:
            _resize(layer.get_submodule(path), rows=len(shape.heads) * head_dim)
        _resize(layer.get_submodule(paths.attention_output), columns=len(shape.heads) * head_dim)
        _resize(layer.get_submodule(paths.ffn_in), rows=shape.ffn)
        _resize(layer.get_submodule(paths.ffn_out), columns=shape.ffn)
        _count_heads(encoder, layer, shape.heads, plan.of.heads, head_dim)
        for name, rank in shape.ranks.items():
            _check_rank(layer.get_submodule(linear_path(encoder, name)), f"layers.{shape.source}.ranks.{name}", rank)
            factor_(encoder, layer, name, rank)
    note(encoder, plan)


def _check_rank(linear: Any, name: str, rank: int) -> None:
    most = min(linear.out_features, linear.in_features)
    if rank > most:
        raise CheckpointError(f"{_WHERE}.{name}", f"must be at most {most}, the sides of the linear", rank)


def _check_fits(encoder: Shaped, plan: ShapePlan) -> None:
    heads, rows = int(encoder.family.setting(encoder.base.config, "heads")), _rows(encoder.words())
    widths = {_ffn_of(encoder, layer) for layer in encoder.layers}
    largest = max(each.ffn for each in plan.layers)
    for name, found, built in (
        ("layers", len(plan.layers), len(encoder.layers)),
        ("of.heads", plan.of.heads, heads),
        ("layers: the largest ffn", largest, max(widths, default=0)),
        ("vocabulary", plan.vocabulary, rows),
    ):
        if found != built:
            raise CheckpointError(f"{_WHERE}.{name}", f"must be the {built} of the configuration", found)


def _resize(linear: Any, rows: int | None = None, columns: int | None = None) -> None:
    n, k = rows or linear.out_features, columns or linear.in_features
    if (n, k) == (linear.out_features, linear.in_features):
        return
    linear.weight = _like(linear.weight, linear.weight.new_empty(n, k))
    if linear.bias is not None and len(linear.bias) != n:
        linear.bias = _like(linear.bias, linear.bias.new_empty(n))
    linear.out_features, linear.in_features = n, k


def _like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach(), requires_grad=old.requires_grad)


def _count_heads(encoder: Shaped, layer: Any, heads: Sequence[int], of: int, head_dim: int) -> None:
    """What an attention module says of its heads, and which biases are theirs.

    Args:
        heads: those left, by their indexes in the table of biases.
        of: how many there were.
    """
    attention = encoder.attention(layer)
    setattr(attention, encoder.where.heads, len(heads))
    if encoder.where.width is not None:
        setattr(attention, encoder.where.width, len(heads) * head_dim)
    if not encoder.where.biased or len(heads) == of:
        return
    setattr(attention, KEPT_HEADS, tuple(heads))
    outer = layer.attention
    if narrowed_bias not in outer._forward_pre_hooks.values():
        outer.register_forward_pre_hook(narrowed_bias, with_kwargs=True)


# ---- parts taken out of a model -------------------------------------------------------------------------------------


def keep_layers_(model: nn.Module, keep: Sequence[int]) -> ShapePlan:
    """Leaves those layers of an encoder, by their places in it, ascending. Returns the new plan."""
    encoder, plan = shaped(model), plan_of(model)
    layers = encoder.layers
    kept = [layers[index] for index in keep]
    for index, layer in enumerate(kept):
        layers[index] = layer
        if hasattr(encoder.attention(layer), "layer_idx"):
            encoder.attention(layer).layer_idx = index
    for _ in range(len(layers) - len(kept)):
        del layers[-1]
    plan = plan.model_copy(update={"layers": tuple(plan.layers[index] for index in keep)})
    note(encoder, plan)
    return plan


@torch.no_grad()
def keep_heads_(model: nn.Module, place: int, keep: Sequence[int]) -> ShapePlan:
    """Leaves those heads of the layer at that place, by their places among its heads now, ascending. Returns the new plan."""
    encoder, plan = shaped(model), plan_of(model)
    layer, shape, paths = encoder.layers[place], plan.layers[place], encoder.family.layer
    head_dim = encoder.head_dim(layer)
    channels = (torch.tensor(list(keep))[:, None] * head_dim + torch.arange(head_dim)).flatten()
    for path in paths.qkv:
        _select(layer.get_submodule(path), rows=channels)
    _select(layer.get_submodule(paths.attention_output), columns=channels)
    heads = tuple(shape.heads[index] for index in keep)
    _count_heads(encoder, layer, heads, plan.of.heads, head_dim)
    return _changed(encoder, plan, place, {"heads": heads})


@torch.no_grad()
def keep_neurons_(model: nn.Module, place: int, keep: Sequence[int]) -> ShapePlan:
    """Leaves those neurons of the feed-forward network of the layer at that place, ascending. Returns the new plan."""
    encoder, plan = shaped(model), plan_of(model)
    layer, paths, neurons = encoder.layers[place], encoder.family.layer, torch.tensor(list(keep))
    _select(layer.get_submodule(paths.ffn_in), rows=neurons)
    _select(layer.get_submodule(paths.ffn_out), columns=neurons)
    return _changed(encoder, plan, place, {"ffn": len(neurons)})


@torch.no_grad()
def keep_words_(model: nn.Module, keep: Sequence[int]) -> ShapePlan:
    """Leaves those rows of the word table, ascending. Returns the new plan."""
    encoder, plan = shaped(model), plan_of(model)
    table, rows = encoder.words(), torch.tensor(list(keep))
    table.weight = _like(table.weight, table.weight[rows.to(table.weight.device)].clone())
    table.num_embeddings = len(rows)
    plan = plan.model_copy(update={"vocabulary": len(rows)})
    note(encoder, plan)
    return plan


def linear_path(encoder: Shaped, name: Factorable) -> str:
    """Where a linear that may be of low rank is, from its layer."""
    return str(getattr(encoder.family.layer, name))


def factor_(encoder: Shaped, layer: Any, name: Factorable, rank: int) -> FactoredLinear:
    """Puts two thin linears in the place of one, whose values are yet to be set; the bias stays. The plan is not changed."""
    parent, _, last = linear_path(encoder, name).rpartition(".")
    made = FactoredLinear.empty(layer.get_submodule(linear_path(encoder, name)), rank)
    setattr(layer.get_submodule(parent), last, made)
    return made


@torch.no_grad()
def factorize_linear_(model: nn.Module, place: int, name: Factorable, first: Tensor, second: Tensor) -> ShapePlan:
    """Makes a linear of the layer at that place the product of two: first (rank, k), second (n, rank). Returns the new plan."""
    encoder, plan = shaped(model), plan_of(model)
    made, shape = factor_(encoder, encoder.layers[place], name, len(first)), plan.layers[place]
    made.first.weight.copy_(first)  # type: ignore[operator]
    made.second.weight.copy_(second)  # type: ignore[operator]
    return _changed(encoder, plan, place, {"ranks": {**shape.ranks, name: len(first)}})


def _select(linear: Any, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    if isinstance(linear, FactoredLinear):
        if rows is not None:
            _select(linear.second, rows=rows)
        if columns is not None:
            _select(linear.first, columns=columns)
        return
    weight = linear.weight
    if rows is not None:
        rows = rows.to(weight.device)
        weight = weight[rows]
        if linear.bias is not None:
            linear.bias = _like(linear.bias, linear.bias[rows].clone())
    if columns is not None:
        weight = weight[:, columns.to(weight.device)].contiguous()
    linear.weight = _like(linear.weight, weight.clone())
    linear.out_features, linear.in_features = weight.shape


def _changed(encoder: Shaped, plan: ShapePlan, place: int, fields: dict[str, Any]) -> ShapePlan:
    layers = list(plan.layers)
    layers[place] = layers[place].model_copy(update=fields)
    plan = plan.model_copy(update={"layers": tuple(layers)})
    note(encoder, plan)
    return plan
