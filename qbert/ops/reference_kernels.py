"""The reference as the last kernel of every operation: exact, slow, and it says so."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from qbert.ops.cuda.choice import compiled_obstacle
from qbert.ops.kernel import Kernel, Problem, problem_of
from qbert.ops.reference import REFERENCES
from qbert.target import Target
from qbert.tiles import MIN_SM
from qbert.weight.layout import FRAGMENT_LAYOUTS

log = logging.getLogger(__name__)
REFERENCE = "reference"


def _reason(problem: Problem, target: Target) -> str:
    where, layout = f"no {target.device} kernel", problem.layout
    if target.device == "cuda" and target.sm < MIN_SM:
        where = f"no kernel for compute capability {target.sm / 10:.1f}"
    elif layout in FRAGMENT_LAYOUTS and (obstacle := compiled_obstacle("linear", target)) is not None:
        return f"the weight lies in {layout.value}, but {obstacle}; exact but slow"
    elif layout is not None:
        where = f"{where} reads {layout.value}"
    return f"{where} in this version; exact but slow"


def _logged(operation: str, reference: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The reference; the log hears of it the first time."""

    @functools.cache
    def warn(device: str, layout: str) -> None:
        log.warning("qbert::%s runs as the plain-torch reference on %s%s: exact, but slow", operation, device, layout)

    def logged(a: Any) -> Any:
        layout = problem_of(a).layout
        warn(a[0].device.type, "" if layout is None else f" in {layout.value}")
        return reference(a)

    return logged


KERNELS = tuple(
    Kernel(operation, REFERENCE, _logged(operation, reference), obstacle=lambda problem, target: None, reason=_reason)
    for operation, reference in REFERENCES.items()
)
