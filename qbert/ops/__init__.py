"""The instruction set: seven operations as torch operators, ``torch.ops.qbert.*``, and the kernels that compute them.

The only caller of kernels and extensions. `operations` says what each operation takes, `reference` what it computes, `table`
which kernel runs; a room a backend holds the kernels: `cpu`, `triton`, `cuda`. `define` + `impl` + `register_fake` because
`custom_op` costs several times more a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.ops.abi import FLOAT_DTYPES, Activation, Keeps
from qbert.ops.checks import MAX_K
from qbert.ops.operations import OPERATIONS, Norm, Operation, operation_of
from qbert.ops.table import run
from qbert.weight import Weight

__all__ = ["FLOAT_DTYPES", "MAX_K", "OPERATIONS", "Activation", "Keeps", "call", "checked_run", "run"]

_library = torch.library.Library("qbert", "DEF")
_DEVICES = ("cpu", "cuda")  # with kernels


def call(a: Any) -> Any:
    """An operation from its record, checked, on any device: through torch's dispatcher where that has anything to do.

    It costs more than a small kernel, and without gradients, tracing or modes it only leads back here.
    """
    if type(a[0]) is Tensor and a[0].device.type in _DEVICES and not _watched():
        return checked_run(a)
    operation = operation_of(a)
    return getattr(torch.ops.qbert, operation.name)(*operation.flatten(a))


def _watched() -> bool:
    """Whether somebody follows what torch is told: gradients, a compiler, a tracer, a dispatch mode, a transform."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def checked_run(a: Any) -> Any:
    """Computes an operation, past torch's dispatcher; the record is checked."""
    _check_devices(a)
    a.check()
    return run(a)


def _check_devices(a: Any) -> None:
    """
    Raises:
        QBertError: tensors on several devices: a kernel would take an address of one for an address of another.
    """
    device = a[0].device
    for index, value in enumerate(a):
        for each in value[:2] if type(value) is Norm else (value,):
            held = each.qdata if type(each) is Weight else each
            if isinstance(held, Tensor) and held.device != device:
                name, first = a._fields[index], a._fields[0]
                raise QBertError(f"{operation_of(a).name}: {name} is on {held.device}, {first} is on {device}")


def _implementation(operation: Operation) -> Callable[..., Any]:
    def implementation(*values: Any) -> Any:
        return checked_run(operation.bind(*values))

    return implementation


def _fake(operation: Operation) -> Callable[..., Any]:
    def fake(*values: Any) -> Any:
        a = operation.bind(*values)
        _check_devices(a)
        a.check()
        device = next(each for each in a if isinstance(each, Tensor)).device
        results = [torch.empty(tuple(like.shape), dtype=like.dtype, device=device) for like in a.results()]
        return results[0] if len(results) == 1 else tuple(results)

    return fake


def _register() -> None:
    for operation in OPERATIONS.values():
        _library.define(f"{operation.name}{operation.schema}")
        for device in _DEVICES:
            _library.impl(operation.name, _implementation(operation), device.upper())
        torch.library.register_fake(f"qbert::{operation.name}", _fake(operation), lib=_library)


_register()
