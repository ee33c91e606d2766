"""What a layer's sums have become, beside the original's: what earlier layers have lost, and later ones can make up for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qbert.compress.removal import Drift, HeldOut, Sums
from qbert.compress.stream import Stream


class Followed:
    """A batch stream of the model as it becomes, and one of the original, side by side.

    Args:
        now, original: of the same texts.
    """

    def __init__(self, now: Stream, original: Stream) -> None:
        self.now, self._original = now, original
        self._sums: dict[str, list[Tensor]] = {}

    def look_at(self, place: int, norms: list[str]) -> None:
        """The original's sums in that layer, which those norms take, and on to the next."""
        self._sums = {norm: [] for norm in norms}
        self._original.watch(place, {norm: held.append for norm, held in self._sums.items()}, advance=True)

    def moments(self, place: int, linear: str, norm: str) -> tuple[Sums, Drift]:
        """Of a linear's inputs now, and how far its sum has drifted."""
        collected = _Crossed()
        self._watch(place, linear, norm, collected.add)
        return collected.inputs, collected.drift()

    def held_out(self, place: int, linear: str, norm: str) -> HeldOut:
        """All of them."""
        inputs, drifts = list[Tensor](), list[Tensor]()

        def add(given: Tensor, drift: Tensor) -> None:
            inputs.append(given.cpu())
            drifts.append(drift.cpu())

        self._watch(place, linear, norm, add)
        return HeldOut(torch.cat(inputs), torch.cat(drifts))

    def advance(self, place: int) -> None:
        """The model as it is now goes through the layer at that place."""
        self.now.advance(place)

    def _watch(self, place: int, linear: str, norm: str, add: Callable[[Tensor, Tensor], None]) -> None:
        """Calls `add` with a linear's inputs (tokens, k) and the drift (tokens, n) of its sum, batch after batch."""
        given: list[Tensor] = []
        wanted: Iterator[Tensor] = iter(self._sums[norm])
        self.now.watch(place, {linear: given.append, norm: lambda total: add(given.pop(), next(wanted) - total)})


class _Crossed:
    """Sums of inputs, of drifts and of their products."""

    def __init__(self) -> None:
        self.inputs: Sums = Sums.empty(0)
        self._drift = self._crossed = torch.zeros(0)

    def add(self, inputs: Tensor, drift: Tensor) -> None:
        if not self.inputs.tokens:
            self.inputs = Sums.empty(inputs.shape[1])
            self._drift = torch.zeros(drift.shape[1], dtype=torch.float64)
            self._crossed = torch.zeros(drift.shape[1], inputs.shape[1], dtype=torch.float64)
        self.inputs.add(inputs)
        assert self.inputs.shift is not None
        drift = drift.float().cpu()
        self._drift += drift.double().sum(0)
        self._crossed += (drift.T @ (inputs.float().cpu() - self.inputs.shift)).double()

    def drift(self) -> Drift:
        tokens = self.inputs.tokens
        mean = self._drift / tokens
        return Drift(mean, self._crossed / tokens - torch.outer(mean, self.inputs.first / tokens))
