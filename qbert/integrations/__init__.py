"""Other frameworks: registered when they are imported, so that `import qbert` stays light."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# A framework's module -> the integration that is imported right after it. transformers.modeling_utils defines from_pretrained;
# it has imported the tables of quantizers when it is done.
_INTEGRATIONS = {
    "transformers.modeling_utils": "qbert.integrations.transformers",
    "torch.onnx": "qbert.integrations.onnx",
    "peft": "qbert.integrations.peft",
    "sentence_transformers": "qbert.integrations.sentence_transformers",
}


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Imports an integration right after its framework's module.

    Importing transformers' model code takes seconds; without this hook `import qbert` would pay for it, or users of
    ``AutoModel.from_pretrained`` would have to call a registration function and get random weights when they forget.
    """

    def __init__(self, trigger: str) -> None:
        self.trigger = trigger

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.trigger:
            return None
        sys.meta_path.remove(self)  # the others are asked, then it is put back: an import that fails is tried again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        finder, loader_class, exec_module = self, type(spec.loader), spec.loader.exec_module

        class Loader(loader_class):  # type: ignore[valid-type,misc]
            def exec_module(self, module: ModuleType) -> None:
                exec_module(module)
                sys.meta_path.remove(finder)
                importlib.import_module(_INTEGRATIONS[finder.trigger])

        spec.loader.__class__ = Loader
        return spec


def register() -> None:
    """Registers with each framework now if it is loaded, or as soon as it is."""
    waiting = {finder.trigger for finder in sys.meta_path if isinstance(finder, _RegisterAfterImport)}
    for trigger, integration in _INTEGRATIONS.items():
        if trigger in sys.modules:
            importlib.import_module(integration)
        elif trigger not in waiting:
            sys.meta_path.insert(0, _RegisterAfterImport(trigger))
