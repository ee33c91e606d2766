"""L5. The instruction set as torch operators, ``torch.ops.qbert.*``: schema, fake, CPU and CUDA implementations.

The only caller of kernels and extensions. `define` + `impl` + `register_fake` because `custom_op` costs several times more a
call. Every implementation computes what `reference` defines. Rooms: `schemas` (signatures), `checks` (what arguments must
be), `fakes` (shapes and types only), `composed` (operations made of two others), `cpu_torch` (the best that torch offers, in
every layout), `triton` and `cuda` (kernels for GPUs).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from qbert.dispatch import COMPOSED, runs_compiled
from qbert.ops.checks import FLOAT_DTYPES, MAX_K
from qbert.ops.composed import COMPOSITIONS
from qbert.ops.cpu_torch import CPU_TORCH
from qbert.ops.cuda import KERNELS as COMPILED
from qbert.ops.fakes import FAKES
from qbert.ops.schemas import SCHEMAS
from qbert.ops.triton import TRITON
from qbert.reference import REFERENCES
from qbert.target import Target, native_cpu, target_of

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
    if operation in COMPOSED:
        return COMPOSITIONS[operation](*map(_cpu, COMPOSED[operation]))
    by_torch, native = CPU_TORCH[operation], NATIVE.get(operation)
    if native is None:
        return by_torch

    def implementation(*arguments: Any) -> Any:
        result = native(*arguments)
        return by_torch(*arguments) if result is NotImplemented else result

    return implementation


def _cuda(operation: str) -> Callable[..., Any]:
    """What runs on CUDA tensors: a kernel where one knows the layout, else the reference: exact, slow, and it says so."""
    reference, launcher = _logged_once(operation, reference_of(operation)), TRITON.get(operation)
    if operation in COMPOSED:
        launcher = COMPOSITIONS[operation](*map(_cuda, COMPOSED[operation]))
    compiled = COMPILED.get(operation)
    if launcher is None:
        return reference

    def implementation(*arguments: Any) -> Any:
        device = arguments[0].device
        if (
            device.index != torch.cuda.current_device()
        ):  # Triton launches on the current device, wherever its arguments are
            with torch.cuda.device(device):
                return implementation(*arguments)
        result = NotImplemented
        if compiled is not None and _runs_compiled(operation, arguments, target_of(device)):
            result = compiled(*arguments)
        if result is NotImplemented:
            result = launcher(*arguments)
        return reference(*arguments) if result is NotImplemented else result

    return implementation


def _runs_compiled(operation: str, arguments: tuple[Any, ...], target: Target) -> bool:
    """`runs_compiled` of the operator's arguments; n is 0 where there are no output channels, or the layout decides."""
    layout = arguments[-1] if isinstance(arguments[-1], str) else ""
    (t, k), n = arguments[0].shape, arguments[3].shape[0] if operation.startswith("w8a8") else 0
    return runs_compiled(operation, t, n, k, target, layout)


def _logged_once(operation: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The reference as a CUDA implementation; the log hears of it the first time."""

    @functools.cache
    def warn(layout: str) -> None:
        log.warning(
            "qbert::%s runs as the plain-torch reference on CUDA%s: exact, but slow",
            operation,
            layout and f" in {layout}",
        )

    @functools.wraps(implementation)
    def logged(*args: Any) -> Any:
        warn(args[-1] if isinstance(args[-1], str) else "")
        return implementation(*args)

    return logged


@functools.cache
def direct(device_type: str) -> SimpleNamespace:
    """All operators as attributes, called past torch's dispatcher where that is known to lead to one function.

    The dispatcher costs more than a small kernel: 7 us a call on a CPU, of which a fused BERT-base makes 85. Only for code
    that is neither traced nor differentiated.
    """
    implementation = {"cpu": _cpu, "cuda": _cuda}.get(device_type)
    if implementation is not None:
        return SimpleNamespace(**{operation: implementation(operation) for operation in SCHEMAS})
    return SimpleNamespace(**{operation: getattr(torch.ops.qbert, operation).default for operation in SCHEMAS})


def _register() -> None:
    for operation, schema in SCHEMAS.items():
        _library.define(f"{operation}{schema}")
        _library.impl(operation, _cpu(operation), "CPU")
        _library.impl(operation, _cuda(operation), "CUDA")
        torch.library.register_fake(f"qbert::{operation}", FAKES[operation], lib=_library)


_register()
