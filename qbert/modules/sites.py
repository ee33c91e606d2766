"""What else is rounded in an emulated model, between its linears: attention's operands, norms, activation functions, and the
inputs of linears that stay float. Hooks and one attention function; modules and their names stay as they are."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qbert.errors import QBertError
from qbert.formats import BlockFormat, as_format, check_activations
from qbert.modules.emulated import rounded

IMPLEMENTATION = "qbert_emulated"  # transformers' name of the attention function below
_FORMATS, _BEFORE = "_qbert_attention", "_qbert_attention_before"


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


class RoundInput:
    """A forward pre-hook: the module's input in a format."""

    def __init__(self, fmt: BlockFormat) -> None:
        self.fmt = fmt

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return rounded(inputs[0], self.fmt), *inputs[1:]


class RoundOutput:
    """A forward hook: the module's output in a format."""

    def __init__(self, fmt: BlockFormat) -> None:
        self.fmt = fmt

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return rounded(output, self.fmt)


def round_inputs(modules: Iterable[nn.Module], fmt: BlockFormat) -> None:
    """Rounds what modules take."""
    for module in modules:
        module.register_forward_pre_hook(RoundInput(fmt))


def round_norms(model: nn.Module, fmt: BlockFormat) -> None:
    """Rounds what layer norms give."""
    _round_outputs(model, [each for each in model.modules() if isinstance(each, nn.LayerNorm)], "nn.LayerNorm", fmt)


def round_activation_functions(model: nn.Module, fmt: BlockFormat) -> None:
    """Rounds what GELU and its like give."""
    found = [each for each in model.modules() if _is_activation(each)]
    _round_outputs(model, found, "activation function", fmt)


def round_attention(model: nn.Module, formats: AttentionFormats) -> None:
    """Makes a transformers model's attention round its operands.

    Raises:
        QBertError: a model without attention of a kind that is known.
    """
    if not formats.chosen():
        return
    found = [module for module in model.modules() if _kind_of_attention(module) is not None]
    if not found:
        raise QBertError(
            f"{type(model).__name__} has no attention that is emulated; allowed: transformers' BERT-like encoders"
        )
    _register()
    for module in found:
        setattr(module, _FORMATS, formats)
        if _kind_of_attention(module) == "own":
            module.forward = _OwnAttention(module)
    for config in {id(each): each for each in (getattr(module, "config", None) for module in found)}.values():
        if config is not None and config._attn_implementation != IMPLEMENTATION:
            model.__dict__.setdefault(_BEFORE, []).append((config, config._attn_implementation))
            config._attn_implementation_internal = IMPLEMENTATION


def remove_sites(model: nn.Module) -> bool:
    """Undoes all of the above, and says whether there was something to undo."""
    found = bool(describe_sites(model))
    for config, before in model.__dict__.pop(_BEFORE, ()):
        config._attn_implementation_internal = before
    for module in model.modules():
        module.__dict__.pop(_FORMATS, None)
        if isinstance(module.__dict__.get("forward"), _OwnAttention):
            del module.forward
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, RoundInput | RoundOutput)]:
                del hooks[key]
    return found


def describe_sites(model: nn.Module) -> list[str]:
    """A line for each kind of rounding that stands in the model beside its quantized modules."""
    counted: dict[str, int] = {}
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, RoundInput | RoundOutput):
                what = "input" if isinstance(hook, RoundInput) else "output"
                text = f"{type(module).__name__} {what} in {hook.fmt.name}"
                counted[text] = counted.get(text, 0) + 1
        formats = module.__dict__.get(_FORMATS)
        if formats is not None:
            text = "attention's " + ", ".join(f"{name} in {fmt.name}" for name, fmt in formats.chosen().items())
            counted[text] = counted.get(text, 0) + 1
    return [f"emulated: {text} ({count} modules)" for text, count in counted.items()]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    formats: AttentionFormats,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scaling + bias) v with rounded operands.

    Args:
        query, key, value: (batch, heads, tokens, channels).
        bias: added to the scores: mask, distances; (batch or 1, heads or 1, queries or 1, keys).
        dropout: share of the probabilities that is dropped.

    Returns:
        (batch, queries, heads, channels), and the probabilities.
    """
    scores = torch.matmul(rounded(query, formats.query), rounded(key, formats.key).transpose(2, 3)) * scaling
    if bias is not None:
        scores = scores + bias
    if formats.scores is not None:  # the mask is no number to round: its scale would be all that is left
        open_ = scores > torch.finfo(scores.dtype).min / 2
        scores = torch.where(open_, rounded(scores.masked_fill(~open_, 0.0), formats.scores), scores)
    probabilities = rounded(F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), formats.probabilities)
    dropped = F.dropout(probabilities, p=dropout, training=dropout > 0)
    if formats.value is not None:
        # Blocks lie along the keys. What nobody sees (padding) must not be in a block's scale: no result depends on the batch.
        seen = (bias > torch.finfo(bias.dtype).min / 2).any(dim=2).any(dim=1) if bias is not None else None
        if seen is not None:
            value = value.masked_fill(~seen[:, None, :, None], 0.0)
        value = rounded(value.transpose(2, 3).contiguous(), formats.value).transpose(2, 3)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), probabilities


def _attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """transformers' attention interface."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    formats = module.__dict__.get(_FORMATS) or AttentionFormats()
    return attend(query, key, value, attention_mask, scaling, dropout, formats)


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
        context, probabilities = attend(
            query, key, value, bias, 1 / math.sqrt(size), dropout, module.__dict__[_FORMATS]
        )
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


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    return isinstance(module, nn.GELU) or kind.__module__ == "transformers.activations"


def _round_outputs(model: nn.Module, modules: list[nn.Module], what: str, fmt: BlockFormat) -> None:
    if not modules:
        raise QBertError(f"{type(model).__name__} has no {what} to round")
    for module in dict.fromkeys(modules):
        module.register_forward_hook(RoundOutput(fmt))


def _register() -> None:
    """Names the attention function, and the masks it takes, to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    AttentionInterface.register(IMPLEMENTATION, _attention_function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, eager_mask)
