"""A linear of low rank, as the two thin ones that it is the product of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FactoredLinear(nn.Module):
    """y = second(first(x)): a linear (n, k) of some rank as one to `rank` channels without a bias, and one back with it.

    Its parts are plain linears, which are quantized, saved and loaded like any other. Whoever asks it for what a linear has
    gets what the two say together.

    Args:
        first: (rank, k), without a bias.
        second: (n, rank).
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    @classmethod
    def empty(cls, linear: nn.Linear, rank: int) -> FactoredLinear:
        """In place of a linear: of its shape, type and device, values not set but for the bias, which it takes over."""
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        first = _unset(nn.Linear(linear.in_features, rank, bias=False, device="meta"), like)
        second = _unset(nn.Linear(rank, linear.out_features, bias=False, device="meta"), like)
        second.register_parameter("bias", linear.bias)
        made = cls(first, second)
        for each in (first.weight, second.weight):
            each.requires_grad_(linear.weight.requires_grad)
        made.train(linear.training)
        return made

    @property
    def in_features(self) -> int:
        """Channels that it takes."""
        return int(self.first.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Channels that it gives."""
        return int(self.second.out_features)  # type: ignore[arg-type]

    @property
    def rank(self) -> int:
        """Channels between its two products."""
        return int(self.second.in_features)  # type: ignore[arg-type]

    @property
    def bias(self) -> Tensor | None:
        """That of the second."""
        bias: Any = self.second.bias
        return bias

    @property
    def weight(self) -> Tensor:
        """(n, k), the product of both weights: a copy, made anew whenever somebody reads it."""
        second, first = (each.weight for each in products(self))
        return second @ first

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def _unset(linear: nn.Linear, like: dict[str, Any]) -> nn.Linear:
    """The linear with memory of a device and a type, and no values."""
    linear.weight = nn.Parameter(torch.empty(linear.weight.shape, **like))
    return linear


def products(linear: Any) -> tuple[Any, ...]:
    """The linears that stand for one: itself, or both parts of a factored one."""
    return (linear.first, linear.second) if isinstance(linear, FactoredLinear) else (linear,)
