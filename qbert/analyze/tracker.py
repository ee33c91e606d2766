"""Knows, while a model runs, which component is running: hooks where one component enters another, a fused encoder's steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

from qbert.analyze.components import Component, component_of
from qbert.analyze.program import Running, called_modules, observed
from qbert.encoder import Step
from qbert.encoder.program import Slots

Boundary = Callable[["Running | None"], None]
OnStep = Callable[[Step, Slots], None]


def boundary_modules(model: nn.Module) -> list[tuple[str, nn.Module, Component]]:
    """The modules whose component is not that of the module around them; the model itself is the first.

    Only these need hooks: fewer hooks disturb a measurement less. Fused encoders allow none on modules that they do not call.
    """
    found = []
    for name, module in called_modules(model):
        component = component_of(name)
        if not name or component is not component_of(name.rpartition(".")[0]):
            found.append((name, module, component))
    return found


class ComponentTracker:
    """Context in which `running` is what runs, or None outside of the model.

    Args:
        model: what will be called inside the context.
        on_boundary: called with what ran until now, just before something else takes over.
        on_step: called before each step of a fused encoder, with the values that it reads.
    """

    def __init__(self, model: nn.Module, on_boundary: Boundary | None = None, on_step: OnStep | None = None) -> None:
        self._model = model
        self._on_boundary, self._on_step = on_boundary, on_step
        self._stack: list[Running] = []
        self._handles: list[RemovableHandle] = []
        self._observing = ExitStack()

    @property
    def running(self) -> Running | None:
        """What runs now."""
        return self._stack[-1] if self._stack else None

    @property
    def current(self) -> Component | None:
        """The component that runs now."""
        return self._stack[-1].component if self._stack else None

    def __enter__(self) -> Self:
        self._observing.enter_context(observed(self._model, self._begin, self._end))
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
        self._observing.close()
        self._stack.clear()

    def _entering(self, component: Component) -> Callable[[nn.Module, Any], None]:
        running = Running(component)

        def enter(module: nn.Module, args: Any) -> None:
            self._tell()
            self._stack.append(running)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._end()

    def _begin(self, running: Running, step: Step, slots: Slots) -> None:
        self._tell()
        self._stack.append(running)
        if self._on_step is not None:
            self._on_step(step, slots)

    def _end(self) -> None:
        self._tell()
        self._stack.pop()

    def _tell(self) -> None:
        if self._on_boundary is not None:
            self._on_boundary(self.running)
