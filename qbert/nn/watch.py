"""L7. Has anybody touched what was prepared from a model's modules? Asked before every call, so it must cost microseconds."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import Tensor, nn


class Watch:
    """Remembers modules and tensors by where they stand, and tells whether they are still the same.

    A tensor counts as changed when another stands in its place (`.to()`, `load_state_dict` of a quantized module), when its
    data was swapped under it (`.to()` of a parameter) or written to in place.

    Attributes:
        watched: the tensors.
    """

    def __init__(self) -> None:
        self.watched: list[Tensor] = []
        self._places: list[tuple[dict[str, Any], str, object]] = []
        self._written: list[tuple[Tensor, int]] = []
        self._swapped: list[tuple[Tensor, int]] = []
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
            self._places.append((parent._modules, name, found))
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
                self._places.append((place, name, tensor))
                if tensor is None or tensor.numel() == 0:
                    continue
                if not tensor.is_inference():  # those do not count writes, and cannot be written to outside
                    self._written.append((tensor, tensor._version))
                if isinstance(tensor, nn.Parameter):
                    self._swapped.append((tensor, tensor.data_ptr()))
                self.watched.append(tensor)

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
        for place, name, thing in self._places:
            if place.get(name) is not thing:
                return False
        for tensor, version in self._written:
            if tensor._version != version:
                return False
        for tensor, pointer in self._swapped:
            if tensor.data_ptr() != pointer:
                return False
        for sized, length in self._sizes:
            if len(sized) != length:
                return False
        for attributes in self._attributes:
            if "forward" in attributes:
                return False
        return not any(self._empty)
