"""Every GPU kernel once, on small uneven problems, against its reference: short enough for compute-sanitizer.

    python tests/kernels/every_kernel.py                          on this machine's GPU
    compute-sanitizer --tool memcheck python tests/kernels/every_kernel.py
    TRITON_INTERPRET=1 python tests/kernels/every_kernel.py       in Triton's interpreter, on the CPU

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of its own, so that memcheck sees a step beyond it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qbert.dispatch import OPERATIONS, select_layout
from qbert.formats import SCHEMES, Role
from qbert.layout import Layout
from qbert.ops.triton import TRITON
from qbert.ops.triton.launch import INTERPRETED
from qbert.reference import FLOAT_TABLE
from qbert.target import Target
from qbert.testing import assert_matches_reference, random_arguments, schemes_of

_H100 = Target("cuda", "", 90, 132, 232_448)
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter cuts float32 off instead of rounding it to bfloat16.
FLOAT = torch.float16 if INTERPRETED else torch.bfloat16
# tokens, output channels, input channels: few and more tokens, none a multiple of a tile; a row that TMA cannot take
LINEARS = ((3, 40, 128), (67, 136, 192), (5, 24, 130))
GROUPED = ((3, 40, 128), (67, 136, 256))
ROWS = ((7, 19, 384), (3, 11, 130))
ATTENTION = ((70, 2, 64), (33, 3, 32))


def problems() -> Iterator[tuple[str, tuple[int, int, int], dict[str, Any]]]:
    """Operation, shape, and the further arguments of `random_arguments`."""
    for operation in OPERATIONS:
        if operation.startswith("attention"):
            for shape in ATTENTION:
                for per_token in (False, True):
                    yield operation, shape, {"per_token": per_token, "dtype": FLOAT}
        elif "linear" in operation:
            yield from _linears(operation)
        else:
            yield from _rows(operation)


def _rows(operation: str) -> Iterator[tuple[str, tuple[int, int, int], dict[str, Any]]]:
    schemes: list[str | None] = [*schemes_of(operation)] or [None]
    if operation == "embed_layer_norm_quantize":
        schemes.append(FLOAT_TABLE)
    for scheme in schemes:
        grouped = scheme is not None and scheme != FLOAT_TABLE and SCHEMES[scheme].group_size
        for shape in ROWS[:1] if grouped else ROWS:
            yield operation, shape, {"dtype": FLOAT, **({"scheme": scheme} if scheme else {})}


def _linears(operation: str) -> Iterator[tuple[str, tuple[int, int, int], dict[str, Any]]]:
    for name in schemes_of(operation):
        scheme = SCHEMES[name]
        layout = select_layout(scheme, Role.LINEAR, _H100)
        for shape in GROUPED if scheme.group_size else LINEARS:
            yield operation, shape, {"scheme": name, "layout": layout, "activation": "gelu", "dtype": FLOAT}


def run(operation: str, shape: tuple[int, int, int], extra: dict[str, Any]) -> None:
    """One problem.

    Raises:
        AssertionError: the result is not the reference's, or no kernel takes the layout.
    """
    kernel: Callable[..., Any] = TRITON[operation]
    arguments = random_arguments(operation, *shape, **extra, device=DEVICE)
    result = kernel(*arguments)
    assert result is not NotImplemented, f"no kernel reads {extra.get('layout', Layout.PLAIN)}"
    assert_matches_reference(operation, arguments, result)


def main() -> int:
    failures = 0
    for operation, shape, extra in problems():
        begin = time.perf_counter()
        try:
            run(operation, shape, extra)
            verdict = "ok"
        except Exception as error:
            failures += 1
            verdict = f"FAILED: {type(error).__name__}: {error}"
        shown = " ".join(f"{name}={value}" for name, value in extra.items())
        print(f"{operation} {shape} {shown}: {verdict} ({time.perf_counter() - begin:.1f} s)", flush=True)
    print(f"{failures} failures")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
