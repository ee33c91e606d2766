"""What a family's program says about a layer without building it: its linears, its norms, its calibrated slots.

A layer's program is written once (`qbert.families`) and read by several: the builder makes steps of it, calibration asks which
slots need a scale and where a hook sees them, eligibility asks which modules must be what.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qbert.families import EncoderFamily


@dataclass(frozen=True)
class Slot:
    """Where the values of a quantized slot pass in the unfused model.

    Attributes:
        path: of a linear, from the layer.
        side: whether they are its input or its output.
        activated: they are an activation's results, of which a few may outgrow all others.
    """

    path: str
    side: Literal["input", "output"]
    activated: bool = False


@dataclass
class LayerParts:
    """Paths from the layer, in the order of the program.

    Attributes:
        together: the linears that become one product.
        flow: (linears, slot that they read, slot that they fill), step by step.
        linears, norms: all of them.
        slots: name -> where it is seen.
        activations: names in the family's settings.
    """

    together: tuple[str, ...] = ()
    flow: list[tuple[tuple[str, ...], str, str]] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    slots: dict[str, Slot] = field(default_factory=dict)
    activations: set[str] = field(default_factory=set)
    _activated: set[str] = field(default_factory=set)

    def attention(self, query: str, key: str, value: str) -> None:
        self.together = (query, key, value)
        self.linears += self.together
        self.flow.append((self.together, "hidden", "context"))
        for name, path in zip(("query", "key", "value"), self.together, strict=True):
            self.slots[name] = Slot(path, "output")

    def linear(self, path: str, reads: str, writes: str, activation: str | None = None) -> None:
        self._read(path, reads, writes)
        if activation is not None:
            self.activations.add(activation)
            self._activated.add(writes)

    def linear_add_norm(self, linear: str, norm: str, reads: str) -> None:
        self._read(linear, reads, "hidden")
        self.norms.append(norm)

    def _read(self, path: str, slot: str, writes: str) -> None:
        self.linears.append(path)
        self.flow.append(((path,), slot, writes))
        if slot != "hidden":
            self.slots[slot] = Slot(path, "input", slot in self._activated)


_known: dict[str, LayerParts] = {}


def parts_of(family: EncoderFamily) -> LayerParts:
    """What the program of the family's layers is made of."""
    found = _known.get(family.name)
    if found is None:
        found = LayerParts()
        family.program(found, family.layer)
        _known[family.name] = found
    return found
