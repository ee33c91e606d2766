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

from qbert.ops.abi import FLOAT_DTYPES, Activation
from qbert.ops.checks import MAX_K
from qbert.ops.operations import OPERATIONS, Operation, operation_of
from qbert.ops.table import run

__all__ = ["FLOAT_DTYPES", "MAX_K", "OPERATIONS", "Activation", "call", "checked_run", "run"]

_library = torch.library.Library("qbert", "DEF")


def call(a: Any) -> Any:
    """An operation through torch's dispatcher, from its record: traced, checked, on any device."""
    operation = operation_of(a)
    return getattr(torch.ops.qbert, operation.name)(*operation.flatten(a))


def checked_run(a: Any) -> Any:
    """Computes an operation, past torch's dispatcher; the record is checked."""
    a.check()
    return run(a)


def _implementation(operation: Operation) -> Callable[..., Any]:
    def implementation(*values: Any) -> Any:
        return checked_run(operation.bind(*values))

    return implementation


def _fake(operation: Operation) -> Callable[..., Any]:
    def fake(*values: Any) -> Any:
        a = operation.bind(*values)
        a.check()
        device = next(each for each in a if isinstance(each, Tensor)).device
        results = [torch.empty(tuple(like.shape), dtype=like.dtype, device=device) for like in a.results()]
        return results[0] if len(results) == 1 else tuple(results)

    return fake


def _register() -> None:
    for operation in OPERATIONS.values():
        _library.define(f"{operation.name}{operation.schema}")
        for key in ("CPU", "CUDA"):
            _library.impl(operation.name, _implementation(operation), key)
        torch.library.register_fake(f"qbert::{operation.name}", _fake(operation), lib=_library)


_register()
