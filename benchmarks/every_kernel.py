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
from functools import partial
from typing import Annotated, Any

import torch
import typer

from qbert import ops as _ops  # noqa: F401  (defines torch.ops.qbert)
from qbert.dispatch import COMPILED_LAYOUTS, COMPOSED, select_layout
from qbert.errors import QBertError
from qbert.formats import SCHEMES, Role
from qbert.layout import Layout
from qbert.ops.composed import COMPOSITIONS
from qbert.ops.cuda import KERNELS as COMPILED
from qbert.ops.schemas import SCHEMAS
from qbert.ops.triton import TRITON
from qbert.ops.triton.launch import INTERPRETED
from qbert.target import Target, target_of
from qbert.testing import assert_matches_reference, random_arguments, schemes_of
from qbert.timing import one_line

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


def problems() -> Iterator[tuple[str, str | None, tuple[int, int, int]]]:
    """(operation, scheme, sizes)."""
    for operation in SCHEMAS:
        schemes: list[str | None] = [*schemes_of(operation)]
        for scheme in schemes or [None]:
            for sizes in _sizes(operation):
                yield operation, scheme, _in_groups(sizes, scheme)


def _in_groups(sizes: tuple[int, int, int], scheme: str | None) -> tuple[int, int, int]:
    """Input channels rounded up to whole groups of the scheme."""
    group = (SCHEMES[scheme].group_size if scheme in SCHEMES else None) or 1
    return (*sizes[:2], -(-sizes[2] // group) * group)


def _sizes(operation: str) -> tuple[tuple[int, int, int], ...]:
    if operation in COMPOSED:
        return LINEARS_AND_NORMS
    if "linear" in operation:
        return LINEARS
    if "embed" in operation:
        return LOOK_UPS
    return ATTENTION if operation.startswith("attention") else ROWS


def layout_of(operation: str, scheme: str | None, kernel: str, target: Target) -> Layout:
    """The layout in which a kernel of the target reads that weight; PLAIN where there is none.

    Args:
        kernel: one of the names that `kernels_of` gives.
    """
    if scheme not in SCHEMES:
        return Layout.PLAIN
    if kernel == "cuda" and operation in COMPILED_LAYOUTS:
        return COMPILED_LAYOUTS[operation]
    role = Role.EMBEDDING if "embed" in operation else Role.LINEAR
    return select_layout(SCHEMES[scheme], role, replace(target, prefer="triton"))


def kernels_of(operation: str, where: str) -> dict[str, Callable[..., Any]]:
    """What computes an operation there, past the operator, which would let the reference step in.

    Args:
        where: cpu, cuda or interpreter.
    """
    if where == "cpu":
        return {"operator": getattr(torch.ops.qbert, operation).default}
    kernels = {"triton": TRITON[operation]} if operation in TRITON else {}
    if operation in COMPOSED:
        kernels = {"triton": COMPOSITIONS[operation](*(TRITON[part] for part in COMPOSED[operation]))}
    if where == "cuda" and operation in COMPILED and target_of(torch.device("cuda")).native:
        kernels["cuda"] = COMPILED[operation]
    return kernels


def check(
    operation: str, scheme: str | None, sizes: tuple[int, int, int], device: torch.device, where: str
) -> dict[str, str | None]:
    """What is wrong with each kernel's result, or None."""
    target = GPUS["h100"] if where == INTERPRETER else target_of(device)
    wrong = {}
    for name, kernel in (kernels_of(operation, where) or {"no kernel": lambda *_: NotImplemented}).items():
        layout = layout_of(operation, scheme, name, target)
        given = partial(random_arguments, operation, *sizes, scheme=scheme, layout=layout, device=device)
        wrong[name] = _wrong(operation, given, kernel)
    return wrong


def may_refuse(operation: str, kernel: str) -> bool:
    """Whether another kernel steps in where this one does not take a problem; none reads layouts of the compiled ones' own."""
    return kernel == "cuda" and operation not in COMPILED_LAYOUTS


def _wrong(operation: str, given: Callable[[], tuple[Any, ...]], kernel: Callable[..., Any]) -> str | None:
    try:
        arguments = given()  # where a kernel has broken the context this fails, and all lines after it say so
        result = kernel(*arguments)
        if result is NotImplemented:
            return NOT_TAKEN
        assert_matches_reference(operation, arguments, result)
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
    for operation, scheme, sizes in problems():
        if only in operation:
            for name, reason in check(operation, scheme, sizes, device, target).items():
                if reason == NOT_TAKEN and may_refuse(operation, name):
                    continue
                wrong += reason is not None
                shown = f"{operation} {scheme or '-'} {'x'.join(map(str, sizes))} {name}"
                print(f"{shown}: {reason or 'good'}", flush=True)
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_command(main)
