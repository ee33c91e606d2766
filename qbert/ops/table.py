"""The kernels of all backends, in the order in which they are asked, and the choice among them.

`select` returns the row whose callable is then called: what `qbert.explain` shows is what runs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from qbert.formats import Role, Scheme
from qbert.ops import composed, cpu, cuda, reference_kernels, triton
from qbert.ops.kernel import Kernel, Problem, problem_of
from qbert.ops.operations import OPERATIONS, operation_of
from qbert.target import Target, target_of
from qbert.tiles import is_forced
from qbert.weight import Layout

# The first row without an obstacle runs. A compiled kernel and another operation after it are faster than torch's kernels,
# which do both; the reference is last: it computes everything everywhere, slowly.
_ROWS = (
    *cuda.KERNELS, *triton.KERNELS, *cpu.native.KERNELS, *composed.KERNELS, *cpu.by_torch.KERNELS, *reference_kernels.KERNELS,
)  # fmt: skip
KERNELS: dict[str, tuple[Kernel, ...]] = {
    name: tuple(row for row in _ROWS if row.operation == name) for name in OPERATIONS
}
# Token counts that stand for all where what runs depends on it: from one short text to a large batch.
_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)


class KernelChoice(NamedTuple):
    """What runs for an operation, and why that one: for people."""

    name: str
    reason: str


def select(operation: str, problem: Problem, target: Target) -> Kernel:
    """The kernel that computes a problem on a target.

    Raises:
        KeyError: an operation that is not in `OPERATIONS` (a mistake in qbert, not in its input).
    """
    return (_first if is_forced() else _remembered)(operation, problem, target)


def _first(operation: str, problem: Problem, target: Target) -> Kernel:
    return next(row for row in KERNELS[operation] if row.obstacle(problem, target) is None)


_remembered = functools.lru_cache(maxsize=8192)(_first)


def explain(operation: str, problem: Problem, target: Target) -> KernelChoice:
    """What `select` gives, in words; where it depends on the tokens, for every number of them."""
    if target.device != "cuda" or problem.t is not None:
        row = select(operation, problem, target)
        return KernelChoice(row.name, row.reason(problem, target))
    rows = [select(operation, problem._replace(t=t), target) for t in _TOKENS]
    names = [
        f"{row.name} up to {_last(row, few, many, operation, problem, target)} tokens"
        for (row, few), (other, many) in itertools.pairwise(zip(rows, _TOKENS, strict=True))
        if other is not row
    ]
    name = "; ".join((*names, f"{rows[-1].name} above")) if names else rows[0].name
    return KernelChoice(name, rows[0].reason(problem, target))


def _last(row: Kernel, few: int, many: int, operation: str, problem: Problem, target: Target) -> int:
    """The most tokens that a row computes which computes `few` of them and not `many`; it gives way once in between."""
    while many - few > 1:
        middle = (few + many) // 2
        if select(operation, problem._replace(t=middle), target) is row:
            few = middle
        else:
            many = middle
    return few


def run(a: Any) -> Any:
    """Computes an operation whose record was checked."""
    device = a[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, wherever its arguments are
            return run(a)
    # On a CPU tokens make no difference, and would only fill the memory of choices.
    problem = problem_of(a, tokens=device.type != "cpu")
    return select(operation_of(a).name, problem, target_of(device)).call(a)


def runner(operation: str, problem: Problem, target: Target) -> Callable[[Any], Any]:
    """What computes records of that kind, chosen ahead: on a CPU the kernel itself, for tokens make no difference there."""
    return select(operation, problem, target).call if target.device == "cpu" else run


def select_layout(scheme: Scheme, role: Role, target: Target) -> Layout:
    """The layout that the kernel for a weight of that scheme reads on `target`."""
    if role is Role.EMBEDDING:
        return Layout.PLAIN  # a look-up unpacks the rows it needs
    return next(_wishes(scheme, target), Layout.PLAIN)


def _wishes(scheme: Scheme, target: Target) -> Iterator[Layout]:
    for row in KERNELS["linear"]:
        wish = row.layout(scheme, target)
        if wish is not None:
            yield wish


# A BERT-base layer's activations for so many tokens are about 15 MB and stay in the last-level cache. Reading the weights
# once a portion costs 1% of its time.
_CPU_TOKENS_AT_ONCE = 1024


def tokens_at_once(target: Target) -> int | None:
    """How many tokens a fused encoder takes through all layers together; None for as many as there are."""
    return _CPU_TOKENS_AT_ONCE if target.device == "cpu" else None
