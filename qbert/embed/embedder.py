"""Texts to vectors, the same bits whatever they are computed with: batches change neither order nor values of what is summed.

A text's tokens are pooled by themselves, unpadded, because torch's sum over a padded width depends on that width. What the
encoder gives is its own matter: a fused one gives a text the same bits in every batch, others may not (`Embedder.batch_bits`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qbert.calibrate import calibrate
from qbert.convert import quantize_
from qbert.embed.pipeline import Pipeline, pipeline_of
from qbert.encoder import Calibration
from qbert.errors import QBertError
from qbert.evaluate.encode import DEFAULT_BATCH_TOKENS, batches_by_length, checked_max_length, pad, tokenize
from qbert.evaluate.loading import load_tokenizer
from qbert.explain import explain
from qbert.modes import evaluation_mode
from qbert.modules import QuantizedModule
from qbert.recipe import in_words
from qbert.workflow import calibration_texts, load_any
from qbert.zoo import resolve_model, sha256_of_file

Vectors = NDArray[np.float32]
Progress = Callable[[int], None]  # texts that are done now
SAME_BITS = "the same bits in every batch"
_DECIDING = (".json", ".safetensors", ".txt", ".model")


@dataclass(frozen=True)
class Embedded:
    """What n texts became.

    Attributes:
        vectors: (n, dimension) float32.
        truncated: texts of which the model read only the beginning.
        lengths: (n,) tokens that were read of each, special ones included, padding not.
    """

    vectors: Vectors
    truncated: int
    lengths: NDArray[np.int64]

    @property
    def tokens(self) -> int:
        """That were read of all texts."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Embedder:
    """An encoder, its tokenizer, and what is done before and after it; `embedder_of` makes one.

    Attributes:
        max_length: tokens of a text that are read.
        batch_tokens: texts times longest text of a batch, at most; a single longer text is a batch of its own.
        made_of: what decides its vectors: digests of files and scales, names of schemes.
    """

    model: nn.Module
    tokenizer: Any
    pipeline: Pipeline
    max_length: int
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    made_of: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dimension(self) -> int:
        """Numbers of a vector."""
        config: Any = self._encoder.config
        return int(config.hidden_size)

    @property
    def batch_bits(self) -> str:
        """`SAME_BITS`, or why a text's last bits may depend on the texts that share its batch."""
        rows = explain(self.model).encoders
        unfused = [row for row in rows if row.fused == "no"]
        if rows and not unfused:
            return SAME_BITS
        reason = unfused[0].reason if unfused else "it has no encoder that could be"
        return f"last bits may depend on the batch: the encoder does not run fused ({reason})"

    def embed(self, texts: Sequence[str], progress: Progress | None = None, first: int = 0) -> Embedded:
        """Vectors of texts, in their order.

        Args:
            progress: called with the number of texts of each batch that is done.
            first: number of the first text, for the error.

        Raises:
            QBertError: a vector with NaN or Inf in it.
        """
        prefixed = [self.pipeline.prompt + text for text in texts]
        rows, truncated = tokenize(self.tokenizer, prefixed, self.max_length)
        lengths = [len(row["input_ids"]) for row in rows]
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        with evaluation_mode(self.model), torch.inference_mode():
            for batch in batches_by_length(lengths, self.batch_tokens):
                pooled = self._pooled([rows[index] for index in batch], [lengths[index] for index in batch])
                vectors[batch] = pooled.numpy()
                if progress:
                    progress(len(batch))
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise QBertError(f"the model gives NaN or Inf for {len(broken)} texts, row {first + broken[0]} for one")
        return Embedded(vectors, truncated, np.array(lengths, dtype=np.int64))

    @property
    def _encoder(self) -> nn.Module:
        """Without a head, whose answer nobody wants."""
        base: nn.Module = getattr(self.model, "base_model", self.model)
        return base

    def _pooled(self, rows: Sequence[dict[str, list[int]]], lengths: Sequence[int]) -> Tensor:
        """(texts, dimension) float32 on the CPU."""
        device = next((tensor.device for tensor in (*self.model.parameters(), *self.model.buffers())), None)
        inputs = {name: tensor.to(device) for name, tensor in pad(self.tokenizer, rows).items()}
        hidden = self._encoder(**inputs)[0]
        if self.pipeline.pooling == "cls":
            pooled = hidden[:, 0].float()
        else:
            pooled = torch.stack([hidden[row, :length].float().mean(0) for row, length in enumerate(lengths)])
        pooled = nn.functional.normalize(pooled, dim=1) if self.pipeline.normalize else pooled
        return pooled.cpu()


def embedder_of(
    model: str,
    *,
    scheme: str | None = None,
    calibrate_with: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> Embedder:
    """Loads a model for `Embedder.embed`.

    Args:
        model: local folder, hub id or alias; a checkpoint of qbert's, or a float model.
        scheme: what a float model is quantized to here, fused where it can be, as ``"w8a8"``; None leaves it as it is.
        calibrate_with: texts for static scales of a model that is quantized here, see `workflow.calibration_texts`.
        pooling, normalize, max_length, prompt: in place of what the model's files say, see `pipeline_of`.
        batch_tokens: see `Embedder`.

    Raises:
        QBertError: a model that cannot be loaded, is quantized already where a scheme is asked for, or says not how to pool.
    """
    if batch_tokens < 1:
        raise QBertError(f"batch_tokens {batch_tokens}; allowed: 1 or more")
    if calibrate_with is not None and scheme is None:
        raise QBertError("calibration is for a model that is quantized here; say which scheme, too (--scheme w8a8)")
    path = resolve_model(model)
    pipeline = pipeline_of(path, pooling=pooling, normalize=normalize, max_length=max_length, prompt=prompt)
    texts = None if calibrate_with is None else calibration_texts(calibrate_with)
    loaded, tokenizer = load_any(model), load_tokenizer(path)
    scales = None if scheme is None else _quantize(loaded, tokenizer, model, scheme, texts)
    limit = _max_length(loaded, tokenizer, pipeline.max_length, asked=max_length is not None)
    made_of = {"model": _digest(path), "scheme": scheme, "calibration": scales and _sha256(scales.to_dict())}
    return Embedder(loaded, tokenizer, pipeline, limit, batch_tokens, made_of)


def _quantize(
    model: nn.Module, tokenizer: Any, name: str, scheme: str, texts: Sequence[str] | None
) -> Calibration | None:
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise QBertError(f"{name!r} is quantized already; leave out --scheme")
    found = None if texts is None else calibrate(model, texts, tokenizer=tokenizer)
    quantize_(model, in_words(scheme, None), fuse=True, calibration=found)
    return found


def _max_length(model: nn.Module, tokenizer: Any, wanted: int | None, asked: bool) -> int:
    """What is asked for must fit; what files say is cut to what fits, as sentence-transformers does."""
    longest = checked_max_length(model, tokenizer)
    return checked_max_length(model, tokenizer, wanted if asked else min(longest, wanted or sys.maxsize))


def _digest(path: str) -> str:
    """Of what in a model's folder decides its vectors; of a hub id its name."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    files = sorted(file for file in folder.rglob("*") if file.suffix in _DECIDING)
    return _sha256({str(file.relative_to(folder)): sha256_of_file(file) for file in files})


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
