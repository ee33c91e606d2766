"""The recipe of a goal, searched: as fast or as small as possible for so many points, each step kept only if it pays.

Each candidate is a whole model: built, calibrated, quantized, fused, timed in turns here, and scored on labelled texts that no
method has seen. Climbing is greedy: of the next rungs of all ladders (`ladders`) the one that saves most for what it loses is
kept, the others are tried again after it; a rung that loses too much is halved; one that saves less than 2% is refused. The
test texts score what was found, once, and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from qbert.calibrate import tokenizer_beside
from qbert.compress.judge import Parts
from qbert.compress.ladders import GOALS, GROUPS, LADDERS, USUAL, Asked, Goal, in_words
from qbert.compress.recipe import Compression
from qbert.compress.search_report import Given, SearchReport
from qbert.compress.steps import Progress
from qbert.compress.texts import float_encoder, plain, require_pooling
from qbert.compress.workshop import Fields, Tried, Workshop, gain, objection
from qbert.errors import QBertError
from qbert.shapes import ShapePlan

_NOISE = 0.1  # points: a step that loses less is as good as one that loses nothing


class BudgetNotMet(QBertError):
    """Nothing that was tried keeps the budget. Attribute `report`: all that was."""

    def __init__(self, message: str, report: SearchReport) -> None:
        self.report = report
        super().__init__(message)


class Searched(NamedTuple):
    """What was found, its tokenizer, and everything that was tried."""

    model: Any
    tokenizer: Any
    report: SearchReport


@torch.inference_mode(False)
def search(
    model: nn.Module,
    *,
    tasks: Sequence[Any] = (),
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
    goal: Goal = "latency",
    speedup: float | None = None,
    max_drop: float = 1.0,
    steps: Sequence[str] | None = None,
    quantize: Sequence[str] | None = None,
    batch: int = 8,
    seq: int = 128,
    pooling: str = "mean",
    seed: int = 0,
    best_effort: bool = False,
    progress: Progress | None = None,
) -> Searched:
    """Looks for the recipe that reaches a goal, and makes its model, a copy.

    The same seed gives the same texts and the same model for each recipe; which recipe is found also depends on what times
    are measured.

    Args:
        model: of transformers, float; left as it is.
        tasks: labelled texts, see `qbert.evaluate`: of the training texts of each two thirds are for the methods and the rest
            judges steps; its test texts score the result.
        texts: for the methods, in place of those. Without tasks they are all there is: one in four judges, by agreement.
        goal: ``"latency"`` or ``"size"``.
        speedup: times as fast as the float model on this machine; by default the fastest, or, for size, no matter.
        max_drop: points that may be lost on the texts that judge, on each task; of agreement 1 point is 0.01.
        steps: fields of `Compression` that may be used; by default all, but for latency not the vocabulary.
        quantize: schemes to try, in place of the usual ones.
        batch, seq: of the forward that is timed.
        best_effort: the best within `max_drop` in place of an error where `speedup` is not reached.
        progress: called with (models tried, 0, what is tried).

    Raises:
        BudgetNotMet: nothing within `max_drop` is as fast as asked for, or nothing pays.
        QBertError: a goal, step or budget that there is not, too few texts, or a model that is quantized or cannot be taken
            apart.
    """
    _check(goal, speedup, max_drop, steps)
    require_pooling(pooling)
    encoder = float_encoder(model, "searching")
    tokenizer = tokenizer_beside(encoder.base) if tokenizer is None else tokenizer
    parts = Parts.of(model, tasks, texts, seed)
    shop = Workshop(model, tokenizer, parts, batch, seq, pooling, seed)
    wanted = tuple(USUAL[goal] if steps is None else steps)
    climb = _Climb(shop, speedup, max_drop, wanted, quantize, progress)
    climb.run(goal)
    given = Given.of(parts, goal, speedup, max_drop, wanted, batch, seq, pooling, seed)
    report = climb.report(given)
    if not report.met and (not best_effort or not climb.at.fields):
        raise BudgetNotMet(_not_met(report, climb), report)
    done = shop.finished(climb.at.fields)
    report.test = parts.final_judge(model, tokenizer, pooling)(done.model, done.tokenizer) if parts.test else []
    return Searched(done.model, done.tokenizer, report)


def _check(goal: str, speedup: float | None, max_drop: float, steps: Sequence[str] | None) -> None:
    if goal not in GOALS:
        raise QBertError(f"goal {goal!r}; allowed: {', '.join(GOALS)}")
    if speedup is not None and not (isinstance(plain(speedup), int | float) and 1.0 < speedup < 1000.0):
        raise QBertError(f"speedup is {speedup!r}; allowed: above 1, times as fast as the float model")
    if not (isinstance(plain(max_drop), int | float) and 0.0 <= max_drop < 100.0):
        raise QBertError(f"max_drop is {max_drop!r}; allowed: 0 or more, below 100, in points")
    for name in steps or ():
        if name not in LADDERS:
            raise QBertError(f"step {name!r}; allowed: {', '.join(LADDERS)}")
    if steps is not None and not steps:
        raise QBertError(f"no steps; allowed: some of {', '.join(LADDERS)}")


class _Climb:
    """A search on its way.

    Attributes:
        at: the best so far; the original before anything was kept.
        rows: all that was tried.
        refused: field -> values that lost too much or did not pay.
    """

    def __init__(
        self, shop: Workshop, speedup: float | None, max_drop: float, steps: Sequence[str],
        quantize: Sequence[str] | None, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.shop, self.speedup, self.max_drop, self.steps, self.quantize = shop, speedup, max_drop, steps, quantize
        self.at, self.rows = shop.original, [shop.original]
        self.refused: dict[str, list[Any]] = {name: [] for name in LADDERS}
        self._tell = progress or (lambda done, total, what: None)

    def run(self, goal: Goal) -> None:
        """All groups of ladders, for speed first where a speed-up is asked for."""
        if goal == "latency" or self.speedup is not None:
            for group in GROUPS["latency"]:
                self._group(group, "latency")
        if goal == "size":
            for group in GROUPS["size"]:
                for name in group:  # what was too slow to pay may still be small enough to
                    self.refused[name] = [] if self.speedup is not None else self.refused[name]
                self._group(group, "size")

    @property
    def fast_enough(self) -> bool:
        """Whether the speed-up that was asked for is there."""
        return self.speedup is not None and (self.at.speedup or 0.0) >= self.speedup

    def _group(self, group: Sequence[str], goal: Goal) -> None:
        while True:
            asked = [LADDERS[name] for name in group if name in self.steps]
            found: list[Tried] = []
            for ladder in asked:
                own = ladder.pays_in or goal
                if own == "latency" and self.fast_enough:
                    continue
                value = ladder.next(self._asked(ladder.field, own))
                if value is not None:
                    found.append(self._try(ladder.field, value, own))
            if not found:
                return
            self._keep([each for each in found if not each.why])

    def _asked(self, field: str, goal: Goal) -> Asked:
        plan = self.shop.original.plan
        assert plan is not None
        gap = None if self.speedup is None or goal == "size" else self.speedup / (self.at.speedup or 1.0)
        now = self.at.fields.get(field)
        return Asked(goal, len(plan.layers), plan.vocabulary, now, gap, self.refused[field], self.quantize)

    def _try(self, field: str, value: Any, goal: Goal) -> Tried:
        name = f"{field} {LADDERS[field].short(value)}"
        self._tell(len(self.rows), 0, name)
        row = self.shop.tried(name, {**self.at.fields, field: value})
        row.why = row.why or self._against(row, goal)
        if row.why:
            self.refused[field].append(value)
        self.rows.append(row)
        return row

    def _against(self, row: Tried, goal: Goal) -> str:
        """Why not to keep it; empty where nothing speaks against it."""
        why = objection(self.at, row, goal, self.max_drop)
        if not why and self.speedup is not None and goal == "size" and (row.speedup or 0.0) < self.speedup:
            return f"x{row.speedup:.2f} is slower than the x{self.speedup:g} that is asked for"
        return why

    def _keep(self, found: list[Tried]) -> None:
        """Goes on from the best of these; the others are tried again after it."""
        if not found:
            return
        enough = [row for row in found if self.speedup is not None and (row.speedup or 0.0) >= self.speedup]
        best = min(enough, key=lambda row: row.drop) if enough else max(found, key=self._worth)
        saved = f"{self._percent(best, 'latency')} of the time, {self._percent(best, 'size')} of the bytes saved"
        best.kept, best.why = True, saved
        for row in found:
            if row is not best:
                row.why = f"not now: {best.step} saves more for what it loses"
        first = not self.at.fields
        self.at = best
        if first:
            self.shop.measure_against(best.fields)

    def _worth(self, row: Tried) -> float:
        """Logarithm of what it saves for each point that it loses more."""
        saved = max(math.log(gain(self.at, row, "latency")), math.log(gain(self.at, row, "size")))
        return saved / max(row.drop - self.at.drop, _NOISE)

    def _percent(self, row: Tried, goal: Goal) -> str:
        return f"{100 * (1 - 1 / gain(self.at, row, goal)):+.0f}%"

    def report(self, given: Given) -> SearchReport:
        """All of it."""
        met = bool(self.at.fields) and (self.speedup is None or self.fast_enough)
        recipe = None if not self.at.fields else resolved(self.at, self.shop)
        return SearchReport(
            given=given, rows=self.rows, original_ms=self.shop.original_ms, recipe=recipe, met=met, test=[]
        )


def resolved(row: Tried, shop: Workshop) -> Compression:
    """A row's recipe with what was measured written out: which layers, how many heads and neurons of each."""
    fields: Fields = dict(row.fields)
    before, after = shop.original.plan, row.plan
    assert before is not None
    assert after is not None
    if "layers" in fields:
        fields["layers"] = _places(before, after)
    if "prune" in fields:
        fields["prune"] = {
            "heads": [len(each.heads) for each in after.layers],
            "ffn": [each.ffn for each in after.layers],
        }
    return Compression.of(**fields, batch=shop.batch, seq=shop.seq)


def _places(before: ShapePlan, after: ShapePlan) -> list[int]:
    sources = [each.source for each in before.layers]
    return [sources.index(each.source) for each in after.layers]


def _not_met(report: SearchReport, climb: _Climb) -> str:
    asked, best = report.given, climb.at
    budget = f"a loss of at most {asked.max_drop:g} points"
    if asked.speedup is not None:
        budget = f"x{asked.speedup:g} of the float model's speed at {budget}"
    if not best.fields:
        near = min((row for row in report.rows[1:] if row.changes), key=lambda row: row.drop, default=None)
        closest = "no model could be made" if near is None else f"the best, {near.step}, {_said(near)}"
        why = "" if near is not None or len(report.rows) < 2 else f" ({report.rows[-1].why})"
        return f"{budget} cannot be met: nothing pays; {closest}{why}"
    fast = [row for row in report.rows if asked.speedup is not None and (row.speedup or 0) >= asked.speedup]
    costs = min(fast, key=lambda row: row.drop, default=None)
    priced = "nothing tried is as fast" if costs is None else f"as fast as that, {costs.step} {_said(costs)}"
    return (
        f"{budget} cannot be met here: the best within it, {in_words(best.fields)}, {_said(best)}; {priced}. Allowed: a lower "
        f"speed-up, more points, or the best there is (--best-effort)"
    )


def _said(row: Tried) -> str:
    changes = ", ".join(str(each) for each in row.changes)
    return f"is x{row.speedup:.2f} at {changes}"
