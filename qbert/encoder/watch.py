"""Has anybody touched what was prepared from a model's modules? Asked before every call, so it must cost microseconds."""

from __future__ import annotations

from collections.abc import Sized
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

_version = attrgetter("_version")


class Watch:
    """Remembers modules and tensors by where they stand, and tells whether they are still the same.

    A tensor counts as changed when another stands in its place (`.to()`, `load_state_dict` of a quantized module), when its
    data was swapped under it (`tensor.data = ...`, `.to()` of a parameter) or written to in place.

    Attributes:
        watched: the tensors.
    """

    def __init__(self) -> None:
        self.watched: list[Tensor] = []
        # Places: a dict of a module, a name in it, and what stood there. Columns, which are compared without a loop in Python.
        self._dicts: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._things: list[object] = []
        self._counted: list[Tensor] = []  # those that count writes, and how many there were
        self._versions: list[int] = []
        self._pointers: list[int] = []  # of `watched`
        self._sizes: list[tuple[Sized, int]] = []
        self._empty: list[Sized] = []
        self._attributes: list[dict[str, Any]] = []

    def module(self, base: nn.Module, path: str) -> nn.Module:
        """The module at an attribute path from `base`, watched at each step.

        Raises:
            AttributeError: there is none.
        """
        found = base
        for name in path.split("."):
            parent, found = found, found.get_submodule(name)
            self._place(parent._modules, name, found)
        return found

    def layers(self, base: nn.Module, path: str) -> int:
        """How many modules are in a list of them; more or fewer counts as changed."""
        found = self.module(base, path)
        assert isinstance(found, nn.ModuleList)
        self._sizes.append((found, len(found)))
        return len(found)

    def tensors(self, module: nn.Module) -> None:
        """A module's own parameters and buffers, as they are now."""
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for place in places:
            for name, tensor in place.items():
                self._place(place, name, tensor)
                if tensor is None or tensor.numel() == 0:
                    continue
                if not tensor.is_inference():  # those do not count writes, and cannot be written to outside
                    self._counted.append(tensor)
                    self._versions.append(tensor._version)
                self.watched.append(tensor)
                self._pointers.append(tensor.data_ptr())

    def calls(self, module: nn.Module) -> None:
        """A module's hooks and its `forward`: a fused encoder would not call them, so none may be added."""
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                self._sizes.append((hooks, len(hooks)))
            else:
                self._empty.append(hooks)
        self._attributes.append(module.__dict__)

    def unchanged(self) -> bool:
        """Whether everything still stands where it stood, as it was."""
        return (
            all(map(is_, map(dict.get, self._dicts, self._names), self._things))
            and list(map(_version, self._counted)) == self._versions
            and list(map(Tensor.data_ptr, self.watched)) == self._pointers
            and all(len(sized) == length for sized, length in self._sizes)
            and not any("forward" in attributes for attributes in self._attributes)
            and not any(self._empty)
        )

    def _place(self, place: dict[str, Any], name: str, thing: object) -> None:
        self._dicts.append(place)
        self._names.append(name)
        self._things.append(thing)
