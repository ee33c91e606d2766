"""Attention with rounded operands: one function for all families, put in through transformers' own interface.

Blocks lie along what a product sums over. MPNet, which does not go through that interface, gets a forward of its own.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbert.errors import QBertError
from qbert.formats import BlockFormat, as_format, check_activations
from qbert.modules.emulated import rounded

IMPLEMENTATION = "qbert_emulated"  # transformers' name of the attention function below
FORMATS, _BEFORE, _OBSERVER = "_qbert_attention", "_qbert_attention_before", "_qbert_attention_observer"
Observer = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class AttentionFormats:
    """Formats of attention's operands; None leaves one float. Blocks lie along what a product sums over: head channels for
    query and key, keys for probabilities and value.

    Attributes:
        query, key, value: after the projections (and the rotation, where there is one).
        scores: what softmax takes, with scaling, bias and mask.
        probabilities: what softmax gives.
    """

    query: BlockFormat | None = None
    key: BlockFormat | None = None
    scores: BlockFormat | None = None
    probabilities: BlockFormat | None = None
    value: BlockFormat | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            check_activations(getattr(self, each.name))

    @classmethod
    def of(cls, value: AttentionFormats | BlockFormat | str | Mapping[str, Any] | None) -> AttentionFormats:
        """One format for all operands of products, a mapping of names to formats, or none.

        Raises:
            QBertError: a name that is no operand.
        """
        if value is None or isinstance(value, AttentionFormats):
            return value or cls()
        if not isinstance(value, Mapping):
            one = as_format(value)
            return cls(query=one, key=one, probabilities=one, value=one)
        known = [each.name for each in fields(cls)]
        for name in value:
            if name not in known:
                raise QBertError(f"attention {name!r}; allowed: {', '.join(known)}")
        return cls(**{name: None if fmt is None else as_format(fmt) for name, fmt in value.items()})

    def chosen(self) -> dict[str, BlockFormat]:
        """Those that are not float."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: fmt for name, fmt in found.items() if fmt is not None}


def round_attention(model: nn.Module, formats: AttentionFormats) -> None:
    """Makes a transformers model's attention round its operands.

    Raises:
        QBertError: a model without attention of a kind that is known.
    """
    if formats.chosen():
        _take_over(model, formats)


@contextmanager
def observed_attention(model: nn.Module, observer: Callable[[str, str, Tensor], None]) -> Iterator[None]:
    """Tells of the operands of attention's products while the model runs, in float.

    Args:
        observer: called with the attention module's name, ``"query"``, ``"key"``, ``"probabilities"`` or ``"value"``, and the
            operand (batch, heads, ..., what is summed over); values are (batch, heads, channels, keys).

    Raises:
        QBertError: a model that has no attention of a kind that is known, or whose attention is emulated already.
    """
    if any(FORMATS in module.__dict__ for module in model.modules()):
        raise QBertError(f"{type(model).__name__} is emulated already; its float operands are gone")
    _take_over(model, AttentionFormats())
    found = {name: module for name, module in model.named_modules() if FORMATS in module.__dict__}
    for name, module in found.items():
        setattr(module, _OBSERVER, functools.partial(observer, name))
    try:
        yield
    finally:
        for module in found.values():
            delattr(module, _OBSERVER)
        give_back(model)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> module, of the attention that can be emulated."""
    return {name: module for name, module in model.named_modules() if _kind_of_attention(module) is not None}


@contextmanager
def attention_of(model: nn.Module, name: str, formats: AttentionFormats) -> Iterator[None]:
    """One attention module in formats, all others float."""
    _take_over(model, AttentionFormats())
    setattr(model.get_submodule(name), FORMATS, formats)
    try:
        yield
    finally:
        give_back(model)


def _take_over(model: nn.Module, formats: AttentionFormats) -> None:
    found = list(attention_modules(model).values())
    if not found:
        raise QBertError(
            f"{type(model).__name__} has no attention that is emulated; allowed: transformers' BERT-like encoders"
        )
    register()
    for module in found:
        setattr(module, FORMATS, formats)
        if _kind_of_attention(module) == "own":
            module.forward = _OwnAttention(module)
        else:
            module.register_forward_pre_hook(_require_taken_over)
    for config in {id(each): each for each in (getattr(module, "config", None) for module in found)}.values():
        if config is not None and config._attn_implementation != IMPLEMENTATION:
            model.__dict__.setdefault(_BEFORE, []).append((config, config._attn_implementation))
            config._attn_implementation_internal = IMPLEMENTATION


def _require_taken_over(module: nn.Module, arguments: Any) -> None:
    """
    Raises:
        QBertError: somebody chose another attention function since, which rounds nothing.
    """
    config: Any = module.config
    if FORMATS in module.__dict__ and config._attn_implementation != IMPLEMENTATION:
        raise QBertError(
            f"attention is emulated in {type(module).__name__}, but its implementation is {config._attn_implementation!r} now; "
            "call qbert.dequantize_ before another is chosen"
        )


def give_back(model: nn.Module) -> None:
    """The model's own attention again."""
    for config, before in model.__dict__.pop(_BEFORE, ()):
        config._attn_implementation_internal = before
    for module in model.modules():
        module.__dict__.pop(FORMATS, None)
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _require_taken_over]:
            del hooks[key]
        if isinstance(module.__dict__.get("forward"), _OwnAttention):
            del module.forward


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, dropout: float, formats: AttentionFormats,
    observer: Observer | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(q k^T scaling + bias) v with rounded operands.

    Args:
        query, key, value: (batch, heads, tokens, channels).
        bias: added to the scores: mask, distances; (batch or 1, heads or 1, queries or 1, keys).
        dropout: share of the probabilities that is dropped.
        observer: called with the name of each operand of the products and the operand before it is rounded.

    Returns:
        (batch, queries, heads, channels), and the probabilities.
    """

    def taken(name: str, operand: Tensor) -> Tensor:
        if observer is not None:
            observer(name, operand)
        return rounded(operand, getattr(formats, name))

    scores = torch.matmul(taken("query", query), taken("key", key).transpose(2, 3)) * scaling
    scores = scores if bias is None else scores + bias
    if formats.scores is not None:  # the mask is no number to round: its scale would be all that is left
        seen = scores > torch.finfo(scores.dtype).min / 2
        scores = torch.where(seen, rounded(scores.masked_fill(~seen, 0.0), formats.scores), scores)
    probabilities = taken("probabilities", F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype))
    dropped = F.dropout(probabilities, p=dropout, training=dropout > 0)
    values = taken("value", _seen(value, bias).transpose(2, 3).contiguous()).transpose(2, 3)
    return torch.matmul(dropped, values).transpose(1, 2).contiguous(), probabilities


def _seen(value: Tensor, bias: Tensor | None) -> Tensor:
    """Values (batch, heads, keys, channels), those that the mask hides from everybody (padding) as zeros: blocks lie along the
    keys, and what nobody sees must not be in a block's scale, or results would depend on the batch."""
    if bias is None:
        return value
    seen = (bias > torch.finfo(bias.dtype).min / 2).any(dim=2).any(dim=1)
    return value.masked_fill(~seen[:, None, :, None], 0.0)


def _attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """transformers' attention interface."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    formats, observer = module.__dict__.get(FORMATS) or AttentionFormats(), module.__dict__.get(_OBSERVER)
    return attend(query, key, value, attention_mask, scaling, dropout, formats, observer)


class _OwnAttention:
    """The forward of MPNet's attention, which does not go through transformers' interface."""

    def __init__(self, module: nn.Module) -> None:
        self._module = (module,)

    def __call__(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None,
        output_attentions: bool = False, **kwargs: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        module: Any = self._module[0]
        size = module.attention_head_size
        split = (*hidden_states.shape[:-1], -1, size)
        query, key, value = (part(hidden_states).view(split).transpose(1, 2) for part in (module.q, module.k, module.v))
        given = [each for each in (position_bias, attention_mask) if each is not None]
        bias = sum(given[1:], given[0]) if given else None
        dropout = module.dropout.p if module.training else 0.0
        formats, observer = module.__dict__[FORMATS], module.__dict__.get(_OBSERVER)
        context, probabilities = attend(query, key, value, bias, 1 / math.sqrt(size), dropout, formats, observer)
        output = module.o(context.flatten(2))
        return (output, probabilities) if output_attentions else (output,)


def _kind_of_attention(module: nn.Module) -> str | None:
    """``"interface"``, ``"own"``, or None for other modules."""
    kind = type(module)
    if kind.__name__ == "MPNetSelfAttention" and kind.__module__.startswith("transformers."):
        return "own"
    there = vars(sys.modules.get(kind.__module__, object)) if kind.__module__.startswith("transformers.") else {}
    known = "ALL_ATTENTION_FUNCTIONS" in there and hasattr(module, "config") and not hasattr(module, "base_model")
    return (
        "interface"
        if known and "Attention" in kind.__name__ and not any(_attends(each) for each in module.children())
        else None
    )


def _attends(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def register() -> None:
    """Names the attention function, and the masks it takes, to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    AttentionInterface.register(IMPLEMENTATION, _attention_function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, eager_mask)
