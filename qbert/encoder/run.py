"""Running a program: over portions of a batch that fit the cache, or as one, as a CUDA graph records it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from qbert.encoder.batch import Batch, Tokens
from qbert.encoder.build import build
from qbert.encoder.calibration import Calibration
from qbert.encoder.program import CU_SEQLENS, HIDDEN, ONES, Layer, Program, Slots, Step
from qbert.encoder.steps import IDS, POSITION_IDS, TOKEN_TYPE_IDS
from qbert.encoder.watch import Watch
from qbert.families import EncoderFamily
from qbert.ops.table import tokens_at_once
from qbert.target import target_of


class Encoder:
    """A program prepared from a model's modules, which hold the weights.

    Attributes:
        program: what runs.
        watch: whether the modules are still what it was prepared from.
    """

    def __init__(self, base: nn.Module, family: EncoderFamily, calibration: Calibration | None) -> None:
        self.watch = Watch()
        self.program: Program = build(self.watch, base, family, calibration)
        self.dtype, self.device = self.program.dtype, self.program.device
        self.residual, self.hidden_size = self.program.residual, self.program.hidden_size
        self.watch.made(self._bound())
        self._ones = torch.ones(0)

    def first_tokens(self, batch: Batch) -> Tensor:
        """The rows (sequences, h) of each sequence's first token of the residual stream after the last layer.

        The last layer computes them alone. They have the bits that `run` gives; no sequence may be empty.
        """
        layers = (*self.program.layers[:-1], self.program.last_of_first)
        parts = [
            self._through(tokens, batch.by_row, (), layers)[-1]
            for _, tokens in batch.portions(tokens_at_once(target_of(self.device)))
        ]
        return torch.cat([part for part in parts if part is not None])

    def run(self, batch: Batch, wanted: Collection[int]) -> list[Tensor | None]:
        """The residual stream (t, h) before the first layer (0) and after each (1 ...).

        Args:
            wanted: which of them to keep; the last is always kept, the others are None.
        """
        portions = batch.portions(tokens_at_once(target_of(self.device)))
        if len(portions) == 1:
            return self._through(batch.tokens, batch.by_row, wanted, self.program.layers)
        streams: list[Tensor | None] = []
        for span, tokens in portions:
            parts = self._through(tokens, batch.by_row, wanted, self.program.layers)
            streams = streams or [None if part is None else part.new_empty(batch.size, part.shape[1]) for part in parts]
            for stream, part in zip(streams, parts, strict=True):
                if stream is not None and part is not None:
                    stream[span] = part
        return streams

    def last_hidden(self, tokens: Tokens) -> Tensor:
        """The residual stream (t, h) after the last layer, from ids.

        Launches the same operators on the same addresses whatever the values are, as a CUDA graph needs it. Tokens after the
        last sequence's end belong to none: their rows are of no meaning, and no other row depends on them.
        """
        last = self._through(tokens, False, (), self.program.layers)[-1]
        assert last is not None
        return last

    def _through(
        self, tokens: Tokens, by_row: bool, wanted: Collection[int], layers: Sequence[Layer]
    ) -> list[Tensor | None]:
        slots: Slots = dict(zip((IDS, POSITION_IDS, TOKEN_TYPE_IDS, CU_SEQLENS), tokens, strict=True))
        execute(self.program.embedding_of_rows if by_row else self.program.embedding, slots)
        streams = [slots[HIDDEN] if 0 in wanted else None]
        slots[ONES] = self._one_each(slots[HIDDEN].shape[0])
        for index, layer in enumerate(layers, 1):
            execute(layer.steps, slots)
            streams.append(slots[HIDDEN] if index in wanted or index == len(layers) else None)
        return streams

    def _one_each(self, tokens: int) -> Tensor:
        """(tokens,) ones: token scales of codes whose static scale is in the weight's already."""
        if self.device.type != "cpu":
            # Kept from call to call, they could be read on another stream before they are written on this one.
            return torch.ones(tokens, device=self.device)
        ones = self._ones
        if ones.shape[0] < tokens:
            self._ones = ones = torch.ones(tokens, device=self.device)
        return ones[:tokens]

    def extra_bytes(self) -> int:
        """Memory that is held beside the modules' own tensors."""
        own = {tensor.untyped_storage().data_ptr() for tensor in self.watch.watched}
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self._bound()}
        return sum(nbytes for storage, nbytes in held.items() if storage not in own)

    def _bound(self) -> Iterator[Tensor]:
        """Tensors that the program computes with."""
        return _tensors_in([cell for step in self.program.every_step() for cell in _bound(step)])


def execute(steps: Sequence[Step], slots: Slots) -> None:
    """Runs steps one after the other on the values in `slots`."""
    for step in steps:
        step.run(slots)
        for slot in step.frees:
            del slots[slot]


def _bound(step: Step) -> list[object]:
    """What a step's function has bound."""
    return [cell.cell_contents for cell in step.run.__closure__ or ()]


def _tensors_in(thing: object) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from _tensors_in(each)
    elif isinstance(thing, dict):
        yield from _tensors_in(list(thing.values()))
    elif is_dataclass(thing) and not isinstance(thing, type):
        for field in fields(thing):
            yield from _tensors_in(getattr(thing, field.name))
