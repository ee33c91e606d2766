"""`qbert.compile`: CUDA graphs for the fused encoders of a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import nn

from qbert.encoder import recording
from qbert.encoder.eligibility import encoders, obstacle
from qbert.encoder.forward import FusedForward, fused_forward
from qbert.encoder.graphs import GraphCache, GraphLimits
from qbert.errors import QBertError


def compile(
    model: nn.Module,
    *,
    warm: Iterable[tuple[int, int]] = (),
    max_tokens: int = GraphLimits.max_tokens,
    max_graphs: int = GraphLimits.max_graphs,
    max_bytes: int = GraphLimits.max_bytes,
) -> nn.Module:
    """Makes the fused encoders of a model on a GPU run by CUDA graphs: one launch a batch in place of some ninety.

    A graph is captured when a batch of its size is first met: by total tokens without padding, and by number of sequences,
    both rounded up. The results have the same bits as without. `qbert.explain(model)` says what was captured and what ran
    without a graph for which reason: `output_hidden_states`, `inputs_embeds`, batches beyond the limits. After a change of
    the model graphs are captured anew; copies and checkpoints of it have none; `qbert.unfuse_` takes them away.

    Args:
        model: whose encoders are fused, in eval mode, on a CUDA device.
        warm: (batch, tokens) of batches without padding to capture ahead.
        max_tokens, max_graphs, max_bytes: see `qbert.encoder.graphs.GraphLimits`.

    Returns:
        The same model.

    Raises:
        QBertError: an encoder that is not fused, a device without CUDA graphs, a limit or a size to warm that is none.
    """
    limits = GraphLimits(max_tokens, max_graphs, max_bytes)
    sizes = list(warm)
    for size in sizes:
        _check_size(size, limits)
    found = _fused(model)
    for fused in found:
        fused.graphs = GraphCache(limits)
    for fused, (batch, tokens) in itertools.product(found, sizes):
        with torch.no_grad():
            fused.base(input_ids=torch.zeros(batch, tokens, dtype=torch.int64, device=fused.encoder().device))
    return model


def _fused(model: nn.Module) -> list[FusedForward]:
    """The encoders of a model, all of which must be fused and on a device with graphs."""
    forwards = []
    for name, base, _ in encoders(model):
        shown = name or type(base).__name__
        fused = fused_forward(base)
        if fused is None:
            why = obstacle(base) or "call qbert.fuse_(model) first"
            raise QBertError(
                f"{shown} is not fused: {why}. qbert.compile is for fused encoders, torch.compile for others"
            )
        device = fused.encoder().device
        if recording.recorder_of(device) is None:
            raise QBertError(f"{shown} is on {device}; allowed: cuda. qbert.compile captures CUDA graphs")
        forwards.append(fused)
    if not forwards:
        raise QBertError(f"nothing to compile: {obstacle(model)}")
    return forwards


def _check_size(size: object, limits: GraphLimits) -> None:
    pair = isinstance(size, tuple) and len(size) == 2 and all(isinstance(each, int) and each >= 1 for each in size)
    if not pair or size[0] * size[1] > limits.max_tokens:  # type: ignore[index]
        raise QBertError(
            f"warm: {size!r}; allowed: (batch, tokens) from (1, 1) up to {limits.max_tokens} tokens in all"
        )
