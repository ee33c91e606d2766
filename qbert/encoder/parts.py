"""What a family's program says about a layer without building it: its linears, its norms, its calibrated slots.

A layer's program is written once (`qbert.families`) and read by several: the builder makes steps of it, calibration asks which
slots need a scale and where a hook sees them, eligibility asks which modules must be what.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from qbert.families import EncoderFamily
from qbert.families.family import BiasOf, RotaryOf, WindowOf

QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Slot:
    """Where the values of a quantized slot pass in the unfused model.

    Attributes:
        path: of a linear, from the layer.
        side: whether they are its input or its output.
        activated: they are an activation's results, of which a few may outgrow all others.
        part: (which, of how many) equal parts of the channels they are.
        rotary: they are rotated before they are rounded; what the linear gives is not.
    """

    path: str
    side: Literal["input", "output"]
    activated: bool = False
    part: tuple[int, int] = (0, 1)
    rotary: RotaryOf | None = None


class Flow(NamedTuple):
    """Linears side by side, each from one slot to another.

    Attributes:
        parts: each gives so many times the channels of the slot that they fill: one product of queries, keys and values, the
            two halves of a gated one.
    """

    linears: tuple[str, ...]
    reads: str
    writes: str
    parts: int = 1


@dataclass
class LayerParts:
    """Paths from the layer, in the order of the program.

    Attributes:
        qkv: the linears that become one product.
        flow: of values, step by step.
        linears: all of them.
        norms: all that stand in the layer after one of its sums.
        next_norm: of a pre-norm layer, the path of its first norm, after the last sum of the layer before.
        slots: those that can have a static scale: name -> where it is seen.
        activations: names in the family's settings.
        bias, rotary, window: what attention has beside its heads.
    """

    qkv: tuple[str, ...] = ()
    flow: list[Flow] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    next_norm: str | None = None
    slots: dict[str, Slot] = field(default_factory=dict)
    activations: set[str] = field(default_factory=set)
    bias: BiasOf | None = None
    rotary: RotaryOf | None = None
    window: WindowOf | None = None
    _activated: set[str] = field(default_factory=set)
    _gated: set[str] = field(default_factory=set)

    def attention(
        self, *qkv: str, bias: BiasOf | None = None, rotary: RotaryOf | None = None, window: WindowOf | None = None
    ) -> None:
        self.qkv, self.bias, self.rotary, self.window = qkv, bias, rotary, window
        self.linears += qkv
        together = len(QKV) // len(qkv)
        self.flow.append(Flow(qkv, "hidden", "context", together))
        for index, name in enumerate(QKV):
            path, part = qkv[index // together], (index % together, together)
            self.slots[name] = Slot(path, "output", part=part, rotary=None if name == "value" else rotary)

    def linear(self, path: str, reads: str, writes: str, activation: str | None = None, gated: bool = False) -> None:
        self._read(path, reads, writes, 2 if gated else 1)
        if activation is not None:
            self.activations.add(activation)
            self._activated.add(writes)
        if gated:  # products have tails that no static scale covers (Yang et al., 2024): a scale for each token
            self._gated.add(writes)

    def linear_add_norm(self, linear: str, norm: str, reads: str) -> None:
        self._read(linear, reads, "hidden")
        self.norms.append(norm)

    def linear_add(self, linear: str, norm: str, reads: str) -> None:
        self.linear_add_norm(linear, norm, reads)

    def linear_add_last(self, linear: str, norm: str, reads: str) -> None:
        self._read(linear, reads, "hidden")
        self.next_norm = norm

    def _read(self, path: str, slot: str, writes: str, parts: int = 1) -> None:
        self.linears.append(path)
        self.flow.append(Flow((path,), slot, writes, parts))
        if slot != "hidden" and slot not in self._gated:
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
