"""A batch's way through an encoder layer by layer, so that each layer sees what the layers before it give now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.compress.texts import Texts
from qbert.shapes import Shaped


class _Arrived(Exception):
    """Raised where the first layer is called: what comes after is called from here."""


@dataclass
class _Batch:
    """What a layer is called with. `mask` (rows, width) says which tokens are not padding."""

    hidden: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]
    mask: Tensor


class Stream:
    """Texts on their way: before the first layer, then after each call of `advance` one further.

    Args:
        encoder: in evaluation mode.
    """

    @torch.no_grad()
    def __init__(self, encoder: Shaped, texts: Texts) -> None:
        self._encoder = encoder
        base, names = encoder.base, encoder.family.arguments
        self._batches = []
        for _, batch in texts.batches(next(base.parameters()).device):
            taken = {name: each for name, each in batch.items() if name in names}
            self._batches.append(self._at_first_layer(base, taken, batch["attention_mask"].bool()))

    def _at_first_layer(self, base: nn.Module, inputs: dict[str, Tensor], mask: Tensor) -> _Batch:
        caught: list[_Batch] = []

        def catch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(_Batch(args[0], args[1:], kwargs, mask))
            raise _Arrived

        handle = self._encoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            base(**inputs)
        except _Arrived:
            pass
        finally:
            handle.remove()
        return caught[0]

    @torch.no_grad()
    def watch(self, place: int, sites: dict[str, Callable[[Tensor], None]], *, advance: bool = False) -> None:
        """Calls the layer at that place and shows the inputs of some of its linears.

        Args:
            sites: path of a linear in the layer -> is given (tokens, k) without padding, batch after batch.
            advance: whether to go on through the layer.
        """
        layer = self._encoder.layers[place]
        for batch in self._batches:
            handles = [
                layer.get_submodule(path).register_forward_pre_hook(
                    lambda _m, given, show=show, mask=batch.mask: show(given[0][mask])
                )
                for path, show in sites.items()
            ]
            try:
                hidden = self._call(layer, batch)
                if advance:
                    batch.hidden = hidden
            finally:
                for handle in handles:
                    handle.remove()

    @torch.no_grad()
    def advance(self, place: int) -> None:
        """Goes through the layer at that place."""
        for batch in self._batches:
            batch.hidden = self._call(self._encoder.layers[place], batch)

    @staticmethod
    def _call(layer: nn.Module, batch: _Batch) -> Tensor:
        output = layer(batch.hidden, *batch.rest, **batch.named)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden
