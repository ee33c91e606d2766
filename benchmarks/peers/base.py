"""The one interface of everything that is timed: qbert's rows and its peers alike."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qbert.timing import Unavailable, one_line

Ids = NDArray[np.int64]  # (batch, width), a mask is of the same type
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """What one system is started with.

    Attributes:
        folder: the float32 model, for `from_pretrained`.
        work: where converted models are kept; made when needed.
        threads: all that it may compute with.
        options: of this row, from the table of rows.
        varying: whether the shapes will differ from call to call; otherwise a system may specialize to each batch's.
        calibration: token ids of sentences that are in no batch.
        texts: the same sentences, for systems that tokenize themselves.
        device: what the model runs on.
        padding: token id that padding has.
    """

    folder: Path
    work: Path
    threads: int
    options: dict[str, Any] = field(default_factory=dict)
    varying: bool = False
    calibration: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str, ...] = ()
    device: str = "cpu"
    padding: int = 0


@dataclass(frozen=True)
class Loaded:
    """Answer to `load`."""

    weight_bytes: int
    padding: str
    seconds: float


@dataclass(frozen=True)
class Bound:
    """Answer to `bind`: the first forward, which includes what it compiles, and its result."""

    seconds: float
    hidden: Floats


class Peer(ABC):
    """A system that runs the encoder. Calls come in the order prepare, load, then bind and forward again and again."""

    # What is computed on padding, in the words of the table.
    padding: ClassVar[str] = "computed and masked"
    # Imported at the start of its process, before memory is looked at.
    imports: ClassVar[tuple[str, ...]] = ()

    def __init__(self, job: Job) -> None:
        self.job = job

    def prepare(self) -> None:
        """What takes long and is done once: conversions, into `job.work`. Does nothing where they are there."""
        return None

    @abstractmethod
    def load(self) -> None:
        """Gets ready to run."""

    @abstractmethod
    def bind(self, ids: Ids, mask: Ids) -> None:
        """The batch of the following forwards, in the form that the system takes; none of this is timed."""

    @abstractmethod
    def forward(self) -> Any:
        """One forward: what is timed. Returns the system's own result, complete: nothing is left to compute."""

    @abstractmethod
    def hidden(self, result: Any) -> Floats:
        """(batch, width, hidden) float32 from what `forward` returned."""

    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of all weights, embeddings included, as the system stores them."""

    def notes(self) -> list[str]:
        """What a reader of the row should know, found out while loading."""
        return []


class TextPeer(Peer):
    """A system that takes texts and gives embeddings: a row of --sentences only."""

    @abstractmethod
    def encode(self, texts: Sequence[str], size: int) -> Floats:
        """(texts, hidden) in their order, from batches of `size`."""

    def bind(self, ids: Ids, mask: Ids) -> None:
        raise Unavailable("takes texts, not token ids")

    def forward(self) -> Any:
        raise Unavailable("takes texts, not token ids")

    def hidden(self, result: Any) -> Floats:
        raise Unavailable("gives embeddings only")


def library(name: str) -> Any:
    """Imports an optional library.

    Raises:
        Unavailable: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed: pip install --no-deps -r requirements-peers.txt") from None
    except (ImportError, OSError) as error:
        raise Unavailable(f"{name} cannot be imported: {one_line(error)}") from None
