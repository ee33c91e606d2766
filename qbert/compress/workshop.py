"""Builds and measures the models of a search: every recipe whole, calibrated and quantized as it would be used."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from qbert.compress.judge import Change, Judge, Parts
from qbert.compress.ladders import Goal
from qbert.compress.latency import Load, Table, measure_table, random_batch, require_fits
from qbert.compress.recipe import Compression
from qbert.compress.report import stored_bytes
from qbert.compress.steps import STEPS, Given, Progress, quantize_last
from qbert.encoder import encoders
from qbert.errors import QBertError
from qbert.shapes import ShapePlan, plan_of
from qbert.timing import Rules, measure, ratio

Fields = dict[str, Any]  # of `Compression`, those that are not None
PAYS = 1.02  # times less time or fewer bytes; less is not worth a change of the model
_ROUNDS = 9
_UNTIMED = ("vocabulary", "layers")  # steps that do not ask how long the finished model takes
_CACHED = 4  # float models on the way to finished ones


class Tried(BaseModel):
    """A model that was built and measured, or could not be.

    Attributes:
        step: what was new in it, such as "layers 5".
        fields: its recipe's.
        plan: what is left; None where there is no such model.
        speedup: times as fast as the float original, measured in turns.
        megabytes: of the tensors in its file.
        changes: on texts that no method has seen.
        kept: whether the search went on from it.
        why: it was kept or not.
        seconds: it took.
    """

    model_config = ConfigDict(extra="forbid")

    step: str
    fields: dict[str, Any]
    plan: ShapePlan | None = None
    speedup: float | None = None
    megabytes: float | None = None
    changes: list[Change] = []
    kept: bool = False
    why: str = ""
    seconds: float = 0.0

    @property
    def drop(self) -> float:
        """Points, on the task that loses most; below 0 all have gained."""
        return max((-each.change for each in self.changes), default=0.0)


def gain(before: Tried, after: Tried, goal: Goal) -> float:
    """How many times less time, or fewer bytes."""
    if goal == "latency":
        return (after.speedup or 0.0) / (before.speedup or 1.0)
    return (before.megabytes or 0.0) / (after.megabytes or 1.0)


def objection(before: Tried, after: Tried, goal: Goal, max_drop: float) -> str:
    """Why a step does not pay; empty where it does."""
    if after.drop > max_drop:
        return f"loses {after.drop:.2f} points, more than {max_drop:g}"
    saved = gain(before, after, goal)
    if saved < PAYS:
        what = "time" if goal == "latency" else "bytes"
        return f"does not pay: {100 * (1 - 1 / saved):+.1f}% of the {what} saved, less than {100 * (1 - 1 / PAYS):.0f}%"
    return ""


class Finished(NamedTuple):
    """A model as it would be used, and its tokenizer."""

    model: nn.Module
    tokenizer: Any


@dataclass
class Workshop:
    """A float model, texts, and what was made of them so far.

    Attributes:
        model, tokenizer: the original, left as they are.
        original_ms: milliseconds of its forward, float.
    """

    model: nn.Module
    tokenizer: Any
    parts: Parts
    batch: int
    seq: int
    pooling: str = "mean"
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        require_fits(next(base for _, base, _ in encoders(self.model)), Load(self.batch, self.seq, None))
        self._judge: Judge = self.parts.judge(self.model, self.tokenizer, self.pooling)
        self._tables: dict[str | None, Table] = {}
        self._floats: dict[str, Finished] = {}
        self._last: tuple[Fields, Finished] | None = None
        self._reference, self._reference_speedup = self._forward(self.model), 1.0
        self.original_ms = 0.0
        self.original = Tried(
            step="original", fields={}, plan=plan_of(self.model), speedup=1.0, megabytes=stored_bytes(self.model) / 1e6,
            kept=True, why="float, as it was given",
        )  # fmt: skip

    def tried(self, step: str, fields: Fields) -> Tried:
        """Builds and measures one; what a method refuses is the reason in it."""
        start = time.perf_counter()
        try:
            done = self.finished(fields)
            found = Tried(
                step=step, fields=fields, plan=plan_of(done.model), speedup=self._speedup(done.model),
                megabytes=stored_bytes(done.model) / 1e6, changes=self._judge(done.model, done.tokenizer),
            )  # fmt: skip
        except QBertError as error:
            found = Tried(step=step, fields=fields, why=str(error))
        return found.model_copy(update={"seconds": time.perf_counter() - start})

    def finished(self, fields: Fields) -> Finished:
        """The model of a recipe, a copy: all that is taken out first, then calibrated and quantized. The last one is held."""
        if self._last is not None and self._last[0] == fields:
            return self._last[1]
        recipe = Compression.of(**fields, batch=self.batch, seq=self.seq)
        made = copy.deepcopy(self._float(recipe))
        if recipe.scheme is not None:
            quantize_last(made.model, made.tokenizer, recipe.scheme, self.parts.texts)
        self._last = fields, made
        return made

    def measure_against(self, fields: Fields) -> None:
        """From now on times are taken in turns with this recipe's model, which is nearer to the others than the original."""
        model = self.finished(fields).model
        speedup = self._speedup(model)
        self._reference, self._reference_speedup = self._forward(model), speedup

    def _float(self, recipe: Compression) -> Finished:
        """After all steps but quantizing; what begins alike is made once."""
        made, key = Finished(self.model, self.tokenizer), ""
        for name, step in STEPS.items():
            value = recipe.step(name)
            if value is None:
                continue
            load = Load(self.batch, self.seq, recipe.word)
            key += f"{name}={value!r} {'' if name in _UNTIMED else load};"
            if key not in self._floats:
                made = copy.deepcopy(made)
                step(made.model, made.tokenizer, value, self._given(load, value))
                self._floats[key] = made
            made = self._floats[key] = self._floats.pop(key)  # the last one used is the last one to go
        while len(self._floats) > _CACHED:
            del self._floats[next(iter(self._floats))]
        return made

    def _given(self, load: Load, value: Any) -> Given:
        timed = isinstance(value, dict) and value.get("speedup") is not None
        return Given(
            self.parts.texts, self.parts.labels, self.pooling, load, self.seed, self._table(load) if timed else None
        )

    def _table(self, load: Load) -> Table:
        """Milliseconds of the original's layers, once: layers and words that are gone change none of another layer's."""
        if load.scheme not in self._tables:
            self._tables[load.scheme] = measure_table(self.model, load, self.seed)
        return self._tables[load.scheme]

    def _forward(self, model: nn.Module) -> Callable[[], object]:
        base: Any = next(base for _, base, _ in encoders(model))
        inputs = random_batch(model, self.batch, self.seq, self.seed)
        return lambda: base(**inputs)

    def _speedup(self, model: nn.Module) -> float:
        device = next(self.model.parameters()).device
        calls = {"reference": self._reference, "now": self._forward(model)}
        with torch.inference_mode():
            samples = measure(calls, device, Rules(0.0, 0.0, _ROUNDS, _ROUNDS))
        for name, reason in samples.failures.items():
            raise QBertError(f"{name} cannot be timed: {reason}")
        if not self.original_ms:
            self.original_ms = 1e3 * samples["reference"].median
        return self._reference_speedup * ratio(samples["reference"], samples["now"])
