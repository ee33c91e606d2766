"""Run-time memory: which bytes are alive while a forward pass runs, from the storages of its tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qbert.analyze.components import Component
from qbert.analyze.tracker import ComponentTracker


@dataclass
class MemoryPeak:
    """Bytes of activations; weights and inputs are not among them.

    Scratch space that a kernel takes and gives back by itself is invisible to torch and not counted.

    Attributes:
        total: the most bytes alive at once.
        at_peak: who allocated them; adds up to `total`.
        while_running: the most bytes alive at once (of whomever) while this component allocated.
    """

    total: int = 0
    at_peak: Counter[Component] = field(default_factory=Counter)
    while_running: Counter[Component] = field(default_factory=Counter)


class _StorageTracker(TorchDispatchMode):
    """Follows every new storage until it is freed."""

    def __init__(self, tracker: ComponentTracker, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = MemoryPeak()
        self._tracker = tracker
        self._alive: Counter[Component] = Counter()
        self._followed = {tensor.untyped_storage()._cdata for tensor in known}
        self._finalizers: list[weakref.finalize[Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._followed:
            return
        component = self._tracker.current or Component.OTHER
        self._followed.add(key)
        # torch keeps one Python object for each storage for as long as the storage lives, so this fires when it dies
        self._finalizers.append(weakref.finalize(storage, self._freed, key, component, nbytes))
        self._alive[component] += nbytes
        alive = self._alive.total()
        self.peak.while_running[component] = max(self.peak.while_running[component], alive)
        if alive > self.peak.total:
            self.peak.total, self.peak.at_peak = alive, self._alive.copy()

    def _freed(self, key: int, component: Component, nbytes: int) -> None:
        self._followed.discard(key)
        self._alive[component] -= nbytes

    def stop(self) -> None:
        """Forget the storages that outlive the forward pass: its results."""
        for finalizer in self._finalizers:
            finalizer.detach()


def peak_memory(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> MemoryPeak:
    """Run `model(**inputs)` once without gradients and find the most bytes that its activations take.

    Works on the meta device too: sizes are real there, only the data is missing.
    """
    tracker = ComponentTracker(model)
    storages = _StorageTracker(tracker, [*model.parameters(), *model.buffers(), *inputs.values()])
    try:
        with torch.no_grad(), tracker, storages:
            model(**inputs)
    finally:
        storages.stop()
    return storages.peak
