"""What a smaller model loses: points on labelled texts that no method has seen, paired with the original's; or agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from qbert.compress.texts import Texts, agreement, outputs_of
from qbert.errors import QBertError
from qbert.evaluate import (
    Baseline,
    Dataset,
    EvalResult,
    Options,
    Task,
    TaskData,
    class_map,
    load_task,
    prepare_baseline,
    score,
)
from qbert.evaluate.datasets import split, text_key
from qbert.evaluate.encode import is_classifier
from qbert.evaluate.stats import bootstrap_mean

AGREEMENT = "agreement"  # what stands for a task where there are no labels
_SELECTED_BY = 2000  # labelled texts at most; an interval of 2,000 is about a point to each side
_SELECTION_SHARE = 3  # one in three of a task's training texts
_LEAST = 30  # texts to judge by
_POINTS = 100.0


class Change(BaseModel):
    """What became of a score.

    Attributes:
        on: task, or "agreement": 100 times the mean agreement with the original (see `report.Agreement`), which has 100 itself.
        n: texts.
        score: of the smaller model, 0 to 100.
        change: points against the original on the same texts; below 0 it is worse.
        interval: 95% of the change, paired.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    on: str
    n: int
    score: float
    change: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, result: EvalResult) -> Change:
        found = result.comparison
        assert found is not None
        low, high = found.drop_interval
        return cls(on=result.task, n=result.n, score=result.score, change=-found.drop, interval=(-high, -low))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.on} {self.change:+.1f} [{low:+.1f}, {high:+.1f}]"


class Judge(Protocol):
    """Says what a model has lost."""

    def __call__(self, model: nn.Module, tokenizer: Any) -> list[Change]: ...


@dataclass(frozen=True)
class Parts:
    """The texts of a search, no text in two of them.

    Attributes:
        texts: methods choose, refit and calibrate by them.
        labels: of a classifier, the model's own indexes of their classes; None where methods go by its predictions.
        selection: steps are kept or dropped by these; empty without a task.
        test: tasks whose test texts score the finished model, once.
        held_out: without a task, steps are kept or dropped by these.
        left_out: given texts that selection or test have too.
    """

    texts: list[str]
    labels: list[int] | None
    selection: list[TaskData]
    test: list[TaskData]
    held_out: list[str]
    left_out: int = 0

    @classmethod
    def of(
        cls, model: nn.Module, tasks: Sequence[str | Task | TaskData | Dataset], texts: Sequence[str] | None, seed: int
    ) -> Parts:
        """Splits what there is.

        Args:
            tasks: labelled; two thirds of the training texts of each are for the methods, a third judges the steps.
            texts: for the methods in place of those two thirds; without tasks one in four of them judges.

        Raises:
            QBertError: neither tasks nor texts, a task without training texts, or too few.
        """
        if not tasks:
            return cls._unlabelled(texts)
        loaded = [load_task(each) for each in tasks]
        parts = [_split(each, seed) for each in loaded]
        selection = [
            TaskData(each.name, each.kind, fit, select) for each, (fit, select) in zip(loaded, parts, strict=True)
        ]
        if texts is None:
            given = [text for fit, _ in parts for text in fit.texts]
            return cls(given, _labels(model, selection), selection, loaded, [])
        judged = {text_key(text) for each in loaded for text in each.test.texts}
        judged |= {text_key(text) for _, select in parts for text in select.texts}
        left = [text for text in texts if text_key(text) not in judged]
        return cls(left, None, selection, loaded, [], len(texts) - len(left))

    @classmethod
    def _unlabelled(cls, texts: Sequence[str] | None) -> Parts:
        if texts is None:
            raise QBertError(
                "nothing to search by; allowed: tasks (--task trec), labelled texts of yours (--data FILE), or texts (--texts)"
            )
        held_out = list(texts)[3::4]
        if len(held_out) < _LEAST:
            raise QBertError(f"{len(texts)} texts; a search needs {4 * _LEAST} or more, one in four judges the steps")
        rest = [text for place, text in enumerate(texts) if place % 4 != 3]
        return cls(rest, None, [], [], held_out)

    def judge(self, model: nn.Module, tokenizer: Any, pooling: str) -> Judge:
        """Of steps."""
        if not self.selection:
            return _ByAgreement(model, tokenizer, self.held_out, pooling)
        return _ByTasks.of(model, tokenizer, self.selection, pooling)

    def final_judge(self, model: nn.Module, tokenizer: Any, pooling: str) -> Judge:
        """Of the finished model, on test texts; probes are fitted on all training texts, as `qbert eval` does."""
        return _ByTasks.of(model, tokenizer, self.test, pooling)


def _split(task: TaskData, seed: int) -> tuple[Dataset, Dataset]:
    """Training texts -> those for the methods, those that judge."""
    count = min(_SELECTED_BY, len(task.train) // _SELECTION_SHARE)
    if count < _LEAST:
        raise QBertError(
            f"task {task.name!r} has {len(task.train)} training texts to search by; allowed: {_SELECTION_SHARE * _LEAST} or "
            f"more, of a classification task"
        )
    return split(task.train, count, seed)


def _labels(model: nn.Module, tasks: Sequence[TaskData]) -> list[int] | None:
    """The methods' labels, as the model counts its classes, where it is a classifier of the one task."""
    classes = class_map(model, tasks[0].label_names) if is_classifier(model) and len(tasks) == 1 else None
    return None if classes is None else [classes[label] for label in tasks[0].train.labels]


@dataclass(frozen=True)
class _ByTasks:
    baselines: list[Baseline]

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, tasks: Sequence[TaskData], pooling: str) -> _ByTasks:
        options = Options(pooling=pooling)
        return cls([prepare_baseline(model, tokenizer, each, options=options) for each in tasks])

    def __call__(self, model: nn.Module, tokenizer: Any) -> list[Change]:
        return [Change.of(score(model, tokenizer, each)) for each in self.baselines]


class _ByAgreement:
    def __init__(self, model: nn.Module, tokenizer: Any, texts: list[str], pooling: str) -> None:
        self._original, self._texts, self._pooling = model, texts, pooling
        self._before: Tensor = outputs_of(model, Texts.of(model, texts, tokenizer), pooling)

    def __call__(self, model: nn.Module, tokenizer: Any) -> list[Change]:
        after = outputs_of(model, Texts.of(model, self._texts, tokenizer), self._pooling)
        near = agreement(self._original, self._before, after).double()
        if not bool(torch.isfinite(near).all()):
            raise QBertError("the compressed model gives NaN or Inf")
        low, high = bootstrap_mean(near.numpy())
        mean, interval = float(near.mean()), (_POINTS * (low - 1), _POINTS * (high - 1))
        return [Change(on=AGREEMENT, n=len(near), score=_POINTS * mean, change=_POINTS * (mean - 1), interval=interval)]
