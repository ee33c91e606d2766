"""L1. Comparing run times on a noisy machine: interleaved, by medians and ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians(
    candidates: Mapping[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each candidate; all run once a round, in turn, so that a disturbance meets them alike.

    Args:
        candidates: name -> what to time, on the CPU (nothing is synchronized).
        repeats: rounds that count.
        warmup: rounds before that.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(warmup + repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if round_index >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
