"""Milliseconds of one product and of the two thin ones that may stand in its place, measured here with the kernels that run.

A product of rank r takes r (n + k) multiply-adds in place of n k, but two thin products fill the kernels' blocks less well,
and what is between them is rounded once more: below which rank the two are faster is measured, not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear as float_linear

from qbert.compress.latency import BLOCK, Load
from qbert.encoder import steps
from qbert.encoder.program import ONES, Slots, Step, codes_of, scales_of
from qbert.encoder.steps import BoundLinear, Label, Tokens
from qbert.formats import Role, get_scheme
from qbert.ops.abi import Activation
from qbert.ops.operations import Out
from qbert.ops.table import select_layout, tokens_at_once
from qbert.quantizers import quantize
from qbert.target import Target, target_of
from qbert.timing import medians
from qbert.weight import Weight

_ROUNDS = 15
_IN, _OUT = "in", "out"


class Shape(NamedTuple):
    """A linear's sides: (n, k)."""

    n: int
    k: int

    @property
    def ranks(self) -> list[int]:
        """Those that may pay, ascending: blocks of the kernels."""
        return [rank for rank in range(BLOCK, min(self), BLOCK) if self.saves(rank)]

    def saves(self, rank: int) -> bool:
        """Whether two products of a rank have fewer multiply-adds than the whole."""
        return rank * (self.n + self.k) < self.n * self.k


def products_ms(
    shape: Shape, ranks: Sequence[int], load: Load, device: torch.device, activation: str | None = None
) -> tuple[float, dict[int, float]]:
    """Milliseconds of a linear for a load's tokens, whole and at each rank, in turns.

    Args:
        activation: at its end, as a model's configuration names it; its result is codes then, as in a calibrated encoder.
    """
    with torch.inference_mode():
        make = _floats if load.linear is None else _quantized
        calls = {str(rank): make(shape, rank, load, device, activation) for rank in (0, *ranks)}
        ms = {name: 1e3 * seconds for name, seconds in medians(calls, device, _ROUNDS).items()}
    return ms["0"], _rising({rank: ms[str(rank)] for rank in ranks})


def _rising(ms: dict[int, float]) -> dict[int, float]:
    """Noise must not make less work look like more."""
    found, least = dict[int, float](), float("inf")
    for rank in sorted(ms, reverse=True):
        found[rank] = least = min(least, ms[rank])
    return dict(sorted(found.items()))


def _floats(shape: Shape, rank: int, load: Load, device: torch.device, activation: str | None) -> Callable[[], object]:
    """Of a float model, where both take the same activation, so it is left out."""
    x = torch.randn(load.batch * load.seq, shape.k, device=device)
    if not rank:
        whole = torch.randn(shape, device=device)
        return lambda: float_linear(x, whole)
    first, second = torch.randn(rank, shape.k, device=device), torch.randn(shape.n, rank, device=device)
    return lambda: float_linear(float_linear(x, first), second)


def _quantized(
    shape: Shape, rank: int, load: Load, device: torch.device, activation: str | None
) -> Callable[[], object]:
    """As a fused encoder runs them: codes come in, a few rows at a time, which stay in the cache."""
    target = target_of(device)
    done = Activation.NONE if activation is None else Activation.named(activation)
    out: Out = torch.float32 if activation is None else 1.0
    written = _steps(shape, rank, load, target, device, done, out)
    left, portions = load.batch * load.seq, []
    most = tokens_at_once(target) or left
    while left > 0:
        portions.append(_tokens(min(most, left), shape.k, device))
        left -= most
    return lambda: [_run(written, dict(portion)) for portion in portions]


def _steps(
    shape: Shape, rank: int, load: Load, target: Target, device: torch.device, done: Activation, out: Out
) -> list[Step]:
    label = Label("product", "ffn")
    if not rank:
        bound = BoundLinear(_weight(shape.n, shape.k, load, target, device), None, done, out)
        return [steps.linear(label, bound, Tokens(codes_of(_IN), ONES), _OUT, target)]
    first = BoundLinear(_weight(rank, shape.k, load, target, device), None, Activation.NONE, torch.float32)
    second = BoundLinear(_weight(shape.n, rank, load, target, device), None, done, out)
    return [
        steps.linear(label, first, Tokens(codes_of(_IN), ONES), "thin", target),
        steps.quantize("thin", "thin", rank, torch.float32, target),
        steps.linear(label, second, Tokens(codes_of("thin"), scales_of("thin")), _OUT, target),
    ]


def _weight(n: int, k: int, load: Load, target: Target, device: torch.device) -> Weight:
    assert load.linear is not None
    scheme = get_scheme(load.linear, Role.LINEAR)
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)).to(device) / k**0.5
    return quantize(values, scheme).to_layout(select_layout(scheme, Role.LINEAR, target))


def _tokens(count: int, k: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (count, k), dtype=torch.int8, generator=generator).to(device)
    return {codes_of(_IN): codes, ONES: torch.full((count,), 1e-3, device=device)}


def _run(written: Sequence[Step], slots: Slots) -> Tensor:
    for step in written:
        step.run(slots)
    return slots[_OUT]
