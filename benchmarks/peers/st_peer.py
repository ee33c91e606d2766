"""sentence-transformers: `SentenceTransformer.encode`, with its own tokenization, sorting and pooling; for --sentences only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from qbert.timing import Unavailable

from .base import Floats, TextPeer, library


class SentenceTransformers(TextPeer):
    """Options: `dtype`."""

    imports: ClassVar[tuple[str, ...]] = ("transformers.models.bert.modeling_bert",)

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
