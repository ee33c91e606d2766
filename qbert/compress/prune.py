"""Heads and feed-forward neurons taken out of an encoder: a budget of measured milliseconds, no training, no labels needed.

1. A table says what a layer takes by its heads and its neurons, on this machine, with the kernels that will run (`latency`).
2. Within each sublayer second-order scores say in which order units go, and what the others must be then (`removal`).
3. Gradients of random projections of the output say what that does to the embedding (`sensitivity`), at several widths.
4. Dynamic programming shares the budget among all sublayers (`budget`).
5. From the first layer to the last: units go, and the linear after them is refitted to the inputs that it gets now, also so
   that it makes up for what earlier layers have lost (`drift`). Held-out tokens choose whether and how strongly, or that only
   means are folded into the bias (`removal.refit`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qbert.compress.baselines import Method, Ranking, ranking, require_method
from qbert.compress.budget import Option, share
from qbert.compress.drift import Followed
from qbert.compress.latency import Load, Table, ffn_levels, head_levels, measure_table, measured_ms
from qbert.compress.removal import Moments, Removal, Sums, refit, remove_heads, remove_neurons
from qbert.compress.report import SEQUENCE, Report, Size, report_of
from qbert.compress.sensitivity import ATTENTION, FFN, Seen, Site, look, output_root, rank_agreement
from qbert.compress.stream import Stream
from qbert.compress.texts import (
    Texts,
    agreement,
    float_encoder,
    outputs_of,
    plain,
    require,
    require_pooling,
    undone_on_error,
)  # fmt: skip
from qbert.convert import note_reshaped
from qbert.errors import QBertError
from qbert.modes import evaluation_mode
from qbert.shapes import LayerShape, Shaped, keep_heads_, keep_neurons_, plan_of, shaped

Progress = Callable[[int, int, str], None]
Counts = int | Sequence[int]

_LEAST_TEXTS, _JUDGE_BY = 32, 512
_LOOK_TOKENS, _CHECK_TOKENS = 4096, 2048  # whose gradients are looked at; that choose ridges
_FIT_TOKENS = 8  # for each column that is refitted, at most: more change nothing
_LEAST_SHARE = 8  # an eighth of a layer's neurons stays: below, taking the layer out is the better way
_POINTS = 8  # sizes of a sublayer at which the loss is predicted; between them it is interpolated


class PruneReport(Report):
    """Attributes, beside `Report`'s:

    predicted_ms, measured_ms: (before, after) of a forward as it will run, by the table and measured; None where the
        budget was none of milliseconds.
    load: of which forward.
    ranks: mean over sublayers of the rank correlation of importance by two halves of the texts; near 1 they are enough.
    error: relative error that is left in each sublayer's output on held-out tokens, attention and feed-forward in turn.
    """

    predicted_ms: tuple[float, float] | None = None
    measured_ms: tuple[float, float] | None = None
    load: str | None = None
    ranks: float
    error: list[float]

    def __str__(self) -> str:
        lines = [super().__str__(), f"  ranks of importance by two halves of the texts agree to {self.ranks:.2f}"]
        for name, pair in (("predicted", self.predicted_ms), ("measured", self.measured_ms)):
            if pair is not None:
                before, after = pair
                lines.append(f"  {name} {before:.2f} -> {after:.2f} ms, x{before / after:.2f} ({self.load})")
        return "\n".join(lines)


@torch.inference_mode(False)  # gradients are looked at, whatever mode the caller is in
def prune_(
    model: nn.Module,
    texts: Sequence[str],
    *,
    speedup: float | None = None,
    macs: float | None = None,
    heads: Counts | None = None,
    ffn: Counts | None = None,
    labels: Sequence[int] | None = None,
    tokenizer: Any = None,
    scheme: str | None = "w8a8",
    batch: int = 8,
    seq: int = 128,
    uniform: bool = False,
    refit: bool | Literal["scales"] = True,
    method: Method = "second-order",
    pooling: str = "mean",
    seed: int = 0,
    table: Table | None = None,
    progress: Progress | None = None,
) -> PruneReport:
    """Takes heads and feed-forward neurons out of an encoder, in place. See this module for how.

    Args:
        model: float, with one encoder whose layers can be taken apart.
        texts: of the kind the model is used on, some hundreds. Half refit, a quarter choose, a quarter are in the report.
        speedup: how many times faster a forward is to be: of the encoder, by measured milliseconds of `scheme` here.
        macs: in place of it, the share of the layers' multiply-adds that is kept, 0 ... 1.
        heads, ffn: in place of both, how many each layer keeps: a number, or one for each layer.
        labels: of a classifier, one for each text; by default classes are drawn from its own predictions.
        tokenizer: by default the one beside the model's files.
        scheme: what the model will be quantized to, as `quantize_` takes it, fused and calibrated; None if it stays float.
        batch, seq: of the forward that is to be faster.
        uniform: all heads stay and every layer keeps as many neurons: a plain model of transformers, which needs no qbert.
        refit: whether what is left is refitted; otherwise means alone are folded into biases. ``"scales"``: one factor a unit.
        method: how units are chosen. The others are there to compare with (`baselines`): ``"fisher"`` with ``"scales"`` is
            Kwon et al. (2022), but that means are folded; ``"magnitude"``; ``"random"``.
        pooling: of embeddings, ``"mean"`` or ``"cls"``.
        table: milliseconds of this model's layers, by `latency.measure_table`; by default they are measured now.
        progress: called with (steps done, in all, what is done).

    Raises:
        QBertError: none or several budgets, one that cannot be met, too few texts or tokens, labels that do not fit, a
            quantized model or one that cannot be taken apart. The model is left as it was.
    """
    start = time.perf_counter()
    require_pooling(pooling)
    require_method(method)
    if refit not in (True, False, "scales"):
        raise QBertError(f"refit is {refit!r}; allowed: True, False, 'scales'")
    encoder = float_encoder(model, "pruning")
    labels = None if labels is None else [plain(each) for each in plain(labels)]
    load = Load(batch, seq, scheme)
    wanted = _wanted(encoder, speedup, macs, heads, ffn, uniform, method, seed)
    parts = _Parts.of(model, texts, labels, tokenizer)
    if refit is True:
        _require_tokens(encoder, parts.fit)
    before = Size.of(model)
    original = outputs_of(model, parts.held_out, pooling)
    tell = progress or (lambda done, total, what: None)
    with undone_on_error(model), evaluation_mode(model):
        if speedup is None:
            table = None
        elif table is None:
            table = measure_table(model, load, seed)
        seen = look(model, encoder, parts.look, parts.look_labels, pooling, seed)
        sublayers = _sublayers(encoder, parts.fit, seen, wanted, tell)
        chosen = wanted.choose(encoder, sublayers, table, plan_of(model).layers)
        ms = _Milliseconds.before(model, table, load, parts) if table is not None else None
        errors = _apply(model, encoder, parts, sublayers, chosen, refit, tell)
        found = agreement(model, original, outputs_of(model, parts.held_out, pooling))
    note_reshaped(model)
    report = report_of("prune", model, before, time.perf_counter() - start, found)
    timed = {} if ms is None else ms.after(model)
    ranks = float(np.mean([each.ranks for each in sublayers.values()]))
    return PruneReport(**report.model_dump(), **timed, ranks=ranks, error=errors)


# ---- what is asked for ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """A budget, or counts.

    Attributes:
        counts: site -> units that stay; empty where there is a budget.
        method, seed: how units are chosen.
    """

    speedup: float | None
    macs: float | None
    counts: dict[Site, int]
    uniform: bool
    method: Method
    seed: int

    def levels(self, encoder: Shaped, site: Site, units: int) -> list[int]:
        """How many units the sublayer may keep, descending."""
        if self.counts:
            return sorted({units, self.counts.get(site, units)}, reverse=True)
        if site[1] == ATTENTION:
            return [units] if self.uniform else head_levels(units, encoder.head_dim(encoder.layers[site[0]]))
        return [each for each in ffn_levels(units) if each * _LEAST_SHARE >= units]

    def choose(
        self, encoder: Shaped, sublayers: dict[Site, _Sublayer], table: Table | None, layers: Sequence[LayerShape]
    ) -> dict[Site, int]:
        """How many units each sublayer keeps."""
        if self.counts:
            return self.counts
        costs = _costs(encoder, sublayers, table)
        whole = sum(costs[site](each.units) for site, each in sublayers.items())
        fixed = 0.0 if table is None else table.rest + table.layer * len(layers)
        goal = (fixed + whole) / self.speedup if self.speedup is not None else (self.macs or 1.0) * whole
        options = [
            [Option(level, each.loss(level), costs[site](level)) for level in each.levels]
            for site, each in sublayers.items()
        ]
        found = _same_width(sublayers, options, goal - fixed) if self.uniform else share(options, goal - fixed)
        if found is None:
            least = fixed + sum(min(each.cost for each in row) for row in options)
            asked = f"speedup {self.speedup:g}" if self.speedup is not None else f"macs {self.macs:g}"
            most = (fixed + whole) / least
            raise QBertError(
                f"{asked} cannot be met by heads and neurons: with the fewest that may stay a forward is x{most:.2f} of what "
                f"it was; take layers out too (qbert.drop_layers_)"
            )
        return {site: option.kept for site, option in zip(sublayers, found, strict=True)}


def _wanted(
    encoder: Shaped, speedup: float | None, macs: float | None, heads: Counts | None, ffn: Counts | None, uniform: bool,
    method: Method, seed: int,
) -> _Wanted:  # fmt: skip
    given = [name for name, each in (("speedup", speedup), ("macs", macs)) if each is not None]
    given += ["heads and ffn"] if heads is not None or ffn is not None else []
    if len(given) != 1:
        raise QBertError(f"{' and '.join(given) or 'nothing'} given; allowed: one of speedup, macs, or heads and ffn")
    if speedup is not None and not (isinstance(plain(speedup), int | float) and 1.0 < speedup < 100.0):
        raise QBertError(f"speedup is {speedup!r}; allowed: above 1, below 100")
    if macs is not None and not (isinstance(plain(macs), int | float) and 0.0 < macs < 1.0):
        raise QBertError(f"macs is {macs!r}; allowed: between 0 and 1, the share that is kept")
    if heads is not None and uniform:
        raise QBertError("uniform keeps all heads: transformers makes their size from their number; leave heads out")
    counts: dict[Site, int] = {}
    for kind, wanted in ((ATTENTION, heads), (FFN, ffn)):
        if wanted is not None:
            counts |= _counts(encoder, kind, wanted)
    if counts and uniform and len(set(counts.values())) > 1:
        raise QBertError(f"uniform, and ffn is {list(counts.values())}; allowed: one number")
    return _Wanted(speedup, macs, counts, uniform, method, seed)


def _counts(encoder: Shaped, kind: str, wanted: Counts) -> dict[Site, int]:
    layers = len(encoder.layers)
    wanted = plain(wanted)
    each = [plain(one) for one in wanted] if isinstance(wanted, Iterable) else [wanted] * layers
    if len(each) != layers:
        raise QBertError(f"{kind}: {len(each)} numbers for {layers} layers")
    for place, count in enumerate(each):
        units = _units(encoder, place, kind)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= units:
            raise QBertError(f"{kind} of layer {place}: {count!r} to keep; allowed: 1 ... {units}")
    return {(place, kind): count for place, count in enumerate(each)}


def _same_width(sublayers: dict[Site, _Sublayer], options: list[list[Option]], budget: float) -> list[Option] | None:
    """The widest feed-forward network of all layers alike that the budget has room for."""
    common = set.intersection(*(set(each.levels) for site, each in sublayers.items() if site[1] == FFN))
    for width in sorted(common, reverse=True):
        found = [
            next(option for option in row if option.kept == (width if site[1] == FFN else each.units))
            for (site, each), row in zip(sublayers.items(), options, strict=True)
        ]
        if sum(option.cost for option in found) <= budget:
            return found
    return None


def _costs(
    encoder: Shaped, sublayers: dict[Site, _Sublayer], table: Table | None
) -> dict[Site, Callable[[int], float]]:
    """Site -> what so many units cost: milliseconds, or multiply-adds for a token where there is no table."""
    if table is not None:
        return {site: table.heads.at if site[1] == ATTENTION else table.ffn.at for site in sublayers}
    found: dict[Site, Callable[[int], float]] = {}
    for site, each in sublayers.items():
        hidden = each.weight.shape[0]
        per_unit = (4 * hidden + 2 * SEQUENCE) * each.group if site[1] == ATTENTION else 2 * hidden
        found[site] = lambda count, per_unit=per_unit: float(count * per_unit)  # type: ignore[misc]
    return found


@dataclass(frozen=True)
class _Parts:
    """The texts: half to fit by, a quarter to choose by, of which some are looked at with gradients, a quarter to report."""

    fit: Texts
    check: Texts
    held_out: Texts
    look: Texts
    look_labels: list[int] | None

    @classmethod
    def of(cls, model: nn.Module, texts: Sequence[str], labels: Sequence[int] | None, tokenizer: Any) -> _Parts:
        given = Texts.of(model, texts, tokenizer)
        require(given, _LEAST_TEXTS, "pruning")
        if labels is not None and len(labels) != len(given):
            raise QBertError(f"{len(labels)} labels for {len(given)} texts; allowed: one for each")
        fit, rest = given.halves()
        check, held_out = rest.halves()
        held_out = held_out.first(_JUDGE_BY)
        widest = max(layer.ffn for layer in plan_of(model).layers)
        look = check.within(_LOOK_TOKENS)
        look_labels = None if labels is None else list(labels)[1::4][: len(look)]
        return cls(fit.within(_FIT_TOKENS * widest), check, held_out, look, look_labels)


def _require_tokens(encoder: Shaped, fit: Texts) -> None:
    widest = max(_units(encoder, place, FFN) for place in range(len(encoder.layers)))
    if fit.tokens < widest:
        raise QBertError(
            f"half of the texts are {fit.tokens} tokens to refit {widest} columns by; allowed: as many or more (five times as "
            f"many are better), or refit=False"
        )


# ---- sublayers ------------------------------------------------------------------------------------------------------


@dataclass
class _Sublayer:
    """The last linear of attention or of a feed-forward network, whose inputs are what goes.

    Attributes:
        weight: (n, k) float64, with all inputs.
        group: inputs of a unit: a head's size, or 1.
        units: how many there are.
        levels: how many may stay, descending.
        removal: in which order they go.
        losses: units that stay -> predicted squared change of the output.
        ranks: rank correlation of importance by two halves of the texts.
    """

    weight: Tensor
    group: int
    units: int
    levels: list[int]
    removal: Removal | Ranking
    losses: dict[int, float] = field(default_factory=dict)
    ranks: float = 1.0

    def loss(self, count: int) -> float:
        """Of so many units, interpolated; it never falls when more go."""
        sizes = sorted(self.losses)
        falling = np.maximum.accumulate([self.losses[size] for size in reversed(sizes)])[::-1]
        return float(np.interp(count, sizes, falling))


def _units(encoder: Shaped, place: int, kind: str) -> int:
    layer, paths = encoder.layers[place], encoder.family.layer
    path = paths.attention_output if kind == ATTENTION else paths.ffn_out
    columns = int(layer.get_submodule(path).in_features)  # type: ignore[arg-type]
    return columns // (encoder.head_dim(layer) if kind == ATTENTION else 1)


def _sublayers(
    encoder: Shaped, fit: Texts, seen: dict[Site, Seen], wanted: _Wanted, tell: Progress
) -> dict[Site, _Sublayer]:
    """For every sublayer the order in which its units go, and what that does to the output."""
    stream, found = Stream(encoder, fit), dict[Site, _Sublayer]()
    layers = len(encoder.layers)
    for place in range(layers):
        tell(place, 2 * layers, f"layer {place}: which units matter")
        for kind, moments in _moments(encoder, stream, place).items():
            site = (place, kind)
            found[site] = _sublayer(encoder, site, moments, seen[site], wanted)
    return found


def _paths(encoder: Shaped) -> dict[str, str]:
    return {ATTENTION: encoder.family.layer.attention_output, FFN: encoder.family.layer.ffn_out}


def _moments(encoder: Shaped, stream: Stream, place: int) -> dict[str, Moments]:
    layer, paths = encoder.layers[place], _paths(encoder)
    sums = {kind: Sums.empty(int(layer.get_submodule(path).in_features)) for kind, path in paths.items()}  # type: ignore[arg-type]
    stream.watch(place, {path: sums[kind].add for kind, path in paths.items()}, advance=True)
    return {kind: each.moments() for kind, each in sums.items()}


def _sublayer(encoder: Shaped, site: Site, moments: Moments, seen: Seen, wanted: _Wanted) -> _Sublayer:
    place, kind = site
    layer = encoder.layers[place]
    linear: Any = layer.get_submodule(_paths(encoder)[kind])
    group = encoder.head_dim(layer) if kind == ATTENTION else 1
    units = linear.in_features // group
    levels, weight = wanted.levels(encoder, site, units), linear.weight.detach().double().cpu()
    if wanted.method != "second-order":
        ranked = ranking(wanted.method, seen, weight, group, wanted.seed)
        return _Sublayer(
            weight,
            group,
            units,
            levels,
            ranked,
            ranked.losses(levels),
            rank_agreement(seen, linear.weight.detach(), group),
        )
    points = (
        levels
        if len(levels) <= _POINTS
        else [levels[round(i * (len(levels) - 1) / (_POINTS - 1))] for i in range(_POINTS)]
    )
    root = output_root(seen.gradients)
    scored = root @ weight  # so that errors count by what they do to the output
    removal = (
        remove_heads(scored, moments, group, points) if kind == ATTENTION else remove_neurons(scored, moments, points)
    )
    made = _Sublayer(weight, group, units, levels, removal)
    for count in points:
        difference = torch.linalg.solve_triangular(root, scored - removal.weights[count], upper=True)
        made.losses[count] = seen.change(difference)
    made.ranks = rank_agreement(seen, linear.weight.detach(), group)
    removal.weights.clear()
    return made


# ---- bottom up ------------------------------------------------------------------------------------------------------


def _apply(
    model: nn.Module,
    encoder: Shaped,
    parts: _Parts,
    sublayers: dict[Site, _Sublayer],
    chosen: dict[Site, int],
    refitting: bool | Literal["scales"],
    tell: Progress,
) -> list[float]:
    """Takes the units out, from the first layer on. Relative errors that are left, sublayer by sublayer."""
    original = shaped(copy.deepcopy(model))
    fit, check = (
        Followed(Stream(encoder, texts), Stream(original, texts))
        for texts in (parts.fit, parts.check.within(_CHECK_TOKENS))
    )
    layers, errors, drifted = len(encoder.layers), list[float](), False
    paths, norms = _paths(encoder), _norms(encoder)
    for place in range(layers):
        tell(layers + place, 2 * layers, f"layer {place}: what is left is refitted")
        for stream in (fit, check):
            stream.look_at(place, list(norms.values()))
        for kind, path in paths.items():
            sublayer = sublayers[place, kind]
            count = chosen.get((place, kind), sublayer.units)
            if count == sublayer.units and not (drifted and refitting is True):
                errors.append(0.0)
                continue
            sums, drift = fit.moments(place, path, norms[kind])
            kept = sublayer.removal.kept(sublayer.units, count)
            columns = (torch.tensor(kept)[:, None] * sublayer.group + torch.arange(sublayer.group)).flatten()
            done = refit(
                sublayer.weight, sums.moments(), columns, check.held_out(place, path, norms[kind]),
                means_only=refitting is False, scales=sublayer.group if refitting == "scales" else None,
                drift=drift if drifted else None,
            )  # fmt: skip
            if count < sublayer.units:
                _take_out(model, place, kind, kept)
            _set(encoder.layers[place].get_submodule(path), done.weight, done.bias)
            errors.append(done.error)
            drifted = True
        fit.advance(place)
        check.advance(place)
    return errors


def _norms(encoder: Shaped) -> dict[str, str]:
    """What is added up is what these norms take."""
    return {ATTENTION: encoder.family.layer.attention_norm, FFN: encoder.family.layer.output_norm}


def _take_out(model: nn.Module, place: int, kind: str, kept: list[int]) -> None:
    (keep_heads_ if kind == ATTENTION else keep_neurons_)(model, place, kept)


def _set(linear: Any, weight: Tensor, more: Tensor) -> None:
    """New values: parameters are replaced, so that the old ones are there should anything go wrong."""
    old = linear.weight
    linear.weight = nn.Parameter(weight.to(old), requires_grad=old.requires_grad)
    bias = torch.zeros(len(weight), dtype=torch.float64) if linear.bias is None else linear.bias.detach().double().cpu()
    linear.bias = nn.Parameter((bias + more).to(old), requires_grad=old.requires_grad)


@dataclass
class _Milliseconds:
    """What a forward takes, by the table and measured, of the model before and after."""

    table: Table
    load: Load
    predicted: float
    original: nn.Module
    batches: list[dict[str, Tensor]]

    @classmethod
    def before(cls, model: nn.Module, table: Table, load: Load, parts: _Parts) -> _Milliseconds:
        device = next(model.parameters()).device
        batches = [batch for _, batch in parts.look.first(64).batches(device)]
        return cls(table, load, table.total(plan_of(model).layers), copy.deepcopy(model), batches)

    def after(self, model: nn.Module) -> dict[str, Any]:
        """Fields of a report."""
        ms = measured_ms({"before": (self.original, self.load), "after": (model, self.load)}, self.batches)
        return {
            "predicted_ms": (self.predicted, self.table.total(plan_of(model).layers)),
            "measured_ms": (ms["before"], ms["after"]),
            "load": str(self.load),
        }
