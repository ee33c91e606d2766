"""L5. The instruction set as torch operators, ``torch.ops.qbert.*``: schema, fake, CPU and CUDA implementations.

The only caller of kernels and extensions. `define` + `impl` + `register_fake` because `custom_op` costs several times more a
call. Every implementation computes what `reference` defines. Rooms: `schemas` (signatures), `checks` (what arguments must
be), `fakes` (shapes and types only), `cpu_torch` (the best that torch offers, in every layout), `triton` (CUDA kernels).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from qbert.ops.checks import FLOAT_DTYPES, MAX_K
from qbert.ops.cpu_torch import CPU_TORCH
from qbert.ops.fakes import FAKES
from qbert.ops.schemas import SCHEMAS
from qbert.ops.triton import TRITON
from qbert.reference import REFERENCES
from qbert.target import native_cpu

__all__ = ["FLOAT_DTYPES", "MAX_K", "NATIVE", "SCHEMAS", "direct", "reference_of"]

log = logging.getLogger(__name__)
_library = torch.library.Library("qbert", "DEF")


def _native() -> dict[str, Callable[..., Any]]:
    """Operation -> an implementation of the native extension, with the operator's arguments.

    Where a layout is not its own it returns `NotImplemented`, and torch's implementation runs.
    """
    if native_cpu() is None:
        return {}
    from qbert.ops.cpu_native import NATIVE_LINEAR
    from qbert.ops.cpu_native_rows import NATIVE_ROWS
    from qbert.ops.cpu_native_weight_only import NATIVE_WEIGHT_ONLY

    return {**NATIVE_LINEAR, **NATIVE_ROWS, **NATIVE_WEIGHT_ONLY}


NATIVE = _native()


def reference_of(operation: str) -> Callable[..., Any]:
    """The reference with exactly the operator's arguments; tests and benchmarks compare with it."""
    return REFERENCES[operation]


def _cpu(operation: str) -> Callable[..., Any]:
    """What runs on CPU tensors: native code where it knows the layout, else torch."""
    by_torch, native = CPU_TORCH[operation], NATIVE.get(operation)
    if native is None:
        return by_torch

    def implementation(*arguments: Any) -> Any:
        result = native(*arguments)
        return by_torch(*arguments) if result is NotImplemented else result

    return implementation


def _cuda(operation: str) -> Callable[..., Any]:
    """What runs on CUDA tensors: a Triton kernel, or the reference where there is none yet."""
    return TRITON.get(operation) or _logged_once(operation, reference_of(operation))


def _logged_once(operation: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as a CUDA implementation: exact, slow, and it says so the first time."""

    @functools.cache
    def warn() -> None:
        log.warning(
            "qbert::%s runs as the plain-torch reference on CUDA in this version: exact, but not fast", operation
        )

    @functools.wraps(implementation)
    def logged(*args: Any) -> Any:
        warn()
        return implementation(*args)

    return logged


@functools.cache
def direct(device_type: str) -> SimpleNamespace:
    """All operators as attributes, called past torch's dispatcher where that is known to lead to one function.

    The dispatcher costs more than a small kernel: 7 us a call on a CPU, of which a fused BERT-base makes 85. Only for code
    that is neither traced nor differentiated.
    """
    if device_type == "cpu":
        return SimpleNamespace(**{operation: _cpu(operation) for operation in SCHEMAS})
    return SimpleNamespace(**{operation: getattr(torch.ops.qbert, operation).default for operation in SCHEMAS})


def _register() -> None:
    for operation, schema in SCHEMAS.items():
        _library.define(f"{operation}{schema}")
        _library.impl(operation, _cpu(operation), "CPU")
        _library.impl(operation, _cuda(operation), "CUDA")
        torch.library.register_fake(f"qbert::{operation}", FAKES[operation], lib=_library)


_register()
