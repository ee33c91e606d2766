"""Linears of low rank: two thin products in the place of one, where that pays here and keeps what the linear gives.

Weights of encoders are not of low rank, what they make of real inputs is nearer to it (DRONE, Chen et al., 2021). With the
inputs' covariance C = L L' and the gradients' R' R (how much an output channel matters to what the model says; FWSVD, Hsu et
al., 2022, has a diagonal of it), the best W' of rank r for E |R (W - W') x|^2 is the r largest singular triples of R W L,
undone: W' = R^-1 U_r S_r V_r' L^-1. Both parts get the root of S_r, and between them stands a rotation, so that all thin
channels are alike: one scale a token is to cover them, and one a row the weights. What is constant goes into the bias.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from qbert.compress.latency import BLOCK, Load, measured_ms, require_fits
from qbert.compress.products import Shape, products_ms
from qbert.compress.removal import RIDGES, Moments, Sums
from qbert.compress.report import Report, Size, report_of
from qbert.compress.sensitivity import Seen, Site, look, output_root
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
from qbert.shapes import FACTORABLE, Factorable, Shaped, factorize_linear_, linear_path

Progress = Callable[[int, int, str], None]
Rank = int | Literal["auto"]

_LEAST_TEXTS, _JUDGE_BY = 32, 512
_LOOK_TOKENS, _CHECK_TOKENS = 2048, 2048  # whose gradients are looked at; by which errors are measured
_FIT_TOKENS = 8  # for each column, at most
_PAYS = 0.97  # of the time of one product, at most: less is within what two measurements differ by


class LinearRank(BaseModel):
    """What became of one linear.

    Attributes:
        layer, name: which: its place, and "attention_output", "ffn_in" or "ffn_out".
        shape: (n, k).
        rank: looked at: the least that keeps the energy asked for, or the one given; None where none below the sides does.
        energy: share of the output's energy that it keeps, weighted by what the output does to the embedding.
        error: relative error of the linear's outputs on held-out tokens; None where it was not factorized.
        ms: of one product, and of the two; None where there is no rank.
        break_even: the largest rank whose two products are faster here, and the energy that it keeps; None where none is.
        kept: whether it is two products now.
        why: in words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    name: Factorable
    shape: tuple[int, int]
    rank: int | None
    energy: float | None
    error: float | None
    ms: tuple[float, float] | None
    break_even: tuple[int, float] | None
    kept: bool
    why: str

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        n, k = self.shape
        even = "" if self.break_even is None else f"{self.break_even[0]} ({100 * self.break_even[1]:.1f}%)"
        energy = "" if self.energy is None else f"{100 * self.energy:.1f}%"
        error = "" if self.error is None else f"{100 * self.error:.1f}%"
        ms = ("", "") if self.ms is None else tuple(f"{each:.2f}" for each in self.ms)
        rank = "" if self.rank is None else str(self.rank)
        return str(self.layer), self.name, f"{n}x{k}", rank, energy, *ms, even, error, self.why


HEADER = ("layer", "linear", "shape", "rank", "energy", "ms one", "ms two", "pays up to", "error", "")


class FactorizeReport(Report):
    """Attributes, beside `Report`'s:

    rows: what became of each linear.
    measured_ms: of a forward before and after, as it will run, in turns; None where nothing was factorized.
    load: of which forward.
    """

    rows: list[LinearRank]
    measured_ms: tuple[float, float] | None
    load: str

    @property
    def kept(self) -> int:
        """How many linears are two products now."""
        return sum(row.kept for row in self.rows)

    def table(self) -> str:
        """A line for each linear."""
        rows = [HEADER, *(row.cells() for row in self.rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def __str__(self) -> str:
        lines = [super().__str__(), f"  {self.kept} of {len(self.rows)} linears are two products ({self.load})"]
        if self.measured_ms is not None:
            before, after = self.measured_ms
            lines.append(f"  measured {before:.2f} -> {after:.2f} ms, x{before / after:.2f}")
        return "\n".join((*lines, *(f"  {line}" for line in self.table().splitlines())))


@torch.inference_mode(False)  # gradients are looked at, whatever mode the caller is in
def factorize_(
    model: nn.Module,
    texts: Sequence[str],
    *,
    rank: Rank = "auto",
    energy: float = 0.998,
    linears: Sequence[Factorable] = FACTORABLE,
    fisher: bool = True,
    labels: Sequence[int] | None = None,
    tokenizer: Any = None,
    scheme: str | None = "w8a8",
    batch: int = 8,
    seq: int = 128,
    pooling: str = "mean",
    seed: int = 0,
    progress: Progress | None = None,
) -> FactorizeReport:
    """Makes linears of an encoder two thin ones each, in place, from the first layer on. No training, no labels.

    Args:
        model: float, with one encoder whose layers can be taken apart.
        texts: of the kind the model is used on, some hundreds. Half say what inputs are like, a quarter how outputs matter, and
            a quarter is in the report.
        rank: ``"auto"`` takes for each linear the least multiple of 64 that keeps `energy`, and leaves the linear whole where
            its two products are not faster here, by measured milliseconds. A number is taken whatever it costs.
        energy: share of the outputs' energy that is kept, 0 ... 1.
        linears: which of a layer's. Queries, keys and values are one product in a fused encoder and stay whole.
        fisher: output channels count by what they do to the embedding, or to the classes.
        labels: of a classifier, see `prune_`.
        tokenizer: by default the one beside the model's files.
        scheme: what the model will be quantized to, as `quantize_` takes it; None if it stays float.
        batch, seq: tokens of the products that are timed.
        pooling: of embeddings, ``"mean"`` or ``"cls"``.
        seed: of the projections whose gradients are looked at, and of rotations.
        progress: called with (steps done, in all, what is done).

    Raises:
        QBertError: a rank or an energy out of range, too few texts or tokens, a quantized model, one that is factorized already
            or one that cannot be taken apart. The model is left as it was.
    """
    start = time.perf_counter()
    require_pooling(pooling)
    encoder = float_encoder(model, "making linears of low rank")
    names = _checked(encoder, plain(rank), plain(energy), linears)
    load = Load(batch, seq, scheme)
    require_fits(encoder.base, load)
    parts = _Parts.of(model, encoder, texts, labels, names, tokenizer)
    before, original = Size.of(model), outputs_of(model, parts.held_out, pooling)
    with undone_on_error(model), evaluation_mode(model):
        whole = copy.deepcopy(model)
        seen = _seen(model, encoder, parts, names, pooling, seed) if fisher else {}
        run = _Run(model, encoder, load, plain(rank), energy, names, seen, seed, progress)
        run.through(parts)
        after = outputs_of(model, parts.held_out, pooling)
        found = agreement(model, original, after)
        timed = _timed(whole, model, load, parts) if any(row.kept for row in run.rows) else None
    note_reshaped(model)
    report = report_of("low rank", model, before, time.perf_counter() - start, found)
    return FactorizeReport(**report.model_dump(), rows=run.rows, measured_ms=timed, load=str(load))


def _checked(encoder: Shaped, rank: Any, energy: Any, linears: Sequence[Factorable]) -> list[Factorable]:
    if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0.0 < energy < 1.0:
        raise QBertError(f"energy is {energy!r}; allowed: between 0 and 1, the share that is kept")
    names = [linears] if isinstance(linears, str) else list(linears)
    if not names or any(name not in FACTORABLE for name in names):
        raise QBertError(f"linears is {list(names)!r:.80}; allowed: some of {', '.join(FACTORABLE)}")
    names = [name for name in FACTORABLE if name in names]
    least = min(min(_shape(encoder, place, name)) for place in range(len(encoder.layers)) for name in names)
    number = isinstance(rank, int) and not isinstance(rank, bool)
    if rank != "auto" and not (number and 1 <= rank < least):
        raise QBertError(f"rank is {rank!r}; allowed: 'auto', or 1 ... {least - 1}, below the sides of these linears")
    return names


def _shape(encoder: Shaped, place: int, name: Factorable) -> Shape:
    linear: Any = encoder.layers[place].get_submodule(linear_path(encoder, name))
    return Shape(linear.out_features, linear.in_features)


@dataclass(frozen=True)
class _Parts:
    """The texts: half to fit by, a quarter to look at and to measure errors by, a quarter to report."""

    fit: Texts
    check: Texts
    held_out: Texts
    look: Texts
    labels: list[int] | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        encoder: Shaped,
        texts: Sequence[str],
        labels: Sequence[int] | None,
        names: Sequence[Factorable],
        tokenizer: Any,
    ) -> _Parts:
        labels = None if labels is None else [plain(each) for each in plain(labels)]
        given = Texts.of(model, texts, tokenizer)
        require(given, _LEAST_TEXTS, "making linears of low rank")
        if labels is not None and len(labels) != len(given):
            raise QBertError(f"{len(labels)} labels for {len(given)} texts; allowed: one for each")
        fit, rest = given.halves()
        check, held_out = rest.halves()
        widest = max(_shape(encoder, place, name).k for place in range(len(encoder.layers)) for name in names)
        if fit.tokens < widest:
            raise QBertError(
                f"half of the texts are {fit.tokens} tokens to know {widest} inputs by; allowed: as many or more (five times "
                f"as many are better)"
            )
        looked = check.within(_LOOK_TOKENS)
        of_look = None if labels is None else labels[1::4][: len(looked)]
        return cls(
            fit.within(_FIT_TOKENS * widest), check.within(_CHECK_TOKENS), held_out.first(_JUDGE_BY), looked, of_look
        )


def _seen(
    model: nn.Module, encoder: Shaped, parts: _Parts, names: Sequence[Factorable], pooling: str, seed: int
) -> dict[Site, Seen]:
    paths: dict[str, str] = {name: linear_path(encoder, name) for name in names}
    return look(model, encoder, parts.look, parts.labels, pooling, seed, paths)


def _timed(before: nn.Module, after: nn.Module, load: Load, parts: _Parts) -> tuple[float, float]:
    device = next(after.parameters()).device
    batches = [batch for _, batch in parts.look.first(64).batches(device)]
    ms = measured_ms({"before": (before, load), "after": (after, load)}, batches)
    return ms["before"], ms["after"]


@dataclass
class _Run:
    """An encoder whose linears become two each, from the first layer on."""

    model: nn.Module
    encoder: Shaped
    load: Load
    rank: Rank
    energy: float
    names: list[Factorable]
    seen: dict[Site, Seen]
    seed: int
    progress: Progress | None
    rows: list[LinearRank] = field(default_factory=list)
    _times: dict[tuple[Shape, bool], tuple[float, dict[int, float]]] = field(default_factory=dict)

    def through(self, parts: _Parts) -> None:
        """Looks at all linears in order; each layer's inputs are those that the layers before it give by then."""
        fit, check = Stream(self.encoder, parts.fit), Stream(self.encoder, parts.check)
        layers = len(self.encoder.layers)
        for place in range(layers):
            for name in self.names:
                if self.progress:
                    self.progress(place, layers, f"layer {place}: rank of {name}")
                self.rows.append(self._linear(place, name, fit, check))
            fit.advance(place)
            check.advance(place)

    def _linear(self, place: int, name: Factorable, fit: Stream, check: Stream) -> LinearRank:
        path, shape = linear_path(self.encoder, name), _shape(self.encoder, place, name)
        sums, held_out = Sums.empty(shape.k), list[Tensor]()
        fit.watch(place, {path: sums.add})
        check.watch(place, {path: held_out.append})
        linear: Any = self.encoder.layers[place].get_submodule(path)
        weight, moments = linear.weight.detach().double().cpu(), sums.moments()
        seen = self.seen.get((place, name))
        spectrum = Spectrum.of(weight, moments, None if seen is None else output_root(seen.gradients))
        whole, thin = self._ms(shape, name)
        wanted = spectrum.rank(self.energy) if self.rank == "auto" else self.rank
        faster = [rank for rank in thin if thin[rank] <= _PAYS * whole]
        pays = (faster[-1], spectrum.energy(faster[-1])) if faster else None
        said: dict[str, Any] = {"layer": place, "name": name, "shape": tuple(shape), "break_even": pays}
        if wanted is None or wanted >= min(shape):
            why = f"refused: no rank below {min(shape)} keeps {100 * self.energy:g}%"
            return LinearRank(**said, rank=None, energy=None, error=None, ms=None, kept=False, why=why)
        if wanted not in thin:
            whole, thin = products_ms(shape, [wanted], self.load, linear.weight.device, self._activation(name))
        said |= {"rank": wanted, "energy": spectrum.energy(wanted), "ms": (whole, thin[wanted])}
        slower = thin[wanted] > _PAYS * whole or not shape.saves(wanted)
        if slower and self.rank == "auto":
            return LinearRank(**said, error=None, kept=False, why="refused: two products are not faster here")
        factors = spectrum.factors(wanted, self.seed)
        difference = weight - factors.product
        factorize_linear_(self.model, place, name, factors.first, factors.second)
        _fold(self.encoder.layers[place].get_submodule(path), difference @ moments.mean)
        error = _error(difference, weight, moments, torch.cat(held_out).cpu())
        return LinearRank(**said, error=error, kept=True, why="kept, though not faster here" if slower else "kept")

    def _ms(self, shape: Shape, name: Factorable) -> tuple[float, dict[int, float]]:
        key = shape, name == "ffn_in"
        if key not in self._times:
            device, ranks = next(self.model.parameters()).device, shape.ranks
            self._times[key] = products_ms(shape, ranks, self.load, device, self._activation(name))
        return self._times[key]

    def _activation(self, name: Factorable) -> str | None:
        if name != "ffn_in":
            return None
        return str(self.encoder.family.setting(self.encoder.base.config, "activation"))


def _fold(factored: Any, more: Tensor) -> None:
    """Something more into the bias, which is made where there is none; a new parameter, so that the old one is as it was."""
    second, like = factored.second, factored.second.weight
    bias = torch.zeros_like(more) if second.bias is None else second.bias.detach().double().cpu()
    second.bias = nn.Parameter((bias + more).to(like), requires_grad=like.requires_grad)


def _error(difference: Tensor, weight: Tensor, moments: Moments, held_out: Tensor) -> float:
    """Relative error of outputs (root of the mean square), what is constant left out."""
    centred = held_out.double() - moments.mean
    missing, spread = ((centred @ each.T).pow(2).sum() for each in (difference, weight))
    return float((missing / spread.clamp(min=1e-30)).sqrt())


# ---- the best of each rank ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """Both parts of a linear: first (rank, k), second (n, rank), float64."""

    first: Tensor
    second: Tensor

    @property
    def product(self) -> Tensor:
        """(n, k)."""
        return self.second @ self.first


@dataclass(frozen=True)
class Spectrum:
    """The singular triples of R W L, see this module.

    Attributes:
        left: (n, m), the left vectors with R undone.
        values: (m,) descending.
        right: (m, k), the right vectors with L undone.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, weight: Tensor, moments: Moments, root: Tensor | None = None) -> Spectrum:
        """Of a weight (n, k) float64, its inputs, and R (n, n) upper triangular; the identity where there is none.

        Raises:
            QBertError: inputs that are NaN or infinite.
        """
        lower, failed = torch.linalg.cholesky_ex(moments.damped(RIDGES[0]))
        if bool(failed):
            raise QBertError("the inputs' covariance is not positive definite; are there NaN or infinite activations?")
        scored = (weight if root is None else root @ weight) @ lower
        u, values, vt = torch.linalg.svd(scored, full_matrices=False)
        left = u if root is None else torch.linalg.solve_triangular(root, u, upper=True)
        right = torch.linalg.solve_triangular(lower, vt, upper=False, left=False)
        return cls(left, values, right)

    def energy(self, rank: int) -> float:
        """Share of the squared singular values that the first `rank` have."""
        squares = self.values.square()
        return float(squares[:rank].sum() / squares.sum().clamp(min=1e-300))

    def rank(self, energy: float) -> int | None:
        """The least multiple of `BLOCK` that keeps so much; None where the linear has no more than that many."""
        ranks = range(BLOCK, len(self.values), BLOCK)
        return next((rank for rank in ranks if self.energy(rank) >= energy), None)

    def factors(self, rank: int, seed: int = 0, *, rotate: bool = True) -> Factors:
        """The best two of that rank.

        Args:
            rotate: make thin channels alike; otherwise they are in the order of what they carry, the first hundreds of times
                the last.
        """
        root = self.values[:rank].sqrt()
        first, second = root[:, None] * self.right[:rank], self.left[:, :rank] * root
        if rotate:
            generator = torch.Generator().manual_seed(seed)
            turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
            first, second = turn @ first, second @ turn.T
        return Factors(first, second)
