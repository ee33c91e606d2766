"""Time, energy and bound of every step of an encoder on a target, for any formats of weights, activations and attention.

A step takes as long as the slowest of what works side by side: the array on its tiles (`tiling`), decoders, vector units (these
three one after the other where a target says that they do not overlap), and each level of memory. Steps follow one another.
Attention is one step, as in the encoder's program: scores stay in the units. Nothing is measured here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from qbert.cost.operands import Held, Side, Way, stored_bits, ways
from qbert.cost.result import EncoderCost, LayerCost, OperationCost
from qbert.cost.target import FLOAT_BYTES, Hardware
from qbert.cost.tiling import SUM_BYTES, Matrices, Tile, array_operations, array_traffic, level_traffic, tiles_of
from qbert.cost.work import THIN, EncoderWork, LayerWork, Step
from qbert.errors import QBertError
from qbert.formats import BlockFormat, Keep
from qbert.modules import AttentionFormats

# Operations of the vector units for each value, a fused multiply-add being one: assumptions, as instructions go.
NORM_OPS = 8  # two passes: mean, variance, normalize, gain, bias
SOFTMAX_OPS = 14  # scale, maximum, difference, an exponential of ten, sum, product
ACTIVATION_OPS = 20  # GELU: a polynomial or a rational function of some 18
ENCODE_OPS = 4  # largest magnitude, scale, round, pack
RESULT_OPS = 2  # scale and bias of a result
BLOCK_OPS = 2  # a block's sum converted, scaled and added up
DECODE_OPS = 4  # where a target has no decoders: unpack, look up or convert
OUTLIER_BYTES = 6  # of a value kept exactly: float32 and a 16-bit column, as in our files
GOBO_SHARE = 0.001  # of a matrix: "typically 99.9%" are not outliers (Zadeh et al., MICRO 2020, abstract)
_SPLITS = (1, 2, 4, 8)
_RESIDENT = 0.5  # share of a level that what is used again and again may fill
_MS, _MJ = 1e3, 1e3
COMPUTE, DECODE, VECTOR, LAUNCH = "compute", "decode", "vector units", "launch"
_KINDS = {VECTOR: "vector", DECODE: "decode"}  # as a target's `overlap` calls them


@dataclass(frozen=True)
class Formats:
    """What an encoder's numbers are; None leaves the target's float.

    Attributes:
        weights, embeddings: of linears and tables.
        activations: of what linears take.
        attention: of its operands.
        static: scales of tokens are known beforehand, so results are rounded where they arise; else what has a scale a token
            is written as a float first. Norms know their rows, so what they give is rounded at once in any case.
        outliers: share of the weights that is kept exactly; None: what the format's policy gives for a Gaussian.
    """

    weights: Side = None
    activations: Side = None
    attention: AttentionFormats = field(default_factory=AttentionFormats)
    embeddings: Side = None
    static: bool = False
    outliers: float | None = None

    def operand(self, name: str) -> Side:
        """Of attention."""
        return self.attention.chosen().get(name)

    @property
    def outlier_share(self) -> float:
        """Of the weights."""
        return outlier_share(self.weights) if self.outliers is None else self.outliers


def outlier_share(side: Side) -> float:
    """Share of a matrix that a format keeps exactly."""
    if side is None:
        return 0.0
    policy, number = side.outlier_policy
    return {
        Keep.NONE: 0.0, Keep.SHARE: number, Keep.GOBO: GOBO_SHARE, Keep.SIGMA: math.erfc(number / math.sqrt(2.0)),
    }[policy]  # fmt: skip


class Batch(NamedTuple):
    """Tokens of each sequence; padding is not computed."""

    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(self.lengths)


@dataclass(frozen=True)
class StepCost:
    """One step. `parts`: seconds of each possible bound; `useful`: seconds of its operations at the full rate; `joules` is
    None where the target does not say."""

    step: Step
    seconds: float
    parts: dict[str, float]
    useful: float = 0.0
    joules: float | None = None
    way: tuple[Way, ...] = ()
    tile: Tile | None = None
    shape: tuple[int, int, int] = (0, 0, 0)

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def utilization(self) -> float:
        """Of the units that it runs on."""
        return self.useful / self.seconds if self.seconds else 0.0


def encoder_cost(
    work: EncoderWork, target: Hardware, formats: Formats | None = None, *, batch: int = 8, seq: int = 128,
    lengths: Sequence[int] | None = None,
) -> EncoderCost:  # fmt: skip
    """What a forward of the encoder takes on a target.

    Args:
        work: see `read_work`.
        formats: of its numbers; float by default.
        batch, seq: sequences, and tokens of each; or `lengths`: of each sequence, without padding.

    Raises:
        QBertError: a batch or length that is not positive, or formats that no unit of the target can take.
    """
    given = tuple(lengths) if lengths is not None else (seq,) * batch
    if not given or min(given) < 1:
        raise QBertError(
            f"batch of {len(given)} sequences, {min(given, default=0)} tokens; allowed: at least 1 of each"
        )
    chosen = formats or Formats()
    model = _Model(target, chosen, Batch(given), _weight_bytes(work, chosen, target))
    costs = {layer.name: [model.cost(step) for step in model.lowered(layer)] for layer in work.every_layer}
    every = [cost for steps in costs.values() for cost in steps]
    bounds, seconds = dict[str, float](), sum(cost.seconds for cost in every)
    for cost in every:
        bounds[cost.bound] = bounds.get(cost.bound, 0.0) + cost.seconds / seconds
    return EncoderCost(
        target=target.name, description=target.description, batch=len(given), tokens=sum(given),
        weights=_name(chosen.weights, target), activations=_name(chosen.activations, target),
        attention=", ".join(sorted({fmt.name for fmt in chosen.attention.chosen().values()})) or target.float,
        ms=seconds * _MS, bounds=dict(sorted(bounds.items(), key=lambda item: -item[1])),
        utilization=sum(cost.useful for cost in every) / seconds, mj=_millijoules(every),
        layers=[_layer(name, steps) for name, steps in costs.items()],
        operations=_operations(every), notes=_notes(every, chosen, target),
    )  # fmt: skip


def _name(side: Side, target: Hardware) -> str:
    return target.float if side is None else side.name


def _weight_bytes(work: EncoderWork, formats: Formats, target: Hardware) -> float:
    """Of all linears, as they are stored."""
    layers = {id(step): step for layer in work.layers for step in layer.steps if step.kind == "linear"}
    share = sum(step.n * step.k for step in layers.values())
    stored = sum(step.n * step.k * _value_bytes(step, formats, target) for step in layers.values())
    return stored * work.weights / share if share else 0.0


def _value_bytes(step: Step, formats: Formats, target: Hardware) -> float:
    return stored_bits(formats.weights, step.n, step.k, target) / 8 + formats.outlier_share * OUTLIER_BYTES


@dataclass
class _Product:
    """Two operands to multiply, with what the vector units do beside it."""

    problem: Matrices
    weights: Side
    activations: Side


@dataclass(frozen=True)
class _Model:
    """One target, one choice of formats, one batch."""

    target: Hardware
    formats: Formats
    batch: Batch
    weight_bytes: float
    _known: dict[Step, StepCost] = field(default_factory=dict)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def lowered(self, layer: LayerWork) -> list[Step]:
        """The layer's steps, with a pass of its own for what has a scale a token and comes out of no norm."""
        done = []
        for step in layer.steps:
            done.append(step)
            if step.writes != "hidden" and any(
                self._needs_pass(side, step.writes) for side in self._read_as(step.writes)
            ):
                columns = step.n // 2 if step.gated else step.n
                done.append(Step(f"quantize {step.writes}", "rows", 0, columns, reads=step.writes, writes=step.writes))
        return done

    def _read_as(self, slot: str) -> tuple[Side, ...]:
        """The formats that a slot's readers take: thirds of the columns of "projected"."""
        if slot == "projected":
            return tuple(self.formats.operand(name) for name in ("query", "key", "value"))
        return (self.formats.activations,)

    def _needs_pass(self, side: Side, slot: str) -> bool:
        known = self.formats.static and not slot.endswith(THIN)
        return side is not None and not known and side.scale != "none" and side.block[1] == 0

    def _written_as(self, slot: str) -> tuple[Side, ...]:
        """The formats that a slot is written in: its readers', or floats that a pass of its own rounds."""
        if slot == "hidden":
            return (None,)
        return tuple(None if self._needs_pass(side, slot) else side for side in self._read_as(slot))

    def cost(self, step: Step) -> StepCost:
        """Of one step; steps that are alike are computed once."""
        found = self._known.get(step)
        if found is None:
            by_kind = {
                "linear": self._linear,
                "attention": self._attention,
                "rows": self._rows,
                "embedding": self._look_up,
            }
            found = self._known[step] = by_kind[step.kind](step)
        return found

    def _linear(self, step: Step) -> StepCost:
        t, columns = self.batch.tokens, step.n // 2 if step.gated else step.n
        written = self._written_as(step.writes)
        result = sum(self._bytes(side, t, columns) for side in written) / len(written)
        encoded = any(side is not None for side in written)
        problem = Matrices(
            t, step.n, step.k, _value_bytes(step, self.formats, self.target), self._bytes(self.formats.activations, t, step.k),
            result * columns / step.n,
        )  # fmt: skip
        vector: float = RESULT_OPS * t * step.n + (ACTIVATION_OPS if step.activated else 0) * t * columns
        vector += (ENCODE_OPS if encoded else 0) * t * columns
        vector += self.formats.outlier_share * step.n * step.k * t
        return self._product(step, [_Product(problem, self.formats.weights, self.formats.activations)], vector)

    def _attention(self, step: Step) -> StepCost:
        """Both products of all heads, and the softmax between them."""
        heads, size, t = step.heads, step.k, self.batch.tokens
        products, pairs = [], 0.0
        query, key, shares, value = (self.formats.operand(name) for name in ("query", "key", "probabilities", "value"))
        for length, times in Counter(self.batch.lengths).items():
            seen = length if step.window is None else min(length, 2 * step.window + 1)
            pairs += times * heads * length * seen
            stays = 0.0  # scores and probabilities do not leave the units
            products += [
                _Product(
                    Matrices(length, seen, size, self._bytes(key, t, size), self._bytes(query, t, size), stays, heads * times),
                    key, query,
                ),
                _Product(
                    Matrices(length, size, seen, self._bytes(value, t, size), stays, self._context(t, step.n), heads * times),
                    value, shares,
                ),
            ]  # fmt: skip
        encoded = ENCODE_OPS * pairs if shares is not None else 0.0
        if self._written_as("context") != (None,):
            encoded += ENCODE_OPS * t * step.n
        return self._product(step, products, SOFTMAX_OPS * pairs + RESULT_OPS * t * step.n + encoded)

    def _context(self, t: int, columns: int) -> float:
        return self._bytes(self._written_as("context")[0], t, columns)

    def _rows(self, step: Step) -> StepCost:
        t, k = self.batch.tokens, step.k
        floats = FLOAT_BYTES[self.target.float]
        codes = 0.0 if self.formats.activations is None else self._bytes(self.formats.activations, t, k)
        encode = ENCODE_OPS if self.formats.activations is not None else 0
        if not step.norm:  # a pass that only rounds
            return self._passes(step, t * k * (floats + codes), float(t * k * encode))
        return self._passes(step, t * k * (3 * floats + codes), float(t * k * (NORM_OPS + 1 + encode)))

    def _look_up(self, step: Step) -> StepCost:
        t, k, tables = self.batch.tokens, step.k, step.tables
        floats = FLOAT_BYTES[self.target.float]
        row = stored_bits(self.formats.embeddings, 1, k, self.target) / 8
        codes = 0.0 if self.formats.activations is None else self._bytes(self.formats.activations, t, k)
        unpack = 0 if self.formats.embeddings is None else DECODE_OPS * tables
        encode = ENCODE_OPS if self.formats.activations is not None else 0
        ops = t * k * (NORM_OPS + tables + unpack + encode)
        cost = self._passes(step, t * k * (floats + codes), float(ops), from_main=t * k * row * tables)
        return cost

    def _bytes(self, side: Side, rows: int, columns: int) -> float:
        return stored_bits(side, rows, columns, self.target) / 8

    # ---- time and energy --------------------------------------------------------------------------------------------

    def _product(self, step: Step, products: Sequence[_Product], vector: float) -> StepCost:
        """The fastest way and tile for each product, one after the other, with the vector units' work beside them."""
        chosen = [self._fastest(step, each) for each in products]
        total = _Load()
        for each in chosen:
            total = total + each.load
        total = replace(total, vector=total.vector + vector)
        problem = products[0].problem
        return self._finished(
            step,
            total,
            tuple(dict.fromkeys(each.way for each in chosen)),
            chosen[0].tile,
            (problem.t, problem.n, problem.k),
        )

    def _fastest(self, step: Step, product: _Product) -> _Candidate:
        possible = ways(self.target, product.weights, product.activations, product.problem.k)
        if not possible:
            asked = f"{_name(product.weights, self.target)} x {_name(product.activations, self.target)}"
            pairs = [
                f"{left} x {right}" for rate in self.target.rate for left in rate.weights for right in rate.activations
            ]
            raise QBertError(
                f"target {self.target.name} has no units for {asked}, nor for floats of both; allowed: {', '.join(pairs)}"
            )
        candidates = [
            self._candidate(step, product, way, tile, split)
            for way in possible
            for tile in self.target.array.tiles
            for split in self._splits(product.problem, tile)
        ]
        return min(candidates, key=lambda each: (self._seconds(each.load), each.load.decode, -each.way.rate.ops))

    def _splits(self, problem: Matrices, tile: Tile) -> Iterable[int]:
        """Where there are fewer tiles than units, several may share a tile's input channels."""
        array = self.target.array
        if array.dataflow != "output" or tiles_of(problem, tile) * 2 > array.units:
            return (1,)
        return [split for split in _SPLITS if split <= math.ceil(problem.k / tile[2])]

    def _candidate(self, step: Step, product: _Product, way: Way, tile: Tile, split: int) -> _Candidate:
        problem, array, rate = product.problem, self.target.array, way.rate
        padded = array_operations(problem, tile, array.units, array.dataflow, split)
        decoded = self._decoded(problem, way, tile)
        vector = _scaling(problem, product, way) + problem.t * problem.n * problem.count * (split - 1)
        if self.target.decode is None:
            vector, decoded = vector + DECODE_OPS * decoded, 0.0
        load = _Load(
            array=padded / (rate.ops * rate.sustained),
            useful=problem.operations / rate.ops,
            decode=decoded,
            vector=vector,
            joules=None if rate.joules is None else rate.joules * problem.operations,
            traffic=self._traffic(step, problem, tile, split),
        )
        return _Candidate(way, tile, load)

    def _decoded(self, problem: Matrices, way: Way, tile: Tile) -> float:
        """Values that are decoded, those of a tile each time that it is read."""
        again = self.target.decode is not None and self.target.decode.each == "tile"
        times = [math.ceil(problem.t / tile[0]), math.ceil(problem.n / tile[1])] if again else [1, 1]
        weights = problem.n * problem.k * times[0] if way.weights.decoded else 0
        activations = problem.t * problem.k * times[1] if way.activations.decoded else 0
        return float(problem.count * (weights + activations))

    def _traffic(self, step: Step, problem: Matrices, tile: Tile, split: int) -> tuple[float, ...]:
        """Bytes that each level gives or takes, the outermost first."""
        levels = self.target.memory
        moving = problem.count * (problem.activations + problem.results)
        weights_at = self._home(self.weight_bytes if step.kind == "linear" else problem.count * problem.weights)
        moving_at, found = self._home(moving), []
        for index, _ in enumerate(levels):
            if index == len(levels) - 1:
                found.append(array_traffic(problem, tile, self.target.array.dataflow))
                break
            there = replace(
                problem,
                weight_bytes=problem.weight_bytes if weights_at <= index else 0.0,
                activation_bytes=problem.activation_bytes if moving_at <= index else 0.0,
            )
            results = problem.count * problem.results if moving_at <= index else 0.0
            sums = 2.0 * problem.t * problem.n * SUM_BYTES * (split - 1) if moving_at <= index else 0.0
            found.append(level_traffic(there, levels[index + 1].bytes) + results + sums)
        return tuple(found)

    def _home(self, size: float) -> int:
        """The innermost level that keeps so many bytes from one use to the next."""
        holding = [index for index, level in enumerate(self.target.memory) if size <= level.bytes * _RESIDENT]
        return max(holding, default=0)

    def _passes(self, step: Step, moved: float, vector: float, from_main: float = 0.0) -> StepCost:
        """A pass over rows, where they lie."""
        home = self._home(moved)
        traffic = [moved if index >= home else 0.0 for index, _ in enumerate(self.target.memory)]
        traffic[0] += from_main
        return self._finished(
            step,
            _Load(vector=vector, joules=0.0, traffic=tuple(traffic)),
            (),
            None,
            (self.batch.tokens, step.n, step.k),
        )

    def _parts(self, load: _Load) -> dict[str, float]:
        target = self.target
        parts = {COMPUTE: load.array, VECTOR: load.vector / target.vector.ops}
        if target.decode is not None:
            parts[DECODE] = load.decode / target.decode.values
        for level, moved in zip(target.memory, load.traffic, strict=True):
            if level.bandwidth is not None:
                parts[f"{level.name} bandwidth"] = moved / level.bandwidth
        return parts

    def _seconds(self, load: _Load) -> float:
        parts = self._parts(load)
        arithmetic = {name: parts[name] for name in (COMPUTE, VECTOR, DECODE) if name in parts}
        memory = max((seconds for name, seconds in parts.items() if name not in arithmetic), default=0.0)
        beside = self.target.array.overlap
        apart = sum(
            parts.get(name, 0.0) for name, kind in ((VECTOR, "vector"), (DECODE, "decode")) if kind not in beside
        )
        side_by_side = [seconds for name, seconds in arithmetic.items() if name == COMPUTE or _KINDS[name] in beside]
        busy = max(side_by_side) + apart
        return max(busy, memory) if "memory" in beside else busy + memory

    def _finished(
        self, step: Step, load: _Load, chosen: tuple[Way, ...], tile: Tile | None, shape: tuple[int, int, int]
    ) -> StepCost:  # fmt: skip
        parts, seconds = self._parts(load), self._seconds(load)
        if self.target.launch is not None:
            parts[LAUNCH] = self.target.launch.seconds
            seconds += self.target.launch.seconds
        return StepCost(step, seconds, parts, load.useful, self._joules(load, seconds), chosen, tile, shape)

    def _joules(self, load: _Load, seconds: float) -> float | None:
        target = self.target
        if not target.has_energy or load.joules is None:
            return None
        moved = sum(moved * (level.joules or 0.0) for level, moved in zip(target.memory, load.traffic, strict=True))
        decoded = load.decode * (target.decode.joules or 0.0) if target.decode is not None else 0.0
        static = target.static.watts * seconds if target.static is not None else 0.0
        return load.joules + moved + decoded + load.vector * (target.vector.joules or 0.0) + static


@dataclass(frozen=True)
class _Load:
    """What a step asks of each part: seconds of the array (and those of its operations at the full rate), values to decode,
    operations of the vector units, bytes of each level."""

    array: float = 0.0
    useful: float = 0.0
    decode: float = 0.0
    vector: float = 0.0
    joules: float | None = 0.0
    traffic: tuple[float, ...] = ()

    def __add__(self, other: _Load) -> _Load:
        traffic = [a + b for a, b in zip(self.traffic, other.traffic, strict=True)] if self.traffic else other.traffic
        joules = None if self.joules is None or other.joules is None else self.joules + other.joules
        return _Load(
            self.array + other.array, self.useful + other.useful, self.decode + other.decode, self.vector + other.vector,
            joules, tuple(traffic),
        )  # fmt: skip


class _Candidate(NamedTuple):
    way: Way
    tile: Tile
    load: _Load


def _scaling(problem: Matrices, product: _Product, way: Way) -> float:
    """Operations of the vector units that formats bring into a product: sums of blocks, dictionaries, zero points."""
    results, done = problem.t * problem.n * problem.count, 0.0
    for side, held in ((product.weights, way.weights), (product.activations, way.activations)):
        if side is None:
            continue
        if held.sums:
            done += BLOCK_OPS * results * math.ceil(problem.k / side.block[1])
        if held.operand.startswith("dict"):  # sums of each centroid's activations, multiplied at the end
            done += results * side.element.codes
        if not side.symmetric and not held.operand.startswith(("fp", "bf", "tf")):
            done += results
    return float(done)


# ---- summing up -----------------------------------------------------------------------------------------------------


def _millijoules(costs: Iterable[StepCost]) -> float | None:
    joules = [cost.joules for cost in costs]
    return None if None in joules else _MJ * sum(each for each in joules if each is not None)


def _layer(name: str, costs: Sequence[StepCost]) -> LayerCost:
    bounds, seconds = dict[str, float](), sum(cost.seconds for cost in costs)
    for cost in costs:
        bounds[cost.bound] = bounds.get(cost.bound, 0.0) + cost.seconds
    return LayerCost(
        name=name, ms=seconds * _MS, bound=max(bounds, key=lambda bound: bounds[bound]),
        utilization=sum(cost.useful for cost in costs) / seconds, mj=_millijoules(costs),
    )  # fmt: skip


def _operations(costs: Iterable[StepCost]) -> list[OperationCost]:
    times = Counter(cost.step for cost in costs)
    return [
        OperationCost(
            name=cost.step.name, kind=cost.step.kind, layers=times[cost.step], shape=cost.shape,
            runs_as=", ".join(f"{each.weights.operand} x {each.activations.operand}" for each in cost.way), tile=cost.tile,
            ms=cost.seconds * _MS, bound=cost.bound, parts={name: part * _MS for name, part in cost.parts.items()},
            utilization=cost.utilization, mj=_millijoules([cost]),
        )
        for cost in {each.step: each for each in costs}.values()
    ]  # fmt: skip


def _notes(costs: Iterable[StepCost], formats: Formats, target: Hardware) -> list[str]:
    """What is not done in the formats themselves."""
    notes = dict[str, None]()
    for cost in costs:
        sides = [("weights", formats.weights), ("activations", formats.activations)]
        if cost.step.kind == "attention":
            operands = formats.attention.chosen().values()
            sides = [("attention", next(iter(operands), None))] * 2
        for way in cost.way:
            for (what, side), held in zip(sides, (way.weights, way.activations), strict=True):
                if side is not None:
                    notes |= dict.fromkeys(_said(what, side, held))
    share = formats.outlier_share
    if share:
        notes[f"{share:.2%} of the weights are kept exactly, and multiplied by the vector units"] = None
    if not target.has_energy:
        notes[f"{target.name} says no energies"] = None
    return list(notes)


def _said(what: str, side: BlockFormat, held: Held) -> Iterable[str]:
    if held.decoded:
        rounded = ", rounded to it" if held.rounded else ", exactly"
        yield f"{what} {side.name}: no unit takes it here; decoded to {held.operand}{rounded}"
    if held.sums:
        yield f"{what} {side.name}: each block's sum is scaled by the vector units"
