"""Texts -> one unit vector each (and logits, where the model is a classifier), in length-sorted batches."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qbert.errors import QBertError
from qbert.families.positions import longest
from qbert.modes import evaluation_mode

Progress = Callable[[int, int], None]  # (done, total)

POOLINGS = ("mean", "cls")
DEFAULT_BATCH_TOKENS = 4096  # padded tokens of a batch: 8 texts of 512, 128 texts of 32
MIN_MAX_LENGTH = 3  # [CLS], one token, [SEP]
CLASSIFIER_SUFFIX = "ForSequenceClassification"


@dataclass(frozen=True)
class Encoded:
    """What a model makes of n texts, in their order.

    Attributes:
        embeddings: (n, hidden) float32 on the CPU, rows of Euclidean length 1.
        logits: (n, classes) float32 on the CPU if the model is a sequence classifier, else None.
        n_truncated: texts longer than the maximum, of which the model saw only the beginning.
        n_tokens: tokens the model saw, without padding.
        seconds: spent in forward passes and pooling, without tokenization; includes whatever a first call compiles.
    """

    embeddings: torch.Tensor
    logits: torch.Tensor | None
    n_truncated: int
    n_tokens: int
    seconds: float


def encode(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pooling: str = "mean",
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """(n, hidden) float32 sentence embeddings of unit length; warns if a text had to be cut. See `encode_texts`."""
    encoded = encode_texts(
        model, tokenizer, texts, pooling=pooling, batch_tokens=batch_tokens, max_length=max_length, progress=progress
    )
    if encoded.n_truncated:
        warnings.warn(f"{encoded.n_truncated} of {len(texts)} texts were longer than the model takes", stacklevel=2)
    return encoded.embeddings


def encode_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pooling: str = "mean",
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Encoded:
    """Run the encoder over `texts` and pool its last hidden states.

    Args:
        model: a transformers encoder, or one with a head on it; a `...ForSequenceClassification` also gives logits.
            It is run in evaluation mode, on the device it is on, and left in the mode it had.
        pooling: `mean` over the tokens that are not padding, or `cls`, the first token.
        batch_tokens: upper bound of texts x longest text of a batch; a single longer text is a batch of its own.
        max_length: tokens a text may have; by default, and at most, what the model takes.
        progress: called with (texts done, texts in all) after each batch.

    Raises:
        QBertError: an argument out of range, or an embedding with NaN or Inf in it.
    """
    if pooling not in POOLINGS:
        raise QBertError(f"pooling {pooling!r}: allowed are {', '.join(POOLINGS)}")
    if batch_tokens < 1:
        raise QBertError(f"batch_tokens {batch_tokens}: must be at least 1")
    inputs, n_truncated = tokenize(tokenizer, texts, checked_max_length(model, tokenizer, max_length))
    lengths = [len(row["input_ids"]) for row in inputs]
    vectors: list[torch.Tensor | None] = [None] * len(texts)
    logits: list[torch.Tensor | None] = [None] * len(texts)
    seconds, done = 0.0, 0
    with evaluation_mode(model), torch.inference_mode():
        for batch in batches_by_length(lengths, batch_tokens):
            tensors = pad(tokenizer, [inputs[i] for i in batch])
            start = time.perf_counter()
            pooled, scores = _forward(model, tensors, pooling)
            seconds += time.perf_counter() - start
            for row, i in enumerate(batch):
                vectors[i] = pooled[row]
                logits[i] = None if scores is None else scores[row]
            done += len(batch)
            if progress:
                progress(done, len(texts))
    return Encoded(_unit_rows(vectors, model), _stacked(logits), n_truncated, sum(lengths), seconds)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)


def is_classifier(model: nn.Module) -> bool:
    """Whether the model is a transformers sequence classifier with its own logits."""
    return type(unwrap(model)).__name__.endswith(CLASSIFIER_SUFFIX)


def checked_max_length(model: nn.Module, tokenizer: Any, wanted: int | None = None) -> int:
    """Tokens a text may have: the smaller of the position table and the tokenizer's limit, or `wanted` if that fits."""
    limit = min(int(tokenizer.model_max_length), longest(model.config) or sys.maxsize)
    if wanted is not None and not MIN_MAX_LENGTH <= wanted <= limit:
        raise QBertError(f"max_length {wanted}: allowed are {MIN_MAX_LENGTH} to {limit} for this model")
    return limit if wanted is None else wanted


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices grouped so that texts of like length share a batch, longest first, padding within `batch_tokens`."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(lengths[order[start]], 1))
        yield order[start : start + size]
        start += size


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[list[dict[str, list[int]]], int]:
    """One dict a text, and how many texts had to be cut. Cutting keeps the special tokens."""
    if not texts:
        return [], 0
    whole = tokenizer(list(texts), truncation=False, return_attention_mask=True, verbose=False)
    rows = [{key: whole[key][i] for key in whole} for i in range(len(texts))]
    too_long = [i for i, row in enumerate(rows) if len(row["input_ids"]) > max_length]
    for i in too_long:
        rows[i] = dict(tokenizer(texts[i], truncation=True, max_length=max_length, return_attention_mask=True))
    return rows, len(too_long)


def pad(tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of token ids, masks and types -> int64 tensors (rows, longest), padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    filler = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": tokenizer.pad_token_type_id}
    return {
        key: torch.tensor([row[key] + [filler.get(key, 0)] * (longest - len(row[key])) for row in rows])
        for key in rows[0]
    }


def _forward(
    model: nn.Module, tensors: dict[str, torch.Tensor], pooling: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(rows, hidden) pooled float32 and (rows, classes) logits or None, on the CPU."""
    tensors = {key: tensor.to(_device(model)) for key, tensor in tensors.items()}
    inner = unwrap(model)
    base: Any = getattr(inner, "base_model", inner)
    if is_classifier(model):
        hidden, logits = _classify(model, base, tensors)
    else:
        encoder = model if base is inner else base  # `model` may be compiled; a head that gives no classes is skipped
        hidden, logits = encoder(**tensors)[0], None
    pooled = pool(hidden, tensors["attention_mask"], pooling)
    return pooled.cpu(), None if logits is None else logits.float().cpu()


def pool(hidden: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Last hidden states (rows, tokens, hidden), mask (rows, tokens) -> (rows, hidden) float32; see `encode_texts`."""
    if pooling == "cls":
        return hidden[:, 0].float()
    mask = attention_mask.unsqueeze(-1)  # (rows, tokens, 1)
    # not hidden * mask: what a model leaves at padding may be NaN, and NaN * 0 is NaN
    return hidden.float().masked_fill(mask == 0, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def _classify(model: nn.Module, base: nn.Module, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states and logits of one pass: the encoder's output is caught on its way to the head."""
    caught: list[torch.Tensor] = []
    handle = base.register_forward_hook(lambda _module, _inputs, output: caught.append(output[0]))
    try:
        logits = model(**tensors).logits
    finally:
        handle.remove()
    return caught[0], logits


def _device(model: nn.Module) -> torch.device:
    """Where the model is; a fully quantized one may hold buffers only."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _unit_rows(vectors: Sequence[torch.Tensor | None], model: nn.Module) -> torch.Tensor:
    rows = _stacked(vectors)
    if rows is None:
        config: Any = model.config
        return torch.zeros(0, config.hidden_size)
    broken = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise QBertError(f"the model gives NaN or Inf for {len(broken)} of {len(rows)} texts, first text {broken[0]}")
    return nn.functional.normalize(rows, dim=1)


def _stacked(rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [row for row in rows if row is not None]
    return torch.stack(present) if present else None
