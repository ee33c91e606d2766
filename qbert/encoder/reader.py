"""Who reads what a fused encoder gives: of a caller that takes only first tokens, the last layer need not compute the others.

The caller is recognised, not asked. transformers' own classifiers and sentence-transformers' own pooling are known code, and
take an encoder's first token however they were made: in place, loaded, copied, in another process. So the frames above the
encoder's forward are looked at. They must be known code and nothing else, down to the modules that the hidden states are handed
to; whoever has a hook there, a class or a forward of his own, or calls the encoder himself, gets every token.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import nn

from qbert.encoder.stock import FORWARD, HOOKS, comes_from, is_own, qualified, qualified_name
from qbert.families import EncoderFamily
from qbert.families.family import Reader, pooled_by_module

# What stands between a module's caller and its forward where nothing is hooked in.
_CALLS = tuple(getattr(nn.Module, name).__code__ for name in ("_call_impl", "_wrapped_call_impl"))
_SENTENCE_TRANSFORMERS = "sentence_transformers"
_AFTER_POOLING = ("Normalize", "Dense", "LayerNorm", "Dropout")


def takes_first(base: nn.Module, family: EncoderFamily, entry: CodeType) -> bool:
    """Whether whoever called an encoder reads nothing but the first token of each sequence.

    Args:
        entry: code of the forward that is running, somewhere above this function's frame.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not entry:
        frame = frame.f_back
    for code in (entry, *_CALLS):  # of a forward that is called as such, the entry alone
        frame = frame.f_back if frame is not None and frame.f_code is code else frame
    if frame is None or _is_hooked(base) or not _pools_first(base, family):
        return False
    return _is_reader(frame, base, family) or _is_embedder(frame, base)


def _pools_first(base: nn.Module, family: EncoderFamily) -> bool:
    """Whether the encoder's own pooler, if it has one, takes the first token: a family's function does, a module may not."""
    if family.pool is not pooled_by_module:
        return True
    return all(
        module is None or _is_stock_module(module, "*Pooler", base)
        for module in (base._modules.get(name) for name in family.poolers)
    )


def _is_reader(frame: FrameType, base: nn.Module, family: EncoderFamily) -> bool:
    """Whether it is the forward of one of the family's `Reader`s, whose parts are transformers' own."""
    model = frame.f_locals.get("self")
    reader = _reader_of(model, base, family)
    if reader is None or not isinstance(model, nn.Module) or not _is_forward(type(model), frame.f_code):
        return False
    config: Any = model.config
    if any(getattr(config, name, None) != value for name, value in reader.settings.items()):
        return False
    if reader.takes is None:
        return True
    name, kind = reader.takes
    return _is_stock_module(model._modules.get(name), kind, base)


def _reader_of(model: object, base: nn.Module, family: EncoderFamily) -> Reader | None:
    name = qualified_name(type(model))
    return next((each for each in family.readers if name in (qualified(kind, base) for kind in each.classes)), None)


def _is_forward(kind: type, code: CodeType) -> bool:
    """Whether a class's forward is its own, and this code."""
    function = vars(kind).get(FORWARD)
    return function is not None and is_own(kind, FORWARD, function) is code


def _is_stock_module(module: nn.Module | None, kind: str, base: nn.Module) -> bool:
    """Whether a module is of a class of the encoder's file, calls that class's forward, and nobody looks on."""
    if module is None or qualified_name(type(module)) != qualified(kind, base) or not _is_untouched(module):
        return False
    function = vars(type(module)).get(FORWARD)
    return function is not None and is_own(type(module), FORWARD, function) is not None


def _is_untouched(module: nn.Module) -> bool:
    return FORWARD not in module.__dict__ and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


# ---- sentence-transformers --------------------------------------------------------------------------------------------


def _is_embedder(frame: FrameType | None, base: nn.Module) -> bool:
    """Whether `SentenceTransformer.encode` called, to pool first tokens and return nothing else."""
    package = sys.modules.get(_SENTENCE_TRANSFORMERS)
    if package is None or not package.__file__:
        return False
    libraries = (f"{Path(package.__file__).parent}/", f"{Path(nn.__file__).parents[1]}/")
    while frame is not None and frame.f_code.co_filename.startswith(libraries):
        if frame.f_code.co_name in ("encode", "_inference") and "output_value" in frame.f_locals:
            wanted, model = frame.f_locals["output_value"], frame.f_locals.get("self")
            return wanted == "sentence_embedding" and _pools_cls(model, base, libraries[0])
        frame = frame.f_back
    return False


def _pools_cls(model: Any, base: nn.Module, library: str) -> bool:
    """Whether a SentenceTransformer is this encoder, CLS pooling, and modules that take what was pooled, all its own."""
    if type(model).__name__ != "SentenceTransformer" or not isinstance(model, nn.Module):
        return False
    inner, *others = model.children()
    if not all(comes_from(each, library) and _is_untouched(each) for each in (model, inner, *others)):
        return False
    if type(inner).__name__ != "Transformer" or not any(each is base for each in inner.children()) or not others:
        return False
    pooling, *rest = others
    return _is_cls(pooling) and all(_takes_pooled(each) for each in rest)


def _is_cls(pooling: Any) -> bool:
    if type(pooling).__name__ != "Pooling" or not getattr(pooling, "include_prompt", True):
        return False
    modes = getattr(pooling, "pooling_mode", None)
    if modes is None:  # before version 6 a switch each
        switches = {name: on for name, on in vars(pooling).items() if name.startswith("pooling_mode_")}
        return [name for name, on in switches.items() if on] == ["pooling_mode_cls_token"]
    return modes in ("cls", ("cls",), ["cls"])


def _takes_pooled(module: Any) -> bool:
    reads = getattr(module, "module_input_name", None)
    return type(module).__name__ in _AFTER_POOLING and reads in (None, "sentence_embedding")
