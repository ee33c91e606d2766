"""Whether things are still what they were: objects by their identity, tensors by their bytes."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from operator import is_
from typing import Any

import torch
from torch import Tensor

from qbert.target import native_cpu

_cpu: Any = native_cpu()


def _same_places(dicts: list[dict[Any, Any]], names: list[Any], things: list[object]) -> bool:
    """Whether each dictionary holds that very thing under that name; None stands for no entry."""
    return all(map(is_, map(dict.get, dicts, names), things))


def _same_types(objects: Sequence[object], types: list[type]) -> bool:
    """Whether each object is of that very type."""
    return all(map(is_, map(type, objects), types))


def _same_lengths(things: list[Sized], lengths: list[int]) -> bool:
    """Whether each thing has that many in it."""
    return list(map(len, things)) == lengths


same_places = _same_places if _cpu is None else _cpu.same_places
same_types = _same_types if _cpu is None else _cpu.same_types
same_lengths = _same_lengths if _cpu is None else _cpu.same_lengths


class Bytes:
    """What dense tensors on the CPU hold now, to be compared with what they hold later.

    The tensors' memory is kept, also where other is put under a tensor later.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        pieces = [[each.data_ptr(), each.numel() * each.element_size()] for each in self._tensors]
        self._table = torch.tensor(pieces, dtype=torch.int64).reshape(-1, 2)
        self._address = self._table.data_ptr()
        self._held = self._read()

    def same(self) -> bool:
        """Whether not a byte is another one."""
        return self._read() == self._held

    def _read(self) -> object:
        if _cpu is not None:
            return _cpu.digest_of_pieces(self._address, len(self._tensors))
        return b"".join([each.reshape(-1).view(torch.uint8).numpy().data for each in self._tensors])
