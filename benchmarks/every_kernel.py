"""Every kernel once with every scheme, on small odd problems, each result compared: what a sanitizer is run over.

    python -m benchmarks.every_kernel --target cuda
    compute-sanitizer --tool memcheck python -m benchmarks.every_kernel --target cuda
    TRITON_INTERPRET=1 python -m benchmarks.every_kernel --target interpreter      Triton's kernels without a GPU

Prints a line for each; the exit code is 1 if a result was wrong, or an operation has no kernel. With
PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, so that memcheck sees a step beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
import typer

from qbert import ops
from qbert.errors import QBertError
from qbert.formats import SCHEMES, Role
from qbert.ops import cuda, triton
from qbert.ops.kernel import Kernel, problem_of
from qbert.ops.operations import FLOAT_TABLE, OPERATIONS, AddNorm
from qbert.ops.table import select_layout
from qbert.ops.triton.launch import INTERPRETED
from qbert.target import Target, target_of
from qbert.testing import assert_matches_reference, random_problem, schemes_of, to_device, with_pattern
from qbert.timing import one_line
from qbert.weight import Layout

from .predict import GPUS
from .recorder import device_of, run_command

INTERPRETER = "interpreter"
NOT_TAKEN = "it does not take this problem"
# (tokens, output channels, input channels): one token, sizes that fill no tile, and one whose rows are not aligned.
LINEARS = ((1, 96, 128), (37, 200, 176), (65, 130, 95))
LINEARS_AND_NORMS = ((1, 256, 128), (37, 384, 176))  # rows that a cluster of blocks computes
LOOK_UPS = ((37, 50, 96),)  # (tokens, rows, width)
ROWS = ((37, 1, 768), (5, 1, 97))  # (tokens, unused, width)
ATTENTION = ((150, 2, 64), (70, 3, 32))  # (tokens, heads, head dimension)
SIZES = {
    "linear": LINEARS, "linear_add_norm": LINEARS_AND_NORMS, "embedding": LOOK_UPS, "embed_norm": LOOK_UPS,
    "attention": ATTENTION,
}  # fmt: skip
# What attention does by distance, and of floats: arguments of `with_pattern`.
PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {}, "window": {"window": 9}, "bias": {"reach": 20}, "rotary": {"floats": torch.bfloat16, "rotary": True},
    "rotary window bias": {"floats": torch.float32, "dynamic": True, "rotary": True, "window": 40, "reach": 3},
}  # fmt: skip

Call = Callable[[Any], Any]


class Case(NamedTuple):
    """A problem that kernels are called with: arguments of `random_problem`, and one of `PATTERNS`."""

    operation: str
    scheme: str | None
    sizes: tuple[int, int, int]
    int8_out: bool = False
    pattern: str = "plain"

    def __str__(self) -> str:
        out = " int8 out" if self.int8_out else ""
        pattern = "" if self.pattern == "plain" else f" {self.pattern}"
        return f"{self.operation} {self.scheme or '-'} {'x'.join(map(str, self.sizes))}{out}{pattern}"


def cases() -> Iterator[Case]:
    """Every operation with every scheme, and float and int8 results where there are both."""
    for operation in OPERATIONS:
        tables = [FLOAT_TABLE] if operation == "embed_norm" else []
        schemes: list[str | None] = [*schemes_of(operation), *tables]
        for scheme in schemes or [None]:
            for int8_out in (False, True) if _may_be_int8(operation, scheme) else (False,):
                for sizes in SIZES.get(operation, ROWS):
                    for pattern in PATTERNS if operation == "attention" else ("plain",):
                        yield Case(operation, scheme, _in_groups(sizes, scheme), int8_out, pattern)


def _may_be_int8(operation: str, scheme: str | None) -> bool:
    return operation == "attention" or (operation == "linear" and SCHEMES[str(scheme)].activation is not None)


def _in_groups(sizes: tuple[int, int, int], scheme: str | None) -> tuple[int, int, int]:
    """Input channels rounded up to whole groups of the scheme."""
    group = (SCHEMES[scheme].group_size if scheme in SCHEMES else None) or 1
    return (*sizes[:2], -(-sizes[2] // group) * group)


def layout_of(case: Case, kernel: str, target: Target) -> Layout:
    """The layout in which a kernel of the target reads the weight; PLAIN where there is none.

    Args:
        kernel: one of the names that `kernels_of` gives.
    """
    if case.scheme not in SCHEMES:
        return Layout.PLAIN
    scheme, role = SCHEMES[case.scheme], Role.EMBEDDING if "embed" in case.operation else Role.LINEAR
    own = cuda.own_layout(scheme) if kernel == "cuda" and role is Role.LINEAR else None
    return own or select_layout(scheme, role, replace(target, prefer="triton"))


def kernels_of(operation: str, where: str) -> dict[str, Kernel | Call]:
    """What computes an operation there: rows of the table, past the choice, which would let the reference step in.

    Args:
        where: cpu, cuda or interpreter.
    """
    if where == "cpu":
        return {"operator": ops.call}
    rows = {row.operation: row for row in triton.KERNELS}
    found: dict[str, Kernel | Call] = {"triton": rows[operation]} if operation in rows else {}
    if operation == "linear_add_norm":
        linear, add_norm = rows["linear"].call, rows["add_norm"].call
        found["triton"] = lambda a: add_norm(AddNorm(linear(a.linear), a.residual, a.norm, a.keeps))
    compiled = {row.operation: row for row in cuda.KERNELS}
    if where == "cuda" and operation in compiled and target_of(torch.device("cuda")).native:
        found["cuda"] = compiled[operation]
    return found


def check(case: Case, device: torch.device, where: str) -> dict[str, str | None]:
    """What is wrong with each kernel's result, or None."""
    target = GPUS["h100"] if where == INTERPRETER else target_of(device)
    kernels = kernels_of(case.operation, where)
    if not kernels:
        return {"no kernel": NOT_TAKEN}
    return {name: _wrong(case, name, kernel, target, device) for name, kernel in kernels.items()}


def may_refuse(case: Case, kernel: str) -> bool:
    """Whether another kernel steps in where this one does not take a problem; none reads layouts of the compiled ones' own."""
    if kernel != "cuda":
        return False
    return case.operation != "linear" or cuda.own_layout(SCHEMES[str(case.scheme)]) is None


def _wrong(case: Case, name: str, kernel: Kernel | Call, target: Target, device: torch.device) -> str | None:
    operation, scheme, sizes, int8_out, pattern = case
    try:  # where a kernel has broken the context making the problem fails, and all lines after it say so
        layout = layout_of(case, name, target)
        problem = random_problem(operation, *sizes, scheme=scheme, layout=layout, int8_out=int8_out)
        if operation == "attention":
            problem = with_pattern(problem, **PATTERNS[pattern])
        problem = to_device(problem, device)
        if isinstance(kernel, Kernel):
            if kernel.obstacle(problem_of(problem), replace(target, prefer=name)) is not None:
                return NOT_TAKEN
            kernel = kernel.call
        assert_matches_reference(problem, kernel(problem))
    except Exception as error:
        return one_line(error)
    return None


def main(
    target: Annotated[str, typer.Option(help=f"cpu, cuda or {INTERPRETER}")] = "cuda",
    only: Annotated[str, typer.Option(help="part of operations' names")] = "",
) -> None:
    """Calls every kernel once."""
    if (target == INTERPRETER) != INTERPRETED:
        raise QBertError(f"--target {INTERPRETER} and TRITON_INTERPRET=1 go together")
    device = torch.device("cpu") if target == INTERPRETER else device_of(target)
    wrong = 0
    for case in cases():
        if only in case.operation:
            for name, reason in check(case, device, target).items():
                if reason == NOT_TAKEN and may_refuse(case, name):
                    continue
                wrong += reason is not None
                print(f"{case} {name}: {reason or 'good'}", flush=True)
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_command(main)
