"""Layers taken out of an encoder: which, is measured on texts; what goes missing is made up for in the norm before the gap."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qbert.compress.report import Report, Size, report_of
from qbert.compress.texts import (
    Texts,
    agreement,
    float_encoder,
    outputs_of,
    plain,
    require,
    require_pooling,
    undone_on_error,
)
from qbert.convert import note_reshaped
from qbert.errors import QBertError
from qbert.modes import evaluation_mode
from qbert.shapes import Shaped, keep_layers_

_EXHAUSTIVE = (
    64  # as many subsets are all tried; of more, the layer that is missed least goes first, one after the other
)
_CHOOSE_BY, _JUDGE_BY = 128, 512  # texts, at most
_FIT_TOKENS = 8192  # two numbers a channel need no more
_LEAST_TEXTS = 16
_GAINS = (0.5, 2.0)  # a channel that needs more than this is not made up for by a gain
Progress = Callable[[int, int, str], None]


@torch.inference_mode(False)
def drop_layers_(
    model: nn.Module,
    texts: Sequence[str] | None = None,
    *,
    keep: int | Sequence[int],
    tokenizer: object = None,
    compensate: bool = True,
    pooling: str = "mean",
    progress: Progress | None = None,
) -> Report:
    """Takes layers out of an encoder, in place. No training, no labels.

    Which layers: all subsets are measured where there are 64 or fewer, else the layer that is missed least is taken out, then
    the next (greedy). What counts is the cosine of the embeddings to those before, or a classifier's KL divergence, on half of
    the texts. Compensation: a gain and an offset for each channel, which restore its mean and spread after the gap, merged into
    the LayerNorm before it (ReplaceMe's idea, Shopkhoev et al., 2025, at no cost); kept only where a quarter of the texts that
    it was not fitted on is nearer with it. The last quarter is in the report and nothing was chosen by it.

    Args:
        model: float, with one encoder whose layers can be taken out.
        texts: of the kind the model is used on; at least 16 where layers are chosen or compensated.
        keep: how many layers stay, or which, by their places now.
        tokenizer: by default the one beside the model's files.
        compensate: needs texts.
        pooling: of embeddings, ``"mean"`` or ``"cls"``.
        progress: called with (subsets measured, in all, what is measured).

    Raises:
        QBertError: `keep` out of range or without texts to choose by, too few texts, a quantized model or one that cannot be
            taken apart. The model is left as it was.
    """
    start = time.perf_counter()
    require_pooling(pooling)
    keep = plain(keep)
    encoder = float_encoder(model, "dropping layers", factored=True)
    kept = _checked(keep, len(encoder.layers))
    if texts is None and (kept is None or compensate):
        raise QBertError(
            "no texts; needed to choose layers or to compensate. Allowed: keep=[...] with compensate=False"
        )
    given = None if texts is None else Texts.of(model, texts, tokenizer)
    if given is not None:
        require(given, _LEAST_TEXTS, "dropping layers")
    before = Size.of(model)
    with undone_on_error(model), evaluation_mode(model):
        found: Tensor | None = None
        notes: list[str] = []
        if given is None:
            assert kept is not None
            keep_layers_(model, kept)
        else:
            judge = _Judge(model, encoder, given, pooling)
            if kept is None:
                assert isinstance(keep, int)
                kept = _chosen(judge, keep, progress)
            found, notes = _dropped(judge, kept, compensate)
    note_reshaped(model)
    report = report_of("drop layers", model, before, time.perf_counter() - start, found)
    report.notes += notes
    return report


def _checked(keep: int | Sequence[int], layers: int) -> list[int] | None:
    """Which layers stay, None where only how many is said."""
    if (
        isinstance(keep, bool)
        or not isinstance(keep, int | Iterable)
        or (isinstance(keep, int) and not 1 <= keep <= layers)
    ):
        raise QBertError(f"keep is {keep!r}; allowed: 1 ... {layers}, or a list of layers")
    if isinstance(keep, int):
        return list(range(layers)) if keep == layers else None
    wanted = [plain(each) for each in keep]
    if (
        not wanted
        or not all(type(each) is int and 0 <= each < layers for each in wanted)
        or wanted != sorted(set(wanted))
    ):
        raise QBertError(f"keep is {wanted}; allowed: ascending indexes of layers, 0 ... {layers - 1}, at least one")
    return wanted


class _Judge:
    """What a model with some of its layers makes of texts, beside what it made of them with all."""

    def __init__(self, model: nn.Module, encoder: Shaped, texts: Texts, pooling: str) -> None:
        self.model, self.encoder, self.pooling = model, encoder, pooling
        fit, rest = texts.halves()
        self.fit = fit.within(_FIT_TOKENS)
        self.check, self.held_out = (each.first(_JUDGE_BY) for each in rest.halves())
        self._choose = self.fit.first(_CHOOSE_BY)
        self._before = outputs_of(model, self._choose, pooling)
        self._others = {id(each): outputs_of(model, each, pooling) for each in (self.check, self.held_out)}

    def score(self, kept: Sequence[int]) -> float:
        """Mean agreement of the layers `kept` with all of them, on the texts to choose by."""
        with _only(self.encoder, kept):
            after = outputs_of(self.model, self._choose, self.pooling)
        return float(agreement(self.model, self._before, after).mean())

    def judged(self, texts: Texts) -> Tensor:
        """(texts,) agreement of the model as it is now, on the texts to check by or on the held-out ones."""
        return agreement(self.model, self._others[id(texts)], outputs_of(self.model, texts, self.pooling))


@contextmanager
def _only(encoder: Shaped, kept: Sequence[int]) -> Iterator[None]:
    """Inside, the encoder has only those of its layers."""
    modules = encoder.layers._modules
    everything = dict(modules)
    try:
        modules.clear()
        modules.update({str(place): everything[str(index)] for place, index in enumerate(kept)})
        yield
    finally:
        modules.clear()
        modules.update(everything)


def _chosen(judge: _Judge, count: int, progress: Progress | None) -> list[int]:
    layers = len(judge.encoder.layers)
    if math.comb(layers, count) <= _EXHAUSTIVE:
        subsets = [list(each) for each in itertools.combinations(range(layers), count)]
        return _best(judge, subsets, progress, 0, len(subsets))
    kept, done = list(range(layers)), 0
    total = sum(range(count + 1, layers + 1))
    while len(kept) > count:
        subsets = [kept[:index] + kept[index + 1 :] for index in range(len(kept))]
        kept = _best(judge, subsets, progress, done, total)
        done += len(subsets)
    return kept


def _best(judge: _Judge, subsets: list[list[int]], progress: Progress | None, done: int, total: int) -> list[int]:
    scores = []
    for index, subset in enumerate(subsets, done):
        if progress:
            progress(index, total, f"layers {subset}")
        scores.append(judge.score(subset))
    return subsets[max(range(len(subsets)), key=scores.__getitem__)]


# ---- what goes missing ----------------------------------------------------------------------------------------------


def _dropped(judge: _Judge, kept: list[int], compensate: bool) -> tuple[Tensor, list[str]]:
    """Takes the other layers out, with compensation where it helps. Agreement on the held-out texts, and notes."""
    states = _states(judge, judge.fit) if compensate else []
    keep_layers_(judge.model, kept)
    note = _compensated(judge, kept, states) if compensate else "gaps are not compensated for"
    return judge.judged(judge.held_out), [note]


def _compensated(judge: _Judge, kept: list[int], states: list[Tensor]) -> str:
    """Compensation, undone where it does not help on texts that it was not fitted on. What became of it."""
    plain = float(judge.judged(judge.check).mean())
    norms = _merged(judge, kept, states)
    if not norms:
        return "no gap that a norm before it makes up for"
    found = float(judge.judged(judge.check).mean())
    if found > plain:
        return f"gaps compensated for in the norms before them: agreement {found:.4f}, without {plain:.4f}"
    with torch.no_grad():
        for norm, weight, bias in norms:
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
    return f"compensation left out: agreement {found:.4f} with it, {plain:.4f} without"


@torch.no_grad()
def _states(judge: _Judge, texts: Texts) -> list[Tensor]:
    """The residual stream (tokens, h) before the first layer and after each, padding left out."""
    found: list[list[Tensor]] = [[] for _ in range(len(judge.encoder.layers) + 1)]
    base = judge.encoder.base
    names = judge.encoder.family.arguments
    for _, batch in texts.batches(next(base.parameters()).device):
        taken = {name: each for name, each in batch.items() if name in names}
        output = base(**taken, output_hidden_states=True, return_dict=True)
        mask = batch["attention_mask"].bool()
        for held, state in zip(found, output.hidden_states, strict=True):
            held.append(state[mask])
    return [torch.cat(each) for each in found]


def _merged(judge: _Judge, kept: list[int], states: list[Tensor]) -> list[tuple[nn.LayerNorm, Tensor, Tensor]]:
    """Merges a gain and an offset into the norm before each gap. Returns the norms with what they held before."""
    encoder, done = judge.encoder, []
    ends = [*kept[1:], len(states) - 1]  # what a kept layer's output should be: the input of the next one kept
    starts = [-1, *kept]
    for place, (start, end) in enumerate(zip(starts, [kept[0], *ends], strict=True)):
        if end == start + 1:
            continue
        now = _states(judge, judge.fit)[place]  # earlier gaps have changed it
        gain, offset = _moments(now, states[end])
        path = encoder.family.layer.output_norm
        norm = encoder.base.get_submodule(encoder.family.embeddings.norm) if place == 0 else None
        norm = norm or encoder.layers[place - 1].get_submodule(path)
        if not isinstance(norm, nn.LayerNorm) or norm.bias is None or len(norm.bias) != len(gain):
            continue  # where embeddings are narrower than the layers a linear stands between (ELECTRA)
        done.append((norm, norm.weight.detach().clone(), norm.bias.detach().clone()))
        with torch.no_grad():
            norm.weight.mul_(gain.to(norm.weight))
            norm.bias.mul_(gain.to(norm.bias)).add_(offset.to(norm.bias))
    return done


def _moments(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(h,) gain and offset that give each channel of x the mean and the spread of y's, (tokens, h) each.

    Not the line of least squares: where x says little about y that one shrinks the channel, and the layers after it, which
    are made for the spread of y, lose more than they win.
    """
    x, y = x.double(), y.double()
    gain = (y.std(0) / x.std(0).clamp(min=1e-12)).clamp(*_GAINS)
    return gain, y.mean(0) - gain * x.mean(0)
