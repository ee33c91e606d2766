"""Weights of an encoder's linears made zero, and the others made to make up for it: smaller files, no milliseconds.

Second-order pruning column by column (SparseGPT, Frantar and Alistarh, 2023; the step is Optimal Brain Surgeon's): with the
upper Cholesky factor U of the inverse of the inputs' damped covariance, a weight w of column j costs (w / U_jj)^2 once the
columns after it have made up for it, so the cheapest of each block go, and what a column loses moves on to those after it:
within a block at once, behind it as one product. Which two of four neighbours go is decided when their turn comes. The
covariance is taken around the mean: what is constant goes into the bias. Layer by layer, each on the inputs that the layers
before it give by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from qbert.compress.removal import RIDGES, Moments, Sums
from qbert.compress.report import Report, Size, report_of
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
from qbert.modules import FactoredLinear, products
from qbert.shapes import Shaped

Progress = Callable[[int, int, str], None]
Method = Literal["refit", "magnitude"]
TWO_OF_FOUR: Literal["2:4"] = "2:4"
Sparsity = float | Literal["2:4"]

LEAST, MOST = 0.2, 0.95  # fewer zeros make no file smaller, more leave nothing to make up for them
METHODS: tuple[Method, ...] = ("refit", "magnitude")
_GROUP, _OF_GROUP = 4, 2
_BLOCK = 128  # columns whose zeros are chosen together
_LEAST_TEXTS, _JUDGE_BY = 32, 512
_FIT_TOKENS, _CHECK_TOKENS = 8, 2048  # for each column, at most; by which errors are measured
_NO_KERNEL = "0 ms saved: no kernel here skips zeros; the file gets smaller once the model is quantized"


class LinearZeros(BaseModel):
    """What became of one linear.

    Attributes:
        layer, path: where it is.
        zeros: share of its weights that are zero.
        error: relative error of its outputs on held-out tokens.
        magnitude: the same where the smallest weights alone had been made zero.
        refitted: whether the others made up for it; False where held-out tokens were nearer without.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    path: str
    zeros: float
    error: float
    magnitude: float
    refitted: bool


class SparsifyReport(Report):
    """Attributes, beside `Report`'s:

    sparsity: what was asked for.
    rows: what became of each linear.
    """

    sparsity: Sparsity
    rows: list[LinearZeros]

    @property
    def zeros(self) -> float:
        """Mean share of zeros."""
        return sum(row.zeros for row in self.rows) / len(self.rows)

    def __str__(self) -> str:
        count, refitted = len(self.rows), sum(row.refitted for row in self.rows)
        error, alone = (
            100 * sum(each) / count for each in zip(*((row.error, row.magnitude) for row in self.rows), strict=True)
        )
        lines = [
            super().__str__(),
            f"  {100 * self.zeros:.0f}% zeros in {count} linears, {refitted} of them refitted",
            f"  mean relative error of their outputs on held-out tokens {error:.1f}%, by magnitude alone {alone:.1f}%",
        ]
        return "\n".join(lines)


@torch.inference_mode(False)
def sparsify_(
    model: nn.Module,
    texts: Sequence[str],
    *,
    sparsity: Sparsity,
    method: Method = "refit",
    tokenizer: Any = None,
    pooling: str = "mean",
    progress: Progress | None = None,
) -> SparsifyReport:
    """Makes weights of all linears of an encoder's layers zero, in place. No training. It saves bytes and no time.

    Args:
        model: float, with one encoder whose layers can be taken apart.
        texts: of the kind the model is used on, some hundreds. Half say what inputs are like, a quarter measures errors, a
            quarter is in the report.
        sparsity: ``"2:4"``, two of every four neighbours along the inputs; or the share of zeros, 0.2 ... 0.95.
        method: ``"refit"``, see this module, kept for each linear where held-out tokens are nearer with it; ``"magnitude"``
            makes the smallest weights zero and leaves the others.
        tokenizer: by default the one beside the model's files.
        pooling: of embeddings, ``"mean"`` or ``"cls"``.
        progress: called with (steps done, in all, what is done).

    Raises:
        QBertError: a sparsity or a method that there is not, too few texts or tokens, linears whose inputs are no multiple of
            four, a quantized model or one that cannot be taken apart. The model is left as it was.
    """
    start = time.perf_counter()
    require_pooling(pooling)
    encoder = float_encoder(model, "making weights zero", factored=True)
    sparsity = _checked(encoder, plain(sparsity), method)
    parts = _Parts.of(model, encoder, texts, tokenizer)
    before, original = Size.of(model), outputs_of(model, parts.held_out, pooling)
    with undone_on_error(model), evaluation_mode(model):
        run = _Run(encoder, sparsity, method, progress)
        run.through(parts)
        found = agreement(model, original, outputs_of(model, parts.held_out, pooling))
    note_reshaped(model)
    name = f"{sparsity} zeros" if sparsity == TWO_OF_FOUR else f"{100 * sparsity:g}% zeros"
    report = report_of(name, model, before, time.perf_counter() - start, found)
    report.notes.append(_NO_KERNEL)
    return SparsifyReport(**report.model_dump(), sparsity=sparsity, rows=run.rows)


def _checked(encoder: Shaped, sparsity: Any, method: Any) -> Sparsity:
    if method not in METHODS:
        raise QBertError(f"method is {method!r}; allowed: {', '.join(METHODS)}")
    number = isinstance(sparsity, float) and LEAST <= sparsity <= MOST
    if sparsity != TWO_OF_FOUR and not number:
        raise QBertError(f"sparsity is {sparsity!r}; allowed: '2:4', or {LEAST} ... {MOST}, the share of zeros")
    if sparsity == TWO_OF_FOUR:
        for place, layer in enumerate(encoder.layers):
            for path in _paths(encoder, layer):
                k = int(layer.get_submodule(path).in_features)  # type: ignore[arg-type]
                if k % _GROUP:
                    raise QBertError(f"{path} of layer {place} has {k} inputs; 2:4 needs a multiple of {_GROUP}")
    return "2:4" if sparsity == TWO_OF_FOUR else float(sparsity)


def _stages(encoder: Shaped, layer: nn.Module) -> list[list[str]]:
    """Paths of a layer's linears in the order in which a token meets them; those that read the same input together."""
    paths = encoder.family.layer
    stages = [list(paths.qkv)]
    for path in (paths.attention_output, paths.ffn_in, paths.ffn_out):
        inside = len(products(layer.get_submodule(path))) > 1
        stages += [[f"{path}.first"], [f"{path}.second"]] if inside else [[path]]
    return stages


def _paths(encoder: Shaped, layer: nn.Module) -> list[str]:
    return [path for stage in _stages(encoder, layer) for path in stage]


@dataclass(frozen=True)
class _Parts:
    """The texts: half to fit by, a quarter to measure errors by, a quarter to report."""

    fit: Texts
    check: Texts
    held_out: Texts

    @classmethod
    def of(cls, model: nn.Module, encoder: Shaped, texts: Sequence[str], tokenizer: Any) -> _Parts:
        given = Texts.of(model, texts, tokenizer)
        require(given, _LEAST_TEXTS, "making weights zero")
        fit, rest = given.halves()
        check, held_out = rest.halves()
        layers = encoder.layers
        widest = max(int(layer.get_submodule(path).in_features) for layer in layers for path in _paths(encoder, layer))  # type: ignore[arg-type]
        if fit.tokens < widest:
            raise QBertError(
                f"half of the texts are {fit.tokens} tokens to refit {widest} columns by; allowed: as many or more (five times "
                f"as many are better)"
            )
        return cls(fit.within(_FIT_TOKENS * widest), check.within(_CHECK_TOKENS), held_out.first(_JUDGE_BY))


@dataclass
class _Run:
    """An encoder whose linears get zeros, from the first layer on."""

    encoder: Shaped
    sparsity: Sparsity
    method: Method
    progress: Progress | None
    rows: list[LinearZeros] = field(default_factory=list)

    def through(self, parts: _Parts) -> None:
        fit, check = Stream(self.encoder, parts.fit), Stream(self.encoder, parts.check)
        layers = len(self.encoder.layers)
        for place, layer in enumerate(self.encoder.layers):
            for stage in _stages(self.encoder, layer):
                if self.progress:
                    self.progress(place, layers, f"layer {place}: zeros in {stage[-1]}")
                self._stage(place, layer, stage, fit, check)
            fit.advance(place)
            check.advance(place)

    def _stage(self, place: int, layer: nn.Module, stage: list[str], fit: Stream, check: Stream) -> None:
        """Linears that read the same input."""
        first: Any = layer.get_submodule(stage[0])
        sums, held_out = Sums.empty(first.in_features), list[Tensor]()
        fit.watch(place, {stage[0]: sums.add})
        check.watch(place, {stage[0]: held_out.append})
        moments, tokens = sums.moments(), torch.cat(held_out).double().cpu()
        root = inverse_root(moments) if self.method == "refit" else None
        for path in stage:
            linear: Any = layer.get_submodule(path)
            self.rows.append(self._linear(place, path, linear, moments, tokens, root))

    def _linear(
        self, place: int, path: str, linear: Any, moments: Moments, tokens: Tensor, root: Tensor | None
    ) -> LinearZeros:
        weight = linear.weight.detach().double().cpu()
        smallest = by_magnitude(weight, self.sparsity)
        chosen, plain_error = smallest, _error(weight, smallest, torch.zeros(len(moments.mean)), tokens)
        error, more = plain_error, None
        if root is not None:
            refitted = by_refit(weight, root, self.sparsity)
            refit_error = _error(weight, refitted, moments.mean, tokens)
            if refit_error < plain_error:
                chosen, error, more = refitted, refit_error, (weight - refitted) @ moments.mean
        parent = self.encoder.layers[place].get_submodule(path.rpartition(".")[0])
        if isinstance(parent, FactoredLinear) and linear is parent.first and more is not None:
            # The first of two has no bias: what is constant there is constant behind the second, which has one.
            second: Any = parent.second
            _set(linear, chosen, None)
            held = second.weight.detach().double().cpu()
            _set(second, held, held @ more)
        else:
            _set(linear, chosen, more)
        zeros = float((linear.weight == 0).float().mean())
        return LinearZeros(
            layer=place, path=path, zeros=zeros, error=error, magnitude=plain_error, refitted=more is not None
        )


def _error(weight: Tensor, other: Tensor, folded: Tensor, tokens: Tensor) -> float:
    """Relative error of outputs (root of the mean square, around their mean), where the bias makes up for inputs `folded`."""
    missing = ((tokens - folded) @ (weight - other).T).pow(2).sum()
    spread = ((tokens - tokens.mean(0)) @ weight.T).pow(2).sum()
    return float((missing / spread.clamp(min=1e-30)).sqrt())


def _set(linear: Any, weight: Tensor, more: Tensor | None) -> None:
    """New values, zeros exact: parameters are replaced, so that the old ones are there should anything go wrong."""
    old = linear.weight
    linear.weight = nn.Parameter(weight.to(old), requires_grad=old.requires_grad)
    if more is not None:
        bias = torch.zeros_like(more) if linear.bias is None else linear.bias.detach().double().cpu()
        linear.bias = nn.Parameter((bias + more).to(old), requires_grad=old.requires_grad)


# ---- which weights, and what the others become ----------------------------------------------------------------------


def by_magnitude(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """(n, k) with the smallest weights zero: of every four neighbours two, or a share of all."""
    return weight.masked_fill(_cheapest(weight.abs(), sparsity), 0.0)


def by_refit(weight: Tensor, root: Tensor, sparsity: Sparsity, *, block: int = _BLOCK) -> Tensor:
    """(n, k) with the cheapest weights zero and the others refitted, see this module.

    Args:
        weight: (n, k) float64.
        root: (k, k), from `inverse_root`.
        block: columns whose zeros are chosen together, a multiple of four.
    """
    done = weight.clone()
    for start in range(0, weight.shape[1], block):
        part = slice(start, min(start + block, weight.shape[1]))
        columns, within = done[:, part], root[part, part]
        errors = _through_block(columns, within, sparsity)
        done[:, part.stop :] -= errors @ root[part, part.stop :]
    return done


def _through_block(columns: Tensor, root: Tensor, sparsity: Sparsity) -> Tensor:
    """Makes a block's zeros, in place, column by column. (n, block) what each column lost, over its pivot."""
    pivots = root.diagonal()
    errors = torch.zeros_like(columns)
    gone = torch.zeros_like(columns, dtype=torch.bool)
    if sparsity != TWO_OF_FOUR:
        gone = _cheapest((columns / pivots).abs(), sparsity)
    for index in range(columns.shape[1]):
        if sparsity == TWO_OF_FOUR and index % _GROUP == 0:
            four = slice(index, index + _GROUP)
            gone[:, four] = _cheapest((columns[:, four] / pivots[four]).abs(), sparsity)
        lost = columns[:, index].masked_fill(~gone[:, index], 0.0)
        errors[:, index] = lost / pivots[index]
        columns[:, index + 1 :] -= errors[:, index, None] * root[index, index + 1 :]
        columns[:, index] -= lost  # exactly zero where it is gone
    return errors


def _cheapest(costs: Tensor, sparsity: Sparsity) -> Tensor:
    """Bool (n, k) of those that go."""
    if sparsity == TWO_OF_FOUR:
        fours = costs.unflatten(1, (-1, _GROUP))
        gone = torch.zeros_like(fours, dtype=torch.bool)
        gone.scatter_(2, fours.topk(_OF_GROUP, dim=2, largest=False).indices, True)
        return gone.flatten(1)
    count = round(float(sparsity) * costs.numel())
    order = costs.flatten().argsort(stable=True)
    gone = torch.zeros(costs.numel(), dtype=torch.bool)
    gone[order[:count]] = True
    return gone.view(costs.shape)


def inverse_root(moments: Moments) -> Tensor:
    """(k, k) upper triangular U with U' U the inverse of the inputs' damped covariance.

    Raises:
        QBertError: inputs that are NaN or infinite.
    """
    lower, failed = torch.linalg.cholesky_ex(moments.damped(RIDGES[0]))
    if bool(failed):
        raise QBertError("the inputs' covariance is not positive definite; are there NaN or infinite activations?")
    inverse: Tensor = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True)
