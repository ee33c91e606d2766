"""sentence-transformers: which modules of a pipeline stay float, and what a pipeline without `import qbert` ends in.

A pipeline is saved module by module. Its transformers models save themselves as qbert's checkpoints; the others' files know
only float weights. The list of its modules names a class that is only there once this module is imported (see `pipelines`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qbert import convert
from qbert.integrations.pipelines import PACKAGE, QUANTIZED, say_quantized
from qbert.modules import QuantizedModule

_PACKAGE = "sentence_transformers."
_MODELS = ("SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder")


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


def _register() -> None:
    """Makes the name known, and has pipelines and rerankers write it when something in them is quantized."""
    package: Any = importlib.import_module(PACKAGE)
    setattr(package, QUANTIZED, _transformer())
    for kind in filter(None, (getattr(package, name, None) for name in _MODELS)):
        kind.save = _saying_quantized(kind.save)


def _transformer() -> Any:
    """The module of a pipeline that holds a transformers model; it moved in version 6."""
    try:
        return importlib.import_module(f"{PACKAGE}.base.modules").Transformer
    except ImportError:
        return importlib.import_module(f"{PACKAGE}.models").Transformer


def _saying_quantized(save: Any) -> Any:
    @functools.wraps(save)
    def saved(self: nn.Module, path: str | None = None, *args: Any, **kwargs: Any) -> Any:
        result = save(self, path, *args, **kwargs)
        if path is not None and any(isinstance(module, QuantizedModule) for module in self.modules()):
            say_quantized(Path(path))
        return result

    return saved


_register()
convert.when_planned(_saved_by_themselves)
