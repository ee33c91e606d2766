"""Milliseconds of a layer by its heads and its neurons, measured on this machine with the kernels that will run.

FLOPs are not milliseconds: a width of 700 takes what 704 takes, and norms take the same however few heads there are (ZipLM,
Kurtic et al., 2023, has the idea of a table). It is measured on models of two layers that are built for the purpose, so it
takes seconds however deep the model is.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qbert.calibrate import calibrate
from qbert.convert import fuse_, quantize_
from qbert.encoder import encoders, obstacle
from qbert.errors import QBertError
from qbert.families.positions import longest
from qbert.formats import SCHEMES, Role, get_scheme, scheme_names
from qbert.recipe import Recipe, as_recipe
from qbert.shapes import LayerShape, Shaped, keep_heads_, keep_neurons_, plan_of, shaped
from qbert.timing import Rules, measure, medians, ratio

BLOCK = 64  # channels of the kernels' panels: what is between two multiples takes what the next one takes
_LAYERS = 2  # of a small model: one would leave a quarter of its time to embeddings
_FFN_POINTS, _HEAD_POINTS = 6, 5
_ROUNDS, _TABLE_ROUNDS = 7, 15  # a table's entries are differences, which want more of them
_CALIBRATED_BY = (64, 16)  # (rows, width) of random ids: any scales do, no value matters for the time


@dataclass(frozen=True)
class Load:
    """What is to be fast.

    Attributes:
        batch, seq: rows of that many tokens each.
        scheme: a word for `quantize_`, of integer activations: the model runs fused and with static scales; None for the float
            model as it is.
    """

    batch: int = 8
    seq: int = 128
    scheme: str | None = "w8a8"

    def __post_init__(self) -> None:
        for name in ("batch", "seq"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise QBertError(f"{name} is {value!r}; allowed: 1 or more")
        _ = self.recipe  # raises where there is none

    @property
    def recipe(self) -> Recipe | None:
        """What the model is quantized to."""
        return fused_recipe(self.scheme)

    @property
    def linear(self) -> str | None:
        """The scheme of linears; None where they stay float."""
        return None if self.recipe is None else self.recipe.linear

    def __str__(self) -> str:
        return f"{self.batch} x {self.seq}, {self.scheme or 'float'}"


def fused_recipe(word: str | None) -> Recipe | None:
    """What a word means to `quantize_`, None where everything stays float.

    Raises:
        QBertError: no such scheme, or one for linears that no fused encoder runs.
    """
    recipe = None if word is None else as_recipe(word)
    if recipe is None or (recipe.linear is None and recipe.embedding is None):
        return None
    if recipe.linear is not None and get_scheme(recipe.linear, Role.LINEAR).activation is None:
        schemes = (SCHEMES[name] for name in scheme_names(Role.LINEAR))
        allowed = ", ".join(each.name for each in schemes if each.activation is not None and not each.is_variant)
        raise QBertError(
            f"{recipe.linear} leaves activations float, and compressed models run fused, on integers; allowed: {allowed}, none "
            f"(call qbert.quantize_ afterwards)"
        )
    return recipe


@dataclass(frozen=True)
class Curve:
    """Milliseconds at some sizes, straight lines between them, never falling.

    Attributes:
        sizes, ms: ascending.
    """

    sizes: tuple[int, ...]
    ms: tuple[float, ...]

    @classmethod
    def of(cls, points: Mapping[int, float]) -> Curve:
        sizes = tuple(sorted(points))
        ms = [points[size] for size in sizes]
        for index in range(1, len(ms)):  # noise must not make more work look like less
            ms[index] = max(ms[index], ms[index - 1])
        return cls(sizes, tuple(ms))

    def at(self, size: int) -> float:
        """Of a size up to the largest; a smaller one than the smallest fills as many blocks."""
        if size <= self.sizes[0]:
            return self.ms[0]
        place = bisect.bisect_left(self.sizes, size)
        if place < len(self.sizes) and self.sizes[place] == size:
            return self.ms[place]
        if place == len(self.sizes):
            raise QBertError(f"no time for {size}; measured: {self.sizes[0]} ... {self.sizes[-1]}")
        low, high = self.sizes[place - 1 : place + 1]
        share = (size - low) / (high - low)
        return self.ms[place - 1] + share * (self.ms[place] - self.ms[place - 1])


@dataclass(frozen=True)
class Table:
    """What a model takes.

    Attributes:
        heads, ffn: milliseconds of a layer less those of a whole one (so 0 or less), by its heads and by its neurons.
        layer: of a whole one.
        rest: of everything but the layers.
    """

    heads: Curve
    ffn: Curve
    layer: float
    rest: float

    def total(self, layers: Sequence[LayerShape]) -> float:
        """Milliseconds of a model of such layers."""
        return self.rest + sum(self.layer + self.heads.at(len(each.heads)) + self.ffn.at(each.ffn) for each in layers)


def head_step(head_dim: int) -> int:
    """Heads whose channels together fill whole blocks."""
    return next(count for count in range(1, BLOCK + 1) if count * head_dim % BLOCK == 0)


def head_levels(heads: int, head_dim: int) -> list[int]:
    """How many heads a layer may keep, descending."""
    return [heads, *(count for count in range(heads - 1, 0, -1) if count % head_step(head_dim) == 0)]


def ffn_levels(ffn: int) -> list[int]:
    """How many neurons a layer may keep, descending."""
    return [ffn, *(width for width in range(ffn - 1, 0, -1) if width % BLOCK == 0)]


def measure_table(model: nn.Module, load: Load, seed: int = 0) -> Table:
    """Measures the layers of a model's class and sizes at several widths, all in turns.

    Raises:
        QBertError: a longer sequence than the model takes, or a small model that does not run fused with that scheme.
    """
    encoder = shaped(model)
    require_fits(encoder.base, load)
    layers = plan_of(model).layers
    heads, ffn = max(len(each.heads) for each in layers), max(each.ffn for each in layers)
    head_points = _some(head_levels(heads, encoder.head_dim(encoder.layers[0])), _HEAD_POINTS)
    ffn_points = _some(ffn_levels(ffn), _FFN_POINTS)
    shapes = dict.fromkeys([*((count, ffn) for count in head_points), *((heads, width) for width in ffn_points)])
    calls: dict[str, Callable[[], object]] = {}
    for count, width in shapes:
        calls[f"{count} {width}"] = _call(_small(encoder, heads, ffn, count, width, _LAYERS), load, seed)
    calls["one layer"] = _call(_small(encoder, heads, ffn, heads, ffn, 1), load, seed)
    device = next(encoder.base.parameters()).device
    with torch.inference_mode():
        ms = _ms_in_rounds(calls, device, f"{heads} {ffn}")
    whole = ms[f"{heads} {ffn}"]
    each = max(whole - ms["one layer"], 1e-6)
    by_heads = {count: (ms[f"{count} {ffn}"] - whole) / _LAYERS for count in head_points}
    by_ffn = {width: (ms[f"{heads} {width}"] - whole) / _LAYERS for width in ffn_points}
    return Table(Curve.of(by_heads), Curve.of(by_ffn), each, max(ms["one layer"] - each, 0.0))


def _ms_in_rounds(calls: Mapping[str, Callable[[], object]], device: torch.device, against: str) -> dict[str, float]:
    """Milliseconds of each call: its ratio to one of them within each round, so that what disturbs a whole round cancels."""
    samples = measure(calls, device, Rules(0.0, 0.0, _TABLE_ROUNDS, _TABLE_ROUNDS))
    for name, reason in samples.failures.items():
        raise QBertError(f"{name} cannot be timed: {reason}")
    unit = 1e3 * samples[against].median
    return {name: unit * ratio(sample, samples[against]) for name, sample in samples.items()}


def require_fits(base: Any, load: Load) -> None:
    """Raises QBertError where a load's sequences are longer than the encoder takes."""
    most = longest(base.config)
    if most is not None and load.seq > most:
        raise QBertError(f"seq is {load.seq}; allowed: 1 ... {most}, the positions of this model")


def _some(levels: list[int], count: int) -> list[int]:
    """The first, the last, and others between them."""
    if len(levels) <= count:
        return levels
    return [levels[round(index * (len(levels) - 1) / (count - 1))] for index in range(count)]


def _small(encoder: Shaped, heads: int, ffn: int, count: int, width: int, layers: int) -> Any:
    """A model of the encoder's class with few random layers and words."""
    config = copy.deepcopy(encoder.base.config)
    config.__dict__.pop("quantization_config", None)
    setattr(config, encoder.where.layers, layers)
    setattr(config, encoder.where.ffn, ffn)
    config.vocab_size = min(config.vocab_size, max(256, 1 + max(_special_ids(config), default=0)))
    with torch.random.fork_rng(devices=[]):
        small = type(encoder.base)(config).eval()
    taken = int(encoder.family.setting(config, "heads"))
    for place in range(layers):
        if count < taken:
            keep_heads_(small, place, range(count))
        if width < ffn:
            keep_neurons_(small, place, range(width))
    return small.to(next(encoder.base.parameters()).device)


def _special_ids(config: Any) -> list[int]:
    found = (getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"))
    return [each for each in found if isinstance(each, int)]


def _call(model: Any, load: Load, seed: int) -> Callable[[], object]:
    """A forward of the model as it will run."""
    ready(model, load, None)
    inputs = random_batch(model, load.batch, load.seq, seed)
    return lambda: model(**inputs)


def ready(model: Any, load: Load, batches: Sequence[Mapping[str, Any]] | None) -> None:
    """Quantizes, calibrates and fuses a model, in place, as a load's scheme says; nothing for a float one.

    Args:
        batches: to calibrate with; random ids where no value matters.

    Raises:
        QBertError: an encoder that does not run fused with that scheme.
    """
    recipe = load.recipe
    if recipe is None:
        return
    if recipe.linear is None:  # float linears, which nothing fuses
        quantize_(model, recipe)
        return
    base: Any = next(base for _, base, _ in encoders(model))
    rows, width = _CALIBRATED_BY
    few = min(width, longest(base.config) or width)
    given = [random_batch(model, rows, few, 0)] if batches is None else batches
    calibration = calibrate(base, given)
    quantize_(model, recipe)
    why = obstacle(base)
    if why is not None:
        raise QBertError(
            f"{type(base).__name__} does not run fused with {load.scheme}: {why}; allowed: none, to stay float"
        )
    fuse_(model, calibration)


def random_batch(model: Any, batch: int, seq: int, seed: int) -> dict[str, torch.Tensor]:
    """Ids of no special token, without padding."""
    base: Any = next(base for _, base, _ in encoders(model))
    generator = torch.Generator().manual_seed(seed)
    low, high = min(5, base.config.vocab_size - 1), int(base.config.vocab_size)
    ids = torch.randint(low, high, (batch, seq), generator=generator).to(next(base.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measured_ms(models: Mapping[str, tuple[nn.Module, Load]], batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of whole models as they will run, each with its load, in turns; the models are left as they are."""
    calls: dict[str, Callable[[], object]] = {}
    for name, (model, load) in models.items():
        base = copy.deepcopy(next(base for _, base, _ in encoders(model))).eval()
        require_fits(base, load)
        ready(base, load, batches)
        inputs = random_batch(base, load.batch, load.seq, 0)
        calls[name] = lambda base=base, inputs=inputs: base(**inputs)  # type: ignore[misc]
    device = next(next(iter(models.values()))[0].parameters()).device
    with torch.inference_mode():
        return {name: 1e3 * seconds for name, seconds in medians(calls, device, _ROUNDS).items()}
