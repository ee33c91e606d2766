"""The batch that an analysis runs: random token ids, no padding, with every limit checked first."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from qbert.errors import QBertError
from qbert.families.positions import longest

_SEED = 0


def require_positive(name: str, value: int) -> None:
    """Raises QBertError where `value` is not an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise QBertError(f"{name} is {value!r}; allowed: an integer >= 1")


def require_encoder(model: object) -> nn.Module:
    """`model`, if it is a module that takes token ids; raises QBertError otherwise."""
    if not isinstance(model, nn.Module):
        raise QBertError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module with config.vocab_size")
    if not isinstance(getattr(getattr(model, "config", None), "vocab_size", None), int):
        raise QBertError(f"model {type(model).__name__} has no config.vocab_size, so no input can be made for it")
    return model


def make_inputs(model: nn.Module, batch: int, seq: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Keyword arguments for `model`: input_ids (batch, seq) int64 and, where it takes one, an all-ones attention mask.

    A multiple-choice head gets one choice: (batch, 1, seq). On the meta device there is no mask, because transformers
    looks at its values.

    Raises:
        QBertError: `batch` or `seq` below 1, or `seq` beyond the model's positions.
    """
    require_positive("batch", batch)
    require_positive("seq", seq)
    config: Any = model.config
    limit = longest(config)
    if limit is not None and seq > limit:
        raise QBertError(f"seq is {seq}; allowed: 1 to {limit}, the positions of {type(model).__name__}")
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(config.vocab_size, (batch, seq), generator=generator)
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:  # a padding token would shift RoBERTa's positions
        ids[ids == padding] = (padding + 1) % config.vocab_size
    if type(model).__name__.endswith("ForMultipleChoice"):
        ids = ids.unsqueeze(1)
    inputs = {"input_ids": ids.to(device)}
    if device.type != "meta" and "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs
