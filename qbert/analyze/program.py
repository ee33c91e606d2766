"""Fused encoders under observation: which modules their forward still calls, and a word before and after each of their steps.

A fused forward calls operators, not modules, so hooks see nothing of it. Its program is data (`qbert.encoder.Program`): for the
time of an analysis the encoder runs a copy of it whose steps say that they begin and end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from qbert.analyze.components import Component, component_of_step
from qbert.encoder import FusedForward, Program, Step, encoders, fused_forward
from qbert.encoder.program import CU_SEQLENS, Slots

EMBEDDINGS = "embeddings"  # in place of a layer's name, as `Program.steps` has it


class StepName(NamedTuple):
    """A step of a model: its encoder (qualified, the class's name where that is the model itself), its layer, its own name."""

    encoder: str
    layer: str
    step: str


class Running(NamedTuple):
    """What runs: a component and, inside a fused encoder, its step."""

    component: Component
    step: StepName | None = None


Begin = Callable[[Running, Step, Slots], None]
End = Callable[[], None]


def fused_encoders(model: nn.Module) -> dict[str, FusedForward]:
    """The fused encoders of a model, by name as in `StepName`."""
    found = ((name or type(base).__name__, fused_forward(base)) for name, base, _ in encoders(model))
    return {name: fused for name, fused in found if fused is not None}


def called_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` less those in a fused encoder: of these its forward calls the pooler only."""
    silent: set[nn.Module] = set()
    for fused in fused_encoders(model).values():
        inside = fused.base.named_modules()
        silent.update(module for name, module in inside if not fused.family.called(name))
    yield from ((name, module) for name, module in model.named_modules() if module not in silent)


@contextmanager
def observed(model: nn.Module, begin: Begin, end: End) -> Iterator[None]:
    """Within the block every step of the model's fused encoders is framed by these two calls."""
    prepared = [(name, fused.encoder()) for name, fused in fused_encoders(model).items()]
    programs = [encoder.program for _, encoder in prepared]
    try:
        for name, encoder in prepared:
            encoder.program = _observed(encoder.program, name, begin, end)
        with whole_programs(model):
            yield
    finally:
        for (_, encoder), program in zip(prepared, programs, strict=True):
            encoder.program = program


def _observed(program: Program, encoder: str, begin: Begin, end: End) -> Program:
    def frame(layer: str, step: Step) -> Step:
        running = Running(component_of_step(step.name, step.part), StepName(encoder, layer, step.name))
        run = step.run

        def framed(slots: Slots) -> None:
            begin(running, step, slots)
            try:
                run(slots)
            finally:
                end()

        return replace(step, run=framed)

    def frames(layer: str, steps: Sequence[Step]) -> tuple[Step, ...]:
        return tuple(frame(layer, step) for step in steps)

    return replace(
        program,
        embedding=frames(EMBEDDINGS, program.embedding),
        embedding_of_rows=frames(EMBEDDINGS, program.embedding_of_rows),
        layers=tuple(replace(layer, steps=frames(layer.name, layer.steps)) for layer in program.layers),
    )


@contextmanager
def whole_programs(model: nn.Module) -> Iterator[None]:
    """Within the block fused encoders do what their programs print: compiled ones launch their steps one by one, for inside a
    CUDA graph nobody sees them, and those of classifiers compute all tokens in the last layer, too."""
    held = [(fused, fused.graphs, fused.every_token) for fused in fused_encoders(model).values()]
    try:
        for fused, _, _ in held:
            fused.graphs, fused.every_token = None, True
        yield
    finally:
        for fused, graphs, every_token in held:
            fused.graphs, fused.every_token = graphs, every_token


def lengths_in(slots: Slots, step: Step) -> list[int]:
    """Tokens of each sequence that a step is about to read; before the first layer, where none asks, all of them as one."""
    if CU_SEQLENS in slots:
        return [int(length) for length in slots[CU_SEQLENS].diff().tolist()]
    return [slots[step.reads[0]].shape[0]]
