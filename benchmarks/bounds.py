"""The roofline of a device that was measured: what its ceilings allow at best, and which share of that a time is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .results_schema import CeilingRow, Work

COPY = "copy"


@dataclass(frozen=True)
class Bounds:
    """Measured ceilings by quantity: "copy" in bytes a second, precisions in operations a second."""

    rates: dict[str, float]

    @classmethod
    def of(cls, rows: Iterable[CeilingRow]) -> Bounds:
        """From results; the last of each quantity counts."""
        return cls({row.quantity: row.per_second for row in rows if row.per_second})

    def seconds(self, work: Work) -> float | None:
        """The least that the work can take; None where a ceiling is not known."""
        copy, peak = self.rates.get(COPY), self.rates.get(work.precision)
        if copy is None or (peak is None and work.operations):
            return None
        return max(work.bytes / copy, work.operations / peak if peak else 0.0)

    def share(self, work: Work, seconds: float) -> float | None:
        """The bound over a time, 0 to 1; above 1 where the work was in a cache."""
        least = self.seconds(work)
        return None if least is None else least / seconds
