"""L5. Operations that are two others one after the other wherever no kernel does both at once: `dispatch.COMPOSED`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_Implementation = Callable[..., Any]


def _w8a8_linear_add_norm(linear: _Implementation, add_norm: _Implementation) -> _Implementation:
    def composed(
        q: Tensor, s: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor,
        beta: Tensor, eps: float, layout: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        y = linear(q, s, qdata, scale, bias, "none", residual.dtype, layout)
        return add_norm(y, residual, gamma, beta, eps)

    return composed


# Operation -> its implementation, made of those of its parts.
COMPOSITIONS: dict[str, Callable[..., _Implementation]] = {"w8a8_linear_add_norm": _w8a8_linear_add_norm}
