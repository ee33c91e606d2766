"""Score a model on a task, and against its float32 baseline on the same texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbert.errors import QBertError
from qbert.evaluate import stats
from qbert.evaluate.datasets import Dataset
from qbert.evaluate.encode import DEFAULT_BATCH_TOKENS, Encoded, Progress, encode_texts, is_classifier, unwrap
from qbert.evaluate.loading import load_fp32, own_tokenizer
from qbert.evaluate.probe import Probe, fit_probe
from qbert.evaluate.results import Comparison, EvalResult, Head
from qbert.evaluate.tasks import Task, TaskData, load_task
from qbert.zoo import resolve_model

PERCENT = 100.0
OTHER_CLASS = -1  # the model chose a class that the task does not have: wrong, whatever the label
_NO_TOKENIZER = "a model needs its tokenizer, and there is none beside it: pass tokenizer="
SIMILARITY_SAMPLE = 200  # test texts, from the front: 19,900 pairs (the split put the texts in the order of a hash)


@dataclass(frozen=True)
class Options:
    """How texts are encoded: the same for a baseline and for all that is compared with it. See `encode_texts`."""

    pooling: str = "mean"
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    max_length: int | None = None


@dataclass(frozen=True)
class Baseline:
    """Everything of a float32 model on a task that another model is compared with.

    Attributes:
        train_embeddings: (n_train, hidden) float32; None without a probe.
        embeddings: (n, hidden) float32 of the test texts, rows of length 1.
        probe: fitted on `train_embeddings`; None if the model has its own classifier, or for a similarity task.
        predictions: (n,) int64 indices into the task's labels; None for a similarity task.
        result: the baseline's own figures.
    """

    data: TaskData
    options: Options
    head: Head
    train_embeddings: torch.Tensor | None
    embeddings: torch.Tensor
    probe: Probe | None
    predictions: torch.Tensor | None
    result: EvalResult

    @property
    def score(self) -> float:
        """0 to 100."""
        return self.result.score


def prepare_baseline(
    model: nn.Module,
    tokenizer: Any,
    task: str | Task | TaskData | Dataset,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Baseline:
    """Encode a task's texts with the float32 model, and fit a probe if the model has no classifier for these labels.

    Args:
        progress: called with (texts done, texts in all), training texts included.

    Raises:
        QBertError: no training texts where a probe is needed, an embedding with NaN, or an argument out of range.
    """
    data, options = load_task(task), options or Options()
    if not len(data.test):
        raise QBertError(f"task {data.name!r} has no texts to score")
    head: Head = "similarity"
    if data.kind == "classification":
        head = "probe" if class_map(model, data.label_names) is None else "classifier"
    if head == "probe" and not len(data.train):
        raise QBertError(f"task {data.name!r}: no training texts, and the model has no classifier for its labels")
    train, probe = None, None
    n_train = len(data.train) if head == "probe" else 0
    total = n_train + len(data.test)
    if head == "probe":
        train = _encode(model, tokenizer, data.train, options, _shifted(progress, 0, total))
        probe = fit_probe(train.embeddings, torch.tensor(data.train.labels), len(data.label_names))
    encoded = _encode(model, tokenizer, data.test, options, _shifted(progress, n_train, total))
    predictions = _predict(model, encoded, data, probe)
    result = _result(data, head, encoded, predictions)
    if train is not None:
        result = result.model_copy(update={"n_train": n_train, "n_train_truncated": train.n_truncated})
    train_embeddings = None if train is None else train.embeddings
    return Baseline(data, options, head, train_embeddings, encoded.embeddings, probe, predictions, result)


def score(model: nn.Module, tokenizer: Any, baseline: Baseline, *, progress: Progress | None = None) -> EvalResult:
    """Score `model` on the baseline's test texts, with the baseline's head, and compare text by text.

    Raises:
        QBertError: the model's embeddings have another width, it lacks the classifier that the baseline has, or it
            gives NaN or Inf.
    """
    data = baseline.data
    if baseline.head == "classifier" and class_map(model, data.label_names) is None:
        raise QBertError(f"the baseline has a classifier for {', '.join(data.label_names)}; {_kind_of(model)} has none")
    encoded = _encode(model, tokenizer, data.test, baseline.options, progress)
    if encoded.embeddings.shape != baseline.embeddings.shape:
        found, expected = encoded.embeddings.shape[1], baseline.embeddings.shape[1]
        raise QBertError(f"embeddings have {found} columns, the baseline's have {expected}")
    predictions = _predict(model, encoded, data, baseline.probe)
    result = _result(data, baseline.head, encoded, predictions)
    return result.model_copy(
        update={
            "n_train": baseline.result.n_train,
            "n_train_truncated": baseline.result.n_train_truncated,
            "comparison": _compare(baseline, result.score, encoded.embeddings, predictions),
        }
    )


def evaluate(
    model: str | Path | nn.Module,
    task: str | Task | TaskData | Dataset,
    against: str | Path | nn.Module | None = None,
    *,
    load: Callable[[str], Any] = load_fp32,
    tokenizer: Any = None,
    against_tokenizer: Any = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Evaluate a model on a task, alone or against its float32 original.

    Args:
        model: a folder, alias, hub id, or a model at hand (then `tokenizer` is needed, unless `against` has one).
        against: the original. Its embeddings train the probe; None: the model's own do, and nothing is compared.
        load: how a path becomes a model, for both: e.g. qbert's loader, which takes quantized and plain folders.
        tokenizer: of `model`, by default the one beside it, else the original's. Both see the same texts, each in its own
            tokens: a model whose vocabulary was trimmed counts its words otherwise than the original.
        against_tokenizer: of `against`, by default the one beside it, else `model`'s.
        progress: called with (texts done, texts in all), for the baseline and then for the model.

    Raises:
        QBertError: no tokenizer, or only that of the other model, which has another vocabulary; else see `score`.
    """
    tokenizer = _beside(model) if tokenizer is None else tokenizer
    if against is None:
        if tokenizer is None:
            raise QBertError(_NO_TOKENIZER)
        return prepare_baseline(_loaded(model, load), tokenizer, task, options=options, progress=progress).result
    against_tokenizer = _beside(against) if against_tokenizer is None else against_tokenizer
    if tokenizer is None and against_tokenizer is None:
        raise QBertError(_NO_TOKENIZER)
    subject, original = _loaded(model, load), _loaded(against, load)
    if tokenizer is None or against_tokenizer is None:
        _check_shared(subject, original)
        tokenizer = against_tokenizer = against_tokenizer if tokenizer is None else tokenizer
    baseline = prepare_baseline(original, against_tokenizer, task, options=options, progress=progress)
    return score(subject, tokenizer, baseline, progress=progress)


def class_map(model: nn.Module, label_names: tuple[str, ...]) -> list[int] | None:
    """The model's class index for each of a task's labels; None if it is no classifier or lacks one of them.

    Names are compared without case. A model that kept transformers' default names (LABEL_0...) fits labels that are
    the numbers 0...n-1.
    """
    config: Any = unwrap(model).config
    if not is_classifier(model) or not label_names:
        return None
    index = {str(name).casefold(): int(i) for i, name in (config.id2label or {}).items()}
    if set(index) == {f"label_{i}" for i in range(len(index))}:
        index = {str(i): i for i in range(len(index))}
    wanted = [name.casefold() for name in label_names]
    return [index[name] for name in wanted] if all(name in index for name in wanted) else None


def _encode(model: nn.Module, tokenizer: Any, dataset: Dataset, options: Options, progress: Progress | None) -> Encoded:
    return encode_texts(
        model,
        tokenizer,
        dataset.texts,
        pooling=options.pooling,
        batch_tokens=options.batch_tokens,
        max_length=options.max_length,
        progress=progress,
    )


def _predict(model: nn.Module, encoded: Encoded, data: TaskData, probe: Probe | None) -> torch.Tensor | None:
    """(n,) int64 indices into the task's labels, or OTHER_CLASS; None for a similarity task."""
    if data.kind == "similarity":
        return None
    if probe is not None:
        return probe.predict(encoded.embeddings)
    classes = class_map(model, data.label_names)
    assert classes is not None
    assert encoded.logits is not None
    to_label = torch.full((encoded.logits.shape[1],), OTHER_CLASS)
    to_label[classes] = torch.arange(len(classes))
    return to_label[encoded.logits.argmax(dim=1)]


def _result(data: TaskData, head: Head, encoded: Encoded, predictions: torch.Tensor | None) -> EvalResult:
    n = len(data.test)
    if predictions is None:
        assert data.test.similarity is not None
        cosines = _cosines(encoded.embeddings)
        value = PERCENT * stats.pearson(stats.pairs(data.test.similarity), stats.pairs(cosines))
        low, high = stats.percentile_interval(stats.bootstrap_pairs(data.test.similarity, cosines))
    else:
        n_correct = int((predictions == torch.tensor(data.test.labels)).sum())
        value, (low, high) = PERCENT * n_correct / n, stats.wilson(n_correct, n)
    return EvalResult(
        task=data.name,
        kind=data.kind,
        metric=data.metric,
        head=head,
        n=n,
        data_sha256=data.test.fingerprint(),
        score=value,
        interval=(PERCENT * low, PERCENT * high),
        n_truncated=encoded.n_truncated,
        n_tokens=encoded.n_tokens,
        seconds=encoded.seconds,
        texts_per_second=n / encoded.seconds,
    )


def _compare(
    baseline: Baseline, model_score: float, embeddings: torch.Tensor, predictions: torch.Tensor | None
) -> Comparison:
    cosine = (embeddings.double() * baseline.embeddings.double()).sum(dim=1).clamp(-1.0, 1.0)
    flips = lost = won = p_value = None
    if predictions is None:
        low, high = _similarity_drop(baseline, embeddings)
    else:
        assert baseline.predictions is not None
        truth = torch.tensor(baseline.data.test.labels)
        was_right, is_right = baseline.predictions == truth, predictions == truth
        flips = int((predictions != baseline.predictions).sum())
        lost, won = int((was_right & ~is_right).sum()), int((~was_right & is_right).sum())
        p_value = stats.mcnemar_exact(lost, won)
        low, high = stats.paired_proportions(lost, won, len(truth))
    return Comparison(
        baseline_score=baseline.score,
        drop=baseline.score - model_score,
        drop_interval=(PERCENT * low, PERCENT * high),
        flips=flips,
        flips_to_wrong=lost,
        flips_to_right=won,
        mcnemar_p=p_value,
        cosine_mean=float(cosine.mean()),
        cosine_interval=stats.bootstrap_mean(cosine),
        cosine_min=float(cosine.min()),
        similarity_spearman=_similarity_spearman(baseline.embeddings, embeddings),
    )


def _similarity_drop(baseline: Baseline, embeddings: torch.Tensor) -> stats.Interval:
    """95% interval of the difference of two correlations with people, over the same draws of texts."""
    human = baseline.data.test.similarity
    before = stats.bootstrap_pairs(human, _cosines(baseline.embeddings))
    return stats.percentile_interval(before - stats.bootstrap_pairs(human, _cosines(embeddings)))


def _similarity_spearman(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """Do the same pairs of texts stay the closest? None if there are fewer than two pairs or all are equally close."""
    first = stats.pairs(_cosines(before[:SIMILARITY_SAMPLE]))
    second = stats.pairs(_cosines(after[:SIMILARITY_SAMPLE]))
    if len(first) < 2 or first.min() == first.max() or second.min() == second.max():
        return None
    return stats.spearman(first, second)


def _cosines(embeddings: torch.Tensor) -> torch.Tensor:
    """(n, hidden) unit rows -> (n, n) float64."""
    return embeddings.double() @ embeddings.double().T


def _beside(model: str | Path | nn.Module) -> Any:
    return own_tokenizer(resolve_model(model)) if isinstance(model, str | Path) else None


def _check_shared(model: nn.Module, original: nn.Module) -> None:
    """Holds two models to one vocabulary, where one tokenizer is there for both."""
    configs: list[Any] = [unwrap(model).config, unwrap(original).config]
    words, were = (getattr(config, "vocab_size", None) for config in configs)
    if words != were:
        raise QBertError(
            f"one tokenizer for two vocabularies: {words} words, the original's {were}; "
            f"save each model's beside it, or pass tokenizer= and against_tokenizer="
        )


def _loaded(model: str | Path | nn.Module, load: Callable[[str], Any]) -> nn.Module:
    return load(resolve_model(model)) if isinstance(model, str | Path) else model


def _shifted(progress: Progress | None, offset: int, total: int) -> Progress | None:
    """Progress of one of two parts -> progress of both."""
    return (lambda done, _part: progress(offset + done, total)) if progress else None


def _kind_of(model: nn.Module) -> str:
    return type(unwrap(model)).__name__
