"""sentence-transformers: `SentenceTransformer.encode`, with its own tokenization, sorting and pooling; for --sentences only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from qbert.timing import Unavailable

from .base import Floats, TextPeer, library
from .qbert_peer import QBertFused


class SentenceTransformers(TextPeer):
    """Options: `dtype`."""

    imports: ClassVar[tuple[str, ...]] = ("transformers.modeling_utils",)

    def __init__(self, job: Any) -> None:
        super().__init__(job)
        self._model: Any = None

    def prepare(self) -> None:
        library("sentence_transformers")
        if not any(self.job.folder.glob("tokenizer*")):  # it would wait for the hub
            raise Unavailable("the model has no tokenizer")

    def load(self) -> None:
        kind = library("sentence_transformers").SentenceTransformer
        dtype = getattr(torch, self.job.options.get("dtype", "float32"))
        self._model = kind(str(self.job.folder), device="cpu", model_kwargs={"dtype": dtype}).eval()

    def encode(self, texts: Sequence[str], size: int) -> Floats:
        vectors = self._model.encode(list(texts), batch_size=size, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(vectors, dtype=np.float32)

    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self._model.parameters())


class QBertSentences(SentenceTransformers):
    """The same with its encoder quantized and fused. Options: those of `QBert`."""

    padding: ClassVar[str] = QBertFused.padding

    def __init__(self, job: Any) -> None:
        super().__init__(job)
        self._quantized = QBertFused(job)

    def prepare(self) -> None:
        super().prepare()
        self._quantized.prepare()

    def load(self) -> None:
        super().load()
        base = library("transformers").PreTrainedModel
        encoder = next(each for each in self._model.modules() if isinstance(each, base))
        self._quantized.model = self._quantized.converted(encoder)

    def weight_bytes(self) -> int:
        return self._quantized.weight_bytes()

    def notes(self) -> list[str]:
        return self._quantized.notes()
