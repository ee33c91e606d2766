"""The practical guide as code: which methods pay for a model on this machine, by how much, which do not and why, what to run.

Where `search` looks for the best recipe, the guide measures every method by itself, on top of the quantization that pays, one
or two rungs of its ladder (`ladders`), then all that pay together: methods that pay alone may not pay in company.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from qbert.calibrate import tokenizer_beside
from qbert.compress.judge import Parts
from qbert.compress.ladders import GOALS, LADDERS, Asked, Goal, Ladder, in_words
from qbert.compress.recipe import Compression
from qbert.compress.steps import Progress
from qbert.compress.texts import float_encoder, plain, require_pooling
from qbert.compress.workshop import Fields, Tried, Workshop, gain, objection
from qbert.errors import QBertError

if TYPE_CHECKING:
    from rich.table import Table

_RUNGS = 2  # of each ladder at most
# The survey's other families, which nothing here measures, and what is known of them.
UNMEASURED: dict[str, str] = {
    "a better model of the same size": "costs nothing at run time: models trained later may be better before any compression",
    "distillation": "trains, which no method here does: it wins back what layers, heads and neurons cost",
    "unstructured pruning": "saves no time: no kernel here skips single zeros; of bytes a dictionary of 3 or 4 bits saves more",
    "sharing weights between layers": "saves no time: every layer is computed all the same; training decides what it costs",
    "smaller hidden size": "every norm and residual couples its dimensions: it needs training",
}


class Advised(BaseModel):
    """A method, measured.

    Attributes:
        method: a field of `Compression`.
        rows: what was tried of it, each on top of `Guide.base`.
        best: the step that was taken from it; None where none pays.
        why: it pays, or does not.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    rows: list[Tried]
    best: str | None
    why: str


class Guide(BaseModel):
    """The answer.

    Attributes:
        original_ms: of the float model's forward.
        base: fields of the quantization that the other methods were measured on top of; empty where none pays.
        methods: in the order of the recipe.
        together: all that pay in one model; None where one or none does.
        recipe: what to run, None where nothing pays.
        found: its row.
        others: methods that were not measured, and why.
    """

    model_config = ConfigDict(extra="forbid")

    goal: Goal
    max_drop: float
    batch: int
    seq: int
    selection: int
    original: Tried
    original_ms: float
    base: dict[str, Any]
    methods: list[Advised]
    together: Tried | None
    recipe: Compression | None
    found: Tried | None
    others: dict[str, str]

    def table(self) -> Table:
        """A row for each model that was measured, and for each method that was not."""
        from rich.table import Table

        shown = Table(
            title=f"{self.goal}, at most {self.max_drop:g} points", title_justify="left", caption_justify="left",
            caption=f"changes in points with paired 95% intervals, on {self.selection} texts that no method had; times of "
            f"{self.batch} x {self.seq} tokens here, in turns; below quantize each method by itself, on top of it",
        )  # fmt: skip
        for header in ("method", "step", "ms", "faster", "MB", "change", "pays"):
            shown.add_column(header, justify="right" if header in ("ms", "faster", "MB") else "left", overflow="fold")
        for name, rows in self._rows():
            for row in rows:
                shown.add_row(name, *self._cells(row))
        for name, why in self.others.items():
            shown.add_row(name, "", "", "", "", "not measured", why)
        return shown

    def _rows(self) -> list[tuple[str, list[Tried]]]:
        rows = [("", [self.original]), *((each.method, each.rows) for each in self.methods)]
        return rows if self.together is None else [*rows, ("all that pay", [self.together])]

    def _cells(self, row: Tried) -> list[str]:
        timed = ("", "") if row.speedup is None else (f"{self.original_ms / row.speedup:.1f}", f"x{row.speedup:.2f}")
        size = "" if row.megabytes is None else f"{row.megabytes:.1f}"
        return [row.step, *timed, size, "\n".join(str(each) for each in row.changes), row.why]

    def verdict(self) -> str:
        """What to do, in a line."""
        if self.found is None:
            return "nothing pays: keep the model as it is"
        changes = ", ".join(str(each) for each in self.found.changes)
        return (
            f"take {in_words(self.found.fields)}: x{self.found.speedup:.2f}, {self.found.megabytes:.1f} MB, {changes}"
        )


@torch.inference_mode(False)
def guide(
    model: nn.Module,
    *,
    tasks: Sequence[Any] = (),
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
    goal: Goal = "latency",
    max_drop: float = 1.0,
    batch: int = 8,
    seq: int = 128,
    pooling: str = "mean",
    seed: int = 0,
    progress: Progress | None = None,
) -> Guide:
    """Measures what each method would bring to a model. See `search` for the arguments, and for the texts.

    Raises:
        QBertError: a goal that there is not, too few texts, or a model that is quantized or cannot be taken apart.
    """
    if goal not in GOALS:
        raise QBertError(f"goal {goal!r}; allowed: {', '.join(GOALS)}")
    if not (isinstance(plain(max_drop), int | float) and 0.0 <= max_drop < 100.0):
        raise QBertError(f"max_drop is {max_drop!r}; allowed: 0 or more, below 100, in points")
    require_pooling(pooling)
    encoder = float_encoder(model, "advising")
    tokenizer = tokenizer_beside(encoder.base) if tokenizer is None else tokenizer
    parts = Parts.of(model, tasks, texts, seed)
    shop = Workshop(model, tokenizer, parts, batch, seq, pooling, seed)
    return _Guiding(shop, goal, max_drop, progress).guide(
        sum(len(each.test) for each in parts.selection) or len(parts.held_out)
    )


class _Guiding:
    """A guide in the making."""

    def __init__(self, shop: Workshop, goal: Goal, max_drop: float, progress: Progress | None) -> None:
        self.shop, self.goal, self.max_drop, self.base = shop, goal, max_drop, shop.original
        self._tell, self._done = progress or (lambda done, total, what: None), 0

    def guide(self, selection: int) -> Guide:
        """All of it."""
        quantized = self._method(LADDERS["quantize"])
        best = self._best(quantized)
        if best is not None:
            self.base = best
            self.shop.measure_against(best.fields)
        methods = [quantized, *(self._method(each) for name, each in LADDERS.items() if name != "quantize")]
        found, together = self._together(methods)
        recipe = None if found is None else Compression.of(**found.fields, batch=self.shop.batch, seq=self.shop.seq)
        return Guide(
            goal=self.goal, max_drop=self.max_drop, batch=self.shop.batch, seq=self.shop.seq, selection=selection,
            original=self.shop.original, original_ms=self.shop.original_ms, base=self.base.fields, methods=methods,
            together=together, recipe=recipe, found=found, others=UNMEASURED,
        )  # fmt: skip

    def _method(self, ladder: Ladder) -> Advised:
        """Climbs one ladder from the base, a rung or two."""
        goal, at, rows, refused = ladder.pays_in or self.goal, self.base, list[Tried](), list[Any]()
        for _ in range(_RUNGS):
            value = ladder.next(self._asked(goal, at.fields.get(ladder.field), refused))
            if value is None:
                break
            row = self._try(f"{ladder.field} {ladder.short(value)}", {**self.base.fields, ladder.field: value})
            against = row.why or objection(at, row, goal, self.max_drop)
            row.why = against or f"pays: {self._saved(row)}"
            rows.append(row)
            if against:
                refused.append(value)
            else:
                row.kept, at = True, row
        kept = [row for row in rows if row.kept]
        why = kept[-1].why if kept else rows[-1].why if rows else "nothing of it is left to try"
        return Advised(method=ladder.field, rows=rows, best=kept[-1].step if kept else None, why=why)

    def _asked(self, goal: Goal, now: Any, refused: list[Any]) -> Asked:
        plan = self.shop.original.plan
        assert plan is not None
        return Asked(goal, len(plan.layers), plan.vocabulary, now, None, refused, None)

    def _try(self, step: str, fields: Fields) -> Tried:
        self._tell(self._done, 0, step)
        self._done += 1
        return self.shop.tried(step, fields)

    def _saved(self, row: Tried) -> str:
        """Against the base, or the original where the row is of the base itself."""
        time, size = (100 * (1 - 1 / gain(self.base, row, goal)) for goal in GOALS)
        return f"{time:+.0f}% of the time, {size:+.0f}% of the bytes saved"

    @staticmethod
    def _best(method: Advised) -> Tried | None:
        return next((row for row in reversed(method.rows) if row.kept), None)

    def _together(self, methods: list[Advised]) -> tuple[Tried | None, Tried | None]:
        """What to run, and the model of all that pay where there are several."""
        best = {each.method: row for each in methods if (row := self._best(each)) is not None}
        paying = [
            row for name, row in best.items() if LADDERS[name].pays_in in (None, self.goal)
        ]  # words save bytes alone
        if not paying:
            return None, None
        found = max(paying, key=lambda row: gain(self.shop.original, row, self.goal))
        fields = {name: value for row in paying for name, value in row.fields.items()}
        if len(paying) < 2 or fields == found.fields:
            return found, None
        row = self._try(in_words(fields), fields)
        against = row.why or objection(found, row, self.goal, self.max_drop)
        row.kept, row.why = not against, against or f"pays: {self._saved(row)}"
        return (found if against else row), row
