"""Labelled texts: one dataclass, duplicates removed, and a split that depends on nothing but the texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from qbert.errors import QBertError

SPLIT_SEED = 0


@dataclass(frozen=True)
class Dataset:
    """Texts with a class each, or with a matrix of human similarities.

    Attributes:
        name: name of the task or of the user's file.
        texts: n texts, no two equal after `text_key`.
        labels: n indices into `label_names`; empty for a similarity set.
        label_names: the classes, in a fixed order.
        similarity: (n, n) float64, symmetric, 1 on the diagonal; None for a classification set.
        n_duplicates: texts dropped because the same text with the same label was there already.
        n_conflicts: texts dropped because the same text carries different labels.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...] = ()
    label_names: tuple[str, ...] = ()
    similarity: torch.Tensor | None = field(default=None, compare=False)
    n_duplicates: int = 0
    n_conflicts: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Dataset:
        """The texts at `indices`, in that order."""
        labels = tuple(self.labels[i] for i in indices) if self.labels else ()
        similarity = None if self.similarity is None else self.similarity[list(indices)][:, list(indices)]
        return replace(self, texts=tuple(self.texts[i] for i in indices), labels=labels, similarity=similarity)

    def sample(self, n: int, seed: int = SPLIT_SEED) -> Dataset:
        """`n` texts with the classes in proportion, the same ones every time; all of them if there are no more."""
        return self if n >= len(self) else self.take(stratified_indices(self, n, seed))

    def fingerprint(self) -> str:
        """SHA-256 in hex over texts, labels and similarities, in order: equal data, equal fingerprint."""
        digest = hashlib.sha256()
        for i, text in enumerate(self.texts):
            label = self.label_names[self.labels[i]] if self.labels else ""
            digest.update(f"{len(text)} {len(label)} {text}{label}".encode("utf-8", "surrogatepass"))
        if self.similarity is not None:
            digest.update(self.similarity.double().contiguous().numpy().tobytes())
        return digest.hexdigest()


def text_key(text: str) -> str:
    """What makes two texts the same: letters without case, words without spacing."""
    return " ".join(text.casefold().split())


def labelled_dataset(name: str, rows: Iterable[tuple[str, str]], label_names: Sequence[str] | None = None) -> Dataset:
    """Dataset of (text, label name) rows, in their order, each text once.

    A text found with two different labels is dropped altogether: neither label can be trusted, and left in it could
    stand in the training and in the test set.

    Args:
        label_names: the classes in order; by default the labels found, sorted.
    """
    rows = list(rows)
    found: dict[str, set[str]] = {}
    for text, label in rows:
        found.setdefault(text_key(text), set()).add(label)
    first = {text_key(text): (text, label) for text, label in reversed(rows)}
    kept = [first[key] for key, labels in found.items() if len(labels) == 1]
    n_conflicts = sum(len(found[text_key(text)]) > 1 for text, _ in rows)
    names = tuple(label_names) if label_names is not None else tuple(sorted({label for _, label in rows}))
    index = {label: i for i, label in enumerate(names)}
    return Dataset(
        name=name,
        texts=tuple(text for text, _ in kept),
        labels=tuple(index[label] for _, label in kept),
        label_names=names,
        n_duplicates=len(rows) - len(kept) - n_conflicts,
        n_conflicts=n_conflicts,
    )


def stratified_indices(dataset: Dataset, n: int, seed: int = SPLIT_SEED) -> list[int]:
    """Indices of `n` texts, classes in proportion (largest remainder), ordered by the hash of the text.

    The hash decides, not the place in the file: a reordered file, another Python or another torch give the same texts.

    Raises:
        QBertError: `n` is negative or more than there are.
    """
    if not 0 <= n <= len(dataset):
        raise QBertError(f"{dataset.name}: cannot take {n} texts, allowed are 0 to {len(dataset)}")
    ranks = [_rank(text, seed) for text in dataset.texts]
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(dataset)), key=ranks.__getitem__):
        groups.setdefault(dataset.labels[i] if dataset.labels else 0, []).append(i)
    chosen = [i for label, share in _shares(groups, n).items() for i in groups[label][:share]]
    return sorted(chosen, key=ranks.__getitem__)


def split(dataset: Dataset, n_test: int, seed: int = SPLIT_SEED) -> tuple[Dataset, Dataset]:
    """(train, test): disjoint, stratified, deterministic. `n_test` may be all: then train is empty."""
    test = stratified_indices(dataset, n_test, seed)
    held_out = set(test)
    train = [i for i in stratified_indices(dataset, len(dataset), seed) if i not in held_out]
    return dataset.take(train), dataset.take(test)


def _rank(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {text_key(text)}".encode("utf-8", "surrogatepass")).digest()


def _shares(groups: dict[int, list[int]], n: int) -> dict[int, int]:
    """How many of the n places each class gets, in proportion to its size; ties go to the lower label."""
    total = sum(map(len, groups.values()))
    labels = sorted(groups)
    shares = {label: n * len(groups[label]) // max(total, 1) for label in labels}
    by_remainder = sorted(labels, key=lambda label: (-(n * len(groups[label]) % max(total, 1)), label))
    for label in by_remainder[: n - sum(shares.values())]:
        shares[label] += 1
    return shares
