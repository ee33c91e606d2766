"""sentence-transformers: which modules of a pipeline stay float.

A pipeline is saved module by module. Its transformers models save themselves as qbert's checkpoints; the others' files know
only float weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel

from qbert import convert

_PACKAGE = "sentence_transformers."


def _saved_by_themselves(model: nn.Module) -> Mapping[nn.Module, str]:
    """Modules of a pipeline's own layers (Dense and the like) -> why they stay float."""
    return {
        inner: f"sentence-transformers' {type(layer).__name__} saves it, and could not load it quantized"
        for layer in model.modules()
        if type(layer).__module__.startswith(_PACKAGE)
        for inner in _own(layer)
    }


def _own(module: nn.Module) -> Iterator[nn.Module]:
    """What is inside and of no transformers model."""
    for child in module.children():
        if not isinstance(child, PreTrainedModel):
            yield child
            yield from _own(child)


convert.when_planned(_saved_by_themselves)
