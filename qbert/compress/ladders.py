"""Which values of a recipe's fields a search tries next: each field is a ladder of ever smaller models.

A new method is a row of `LADDERS`, beside its row of `steps.STEPS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qbert.recipe import NONE

Goal = Literal["latency", "size"]
GOALS: tuple[Goal, ...] = ("latency", "size")

_PRUNED_BY = 1.25  # at a time, where no speed-up is asked for that could be aimed at
_LEAST_PRUNING = 1.05  # what is between two values is halved until they are this near
_LEAST_TRIMMING = 0.87
_WORDS = 64  # vocabularies are multiples of it
# One that runs fused on integers each. For speed the first is as good as any where tokens are many (docs/cpu.md).
_FAST, _SMALL = ("w8a8", "w8a8+none"), ("w8a8", "w4a8+w4", "gobo3a8+gobo3")


@dataclass(frozen=True)
class Asked:
    """Where a search stands when it asks a ladder.

    Attributes:
        goal: what is to fall.
        layers, vocabulary: the original's.
        now: value of the ladder's field, None where it is not in the recipe.
        gap: how many times faster the model is to become still; None where nothing is asked for.
        refused: values that lost too much, or did not pay.
        quantize: schemes in place of the usual ones.
    """

    goal: Goal
    layers: int
    vocabulary: int
    now: Any
    gap: float | None
    refused: Sequence[Any]
    quantize: Sequence[str] | None


@dataclass(frozen=True)
class Ladder:
    """A field, and what it tries.

    Attributes:
        field: of `Compression`.
        next: the value to try, None where there is none left.
        pays_in: "latency" or "size" where it always does, whatever the goal is.
        short: how the report writes a value.
    """

    field: str
    next: Callable[[Asked], Any]
    pays_in: Goal | None = None
    short: Callable[[Any], str] = str


def _schemes(asked: Asked) -> str | None:
    usual = _FAST if asked.goal == "latency" else (*_SMALL, _FAST[1])
    chain = list(usual if asked.quantize is None else asked.quantize)
    if asked.now is None:
        return next((each for each in chain if each != NONE and each not in asked.refused), None)
    if asked.goal == "latency" or asked.now not in chain:
        return None
    following = chain[chain.index(asked.now) + 1 :][:1]
    return next((each for each in following if each in _SMALL and each not in asked.refused), None)


def _fewer_layers(asked: Asked) -> int | None:
    count = (asked.now or asked.layers) - 1
    return count if count >= 1 and count not in asked.refused else None


def _fewer_words(asked: Asked) -> int | None:
    now = asked.now or asked.vocabulary
    most = max((each for each in asked.refused if each < now), default=None)
    wanted = now / 2 if most is None else math.sqrt(now * most)
    size = max(_WORDS, round(wanted / _WORDS) * _WORDS)
    return size if size <= _LEAST_TRIMMING * now and size not in asked.refused else None


def _narrower(asked: Asked) -> dict[str, float] | None:
    """Of the model with the layers that are left: the whole gap at once, and half of it where that is too much."""
    now = _times(asked.now)
    least = min((times for times in map(_times, asked.refused) if times > now), default=None)
    wanted = now * (_PRUNED_BY if asked.gap is None else max(asked.gap, _LEAST_PRUNING))
    if least is not None and wanted >= 0.999 * least:
        wanted = math.sqrt(now * least)
    if wanted < _LEAST_PRUNING * now:
        return None
    times = round(wanted, 3)
    return {"speedup": times} if asked.goal == "latency" else {"macs": round(1 / times, 4)}


def _thinner(asked: Asked) -> str | None:
    """Low rank where it pays, which the method itself measures, linear by linear."""
    return "auto" if asked.now is None and "auto" not in asked.refused else None


def _times(value: dict[str, float] | None) -> float:
    """How many times less work a value of the field `prune` is."""
    if value is None:
        return 1.0
    return value["speedup"] if "speedup" in value else 1 / value["macs"]


def _pruned(value: dict[str, float]) -> str:
    return f"x{value['speedup']:g}" if "speedup" in value else f"to {100 * value['macs']:.0f}% of the work"


LADDERS: dict[str, Ladder] = {
    ladder.field: ladder
    for ladder in (
        Ladder("quantize", _schemes),
        Ladder("vocabulary", _fewer_words, "size", lambda value: f"{value:,}"),
        Ladder("layers", _fewer_layers),
        Ladder("prune", _narrower, None, _pruned),
        Ladder("rank", _thinner),
    )
}
# What competes stands together: after each step that was kept, all of a group are tried again. By goal, in this order.
GROUPS: dict[Goal, tuple[tuple[str, ...], ...]] = {
    "latency": (("quantize",), ("layers", "prune"), ("rank",), ("vocabulary",)),
    "size": (("quantize",), ("vocabulary",), ("layers", "prune"), ("rank",)),
}
# A vocabulary that fits the texts at hand saves no time, and other texts lose by it: for speed alone it is not touched.
USUAL: dict[Goal, tuple[str, ...]] = {
    "latency": ("quantize", "layers", "prune", "rank"),
    "size": ("quantize", "vocabulary", "layers", "prune", "rank"),
}


def in_words(fields: Mapping[str, Any]) -> str:
    """A recipe's fields in a line."""
    return ", ".join(f"{name} {LADDERS[name].short(value)}" for name, value in fields.items())
