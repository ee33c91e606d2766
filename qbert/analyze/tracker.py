"""Knows, while a model runs, which component is running: hooks where one component enters another."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from qbert.analyze.components import Component, component_of

Boundary = Callable[["Component | None"], None]


def boundary_modules(model: nn.Module) -> list[tuple[str, nn.Module, Component]]:
    """The modules whose component is not that of the module around them; the model itself is the first.

    Only these need hooks: fewer hooks disturb a measurement less.
    """
    found = []
    for name, module in model.named_modules():
        component = component_of(name)
        if not name or component is not component_of(name.rpartition(".")[0]):
            found.append((name, module, component))
    return found


class ComponentTracker:
    """Context in which `current` is the component that runs, or None outside of the model.

    Args:
        model: what will be called inside the context.
        on_boundary: called with the component that ran until now, just before another one takes over.
    """

    def __init__(self, model: nn.Module, on_boundary: Boundary | None = None) -> None:
        self._model = model
        self._on_boundary = on_boundary
        self._stack: list[Component] = []
        self._handles: list[RemovableHandle] = []

    @property
    def current(self) -> Component | None:
        """The component that runs now."""
        return self._stack[-1] if self._stack else None

    def __enter__(self) -> Self:
        for _, module, component in boundary_modules(self._model):
            self._handles.append(module.register_forward_pre_hook(self._entering(component)))
            # always_call: an error inside a module must not leave the stack one too high
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    def _entering(self, component: Component) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._tell()
            self._stack.append(component)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._tell()
        self._stack.pop()

    def _tell(self) -> None:
        if self._on_boundary is not None:
            self._on_boundary(self.current)
