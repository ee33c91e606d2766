"""What an encoder computes, as data: every product and every pass over rows of its program, for any formats.

The program is the family's own (`qbert.families`), read here a fourth time: shapes come from the modules that stand in the
model, so pruned layers count as what is left of them, and nothing runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qbert.encoder import encoders
from qbert.encoder.build import head_size
from qbert.errors import QBertError
from qbert.families import EncoderFamily
from qbert.families.family import BiasOf, RotaryOf, WindowOf
from qbert.modules import FactoredLinear

THIN = ".thin"  # end of the slot between the two products of a linear of low rank, whose scales are known for each token only


@dataclass(frozen=True)
class Step:
    """One step of the program.

    Attributes:
        name: what it is.
        kind: ``"linear"``, ``"attention"``, ``"rows"`` (norms and sums) or ``"embedding"``.
        n, k: of the weight, one after the other where several linears are one product; attention: n columns of all heads,
            k of one head; rows and tables: k columns.
        heads: of attention.
        window: of attention: how far a token sees to either side; None: everywhere.
        gated: half of a linear's channels multiply the other half.
        activated: its results go through an activation function.
        norm: its rows are normalized; a sum alone otherwise.
        reads: ``"hidden"``, whose codes come with the norm, or the slot that another step fills.
        writes: the slot that it fills; ``"hidden"`` is the residual stream, a float.
        tables: that an embedding looks up.
    """

    name: str
    kind: str
    n: int
    k: int
    heads: int = 0
    window: int | None = None
    gated: bool = False
    activated: bool = False
    norm: bool = False
    reads: str = "hidden"
    writes: str = "hidden"
    tables: int = 0


@dataclass(frozen=True)
class LayerWork:
    """The steps of one layer."""

    name: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class EncoderWork:
    """An encoder's program.

    Attributes:
        family: its name.
        embedding: the steps before the layers.
        layers: in the order of their calls.
        weights: values of all linears in the layers, those that are shared counted once.
    """

    family: str
    embedding: LayerWork
    layers: tuple[LayerWork, ...]
    weights: int

    @property
    def every_layer(self) -> tuple[LayerWork, ...]:
        """Embeddings first."""
        return self.embedding, *self.layers


def read_work(model: nn.Module) -> EncoderWork:
    """The program of a model's encoder, float, quantized or emulated.

    Raises:
        QBertError: no encoder of a known family, or more than one.
    """
    found = list(encoders(model))
    if len(found) != 1:
        raise QBertError(f"{type(model).__name__} has {len(found)} encoders of known families; allowed: one")
    _, base, family = found[0]
    settings = {name: family.setting(base.config, name) for name in family.settings}
    calls = family.calls(base, family.layers)
    layers = tuple(LayerWork(name, _steps_of(base, family, path, settings)) for name, path in calls.items())
    once = dict(zip(calls.values(), layers, strict=True))
    values = sum(step.n * step.k for layer in once.values() for step in layer.steps if step.kind == "linear")
    return EncoderWork(family.name, LayerWork("embeddings", _embedding(base, family)), layers, values)


def _steps_of(base: Any, family: EncoderFamily, path: str, settings: dict[str, Any]) -> tuple[Step, ...]:
    reader = _Reader(base, base.get_submodule(path), int(settings["heads"]))
    family.program(reader, family.layer)
    return tuple(reader.steps)


def _embedding(base: Any, family: EncoderFamily) -> tuple[Step, ...]:
    paths = family.embeddings
    width = shape_of(base.get_submodule(paths.words))[1]
    tables = sum(path is not None for path in (paths.words, paths.positions, paths.token_types))
    steps = [Step("look-up and norm", "embedding", 0, width, norm=True, tables=tables)]
    there = {name for name, _ in base.named_modules()}
    if paths.projection in there:
        n, k = shape_of(base.get_submodule(paths.projection))
        steps.append(Step("projection", "linear", n, k))
    return tuple(steps)


def shape_of(module: Any) -> tuple[int, int]:
    """(rows, columns) of a linear or a table, whatever it is stored as."""
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    if hasattr(module, "num_embeddings"):
        return int(module.num_embeddings), int(module.embedding_dim)
    rows, columns = module.weight.shape
    return int(rows), int(columns)


@dataclass
class _Reader:
    """Writes a layer's steps down (see `families.family.LayerBuilder`)."""

    base: Any
    layer: Any
    heads: int
    steps: list[Step] = field(default_factory=list)

    def attention(
        self, *qkv: str, bias: BiasOf | None = None, rotary: RotaryOf | None = None, window: WindowOf | None = None
    ) -> None:
        shapes = [self._shape(path) for path in qkv]
        width = sum(n for n, _ in shapes) // 3
        size = head_size(self.layer.get_submodule(qkv[0].rpartition(".")[0]), width, self.heads)
        seen = None if window is None else window(self.base, self.layer)
        self.steps.append(Step("query, key, value", "linear", 3 * width, shapes[0][1], writes="projected"))
        self.steps.append(
            Step("attention", "attention", width, size, width // size, seen, reads="projected", writes="context")
        )

    def linear(self, path: str, reads: str, writes: str, activation: str | None = None, gated: bool = False) -> None:
        step = self._last_of(path, reads)
        self.steps.append(replace(step, gated=gated, activated=activation is not None, writes=writes))

    def linear_add_norm(self, linear: str, norm: str, reads: str) -> None:
        step = self._last_of(linear, reads)
        self.steps += [step, Step(norm, "rows", 0, step.n, norm=True)]

    def linear_add(self, linear: str, norm: str, reads: str) -> None:
        self.linear_add_norm(linear, norm, reads)

    def linear_add_last(self, linear: str, norm: str, reads: str) -> None:
        self.linear_add_norm(linear, norm, reads)
        self.steps[-1] = replace(self.steps[-1], name=f"next {norm}")

    def _last_of(self, path: str, reads: str) -> Step:
        """The linear at a path, or the second of two thin ones, the first of which is written now."""
        held = self.layer.get_submodule(path)
        if not isinstance(held, FactoredLinear):
            return Step(path, "linear", *shape_of(held), reads=reads)
        thin = f"{reads}{THIN}"
        self.steps.append(Step(f"{path}, thin", "linear", held.rank, held.in_features, reads=reads, writes=thin))
        return Step(path, "linear", held.out_features, held.rank, reads=thin)

    def _shape(self, path: str) -> tuple[int, int]:
        return shape_of(self.layer.get_submodule(path))
