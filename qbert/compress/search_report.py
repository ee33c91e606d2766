"""What a search tried and found, as data that prints itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from qbert.compress.judge import Change, Parts
from qbert.compress.ladders import Goal
from qbert.compress.recipe import Compression
from qbert.compress.workshop import Tried

if TYPE_CHECKING:
    from rich.table import Table


class Given(BaseModel):
    """What was asked for, and by how many texts.

    Attributes:
        texts, selection: how many the methods and the judge of steps had.
        left_out: given texts that were among those to judge by.
    """

    model_config = ConfigDict(extra="forbid")

    goal: Goal
    speedup: float | None
    max_drop: float
    steps: list[str]
    batch: int
    seq: int
    pooling: str
    seed: int
    tasks: list[str]
    texts: int
    selection: int
    left_out: int

    @classmethod
    def of(
        cls, parts: Parts, goal: Goal, speedup: float | None, max_drop: float, steps: Sequence[str], batch: int, seq: int,
        pooling: str, seed: int,
    ) -> Given:  # fmt: skip
        selection = sum(len(each.test) for each in parts.selection) or len(parts.held_out)
        return cls(
            goal=goal, speedup=speedup, max_drop=max_drop, steps=list(steps), batch=batch, seq=seq, pooling=pooling, seed=seed,
            tasks=[each.name for each in parts.selection], texts=len(parts.texts), selection=selection,
            left_out=parts.left_out,
        )  # fmt: skip


class SearchReport(BaseModel):
    """Outcome of `search`.

    Attributes:
        rows: the original, then every model that was tried, in order; those that are `kept` follow from one another.
        original_ms: of the float model's forward; a row's is this divided by its speed-up.
        recipe: of the last row that was kept, with layers, heads and neurons written out; None where nothing was.
        met: whether the budget is kept.
        test: what the finished model loses on test texts, which decided nothing; empty without tasks, or not met.
        commands: what makes the same again, see `workflow`.
    """

    model_config = ConfigDict(extra="forbid")

    given: Given
    rows: list[Tried]
    original_ms: float
    recipe: Compression | None
    met: bool
    test: list[Change]
    commands: list[str] = []

    @property
    def found(self) -> Tried:
        """The last row that was kept; the original where nothing was."""
        return [row for row in self.rows if row.kept][-1]

    def ms(self, row: Tried) -> float:
        """Milliseconds of the forward of a row that was timed."""
        assert row.speedup is not None
        return self.original_ms / row.speedup

    def table(self) -> Table:
        """A row for each model."""
        from rich.table import Table

        shown = Table(title=self.title, title_justify="left", caption=self.caption, caption_justify="left")
        for header in ("", "step", "ms", "faster", "MB", *self._tasks, "s", "why"):
            shown.add_column(header, justify="left" if header in ("", "step", "why") else "right", overflow="fold")
        for row in self.rows:
            shown.add_row(*self._cells(row))
        return shown

    @property
    def title(self) -> str:
        """What was asked for."""
        given = self.given
        fast = "" if given.speedup is None else f"x{given.speedup:g} or more, "
        return f"{given.goal}: {fast}at most {given.max_drop:g} points"

    @property
    def caption(self) -> str:
        """How to read the table."""
        given = self.given
        by = "by tasks' labels" if given.tasks else "by agreement with the original, 100 points of it"
        return (
            f"+ kept, - dropped. Changes in points with their paired 95% intervals, on {given.selection} texts that no method "
            f"had ({by}); {given.texts} texts for the methods. Times of {given.batch} x {given.seq} tokens, in turns."
        )

    @property
    def _tasks(self) -> list[str]:
        return list(dict.fromkeys(change.on for row in self.rows for change in row.changes))

    def _cells(self, row: Tried) -> list[str]:
        timed = ("", "") if row.speedup is None else (f"{self.ms(row):.1f}", f"x{row.speedup:.2f}")
        cells = ["+" if row.kept else "-", row.step, *timed, "" if row.megabytes is None else f"{row.megabytes:.1f}"]
        changes: dict[str, Any] = {change.on: change for change in row.changes}
        for task in self._tasks:
            change = changes.get(task)
            cells.append("" if change is None else str(change).removeprefix(f"{task} "))
        return [*cells, f"{row.seconds:.0f}", row.why]

    def lines(self) -> list[str]:
        """What was found, after the table."""
        row, recipe = self.found, self.recipe
        if recipe is None:
            return ["nothing pays"]
        said = "met" if self.met else "NOT met, the best within the points that may be lost"
        lines = [f"budget {said}: x{row.speedup:.2f}, {row.megabytes:.1f} MB; {row.plan}"]
        if self.test:
            lines.append("on test texts, which decided nothing: " + ", ".join(str(each) for each in self.test))
        if self.given.left_out:
            lines.append(f"{self.given.left_out} texts left out: they are among those that judge")
        return lines + [f"again: {command}" for command in self.commands]
