"""What one format does to one model: errors of weights and activations, of each part alone, and of the whole on real tasks."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbert.convert import quantize_
from qbert.emulation import Emulation
from qbert.explain import explain
from qbert.formats import BlockFormat
from qbert.metrics import sqnr_db
from qbert.modules import AttentionFormats, EmulatedModule
from qbert.modules.attention import attention_modules, attention_of, observed_attention
from qbert.numerics import round_activations
from qbert.study.result import Decibels, Sensitivity
from qbert.weight.codec import decode

_LAYER = re.compile(r"(?P<layer>.*?(?:layers?|albert_layer_groups)\.\d+)\.(?P<part>.+)")


@dataclass(frozen=True)
class Sample:
    """A few texts and what the float model makes of them.

    Attributes:
        inputs: of the model, a padded batch.
        hidden: (tokens, hidden) float32 of the last layer, without padding.
        taken: linear -> (tokens, k) float32 that it takes, without padding.
        operands: "module.query" and so on -> (rows, k) float32 of attention's products, k being what they sum over.
    """

    inputs: Mapping[str, Tensor]
    hidden: Tensor
    taken: Mapping[str, Tensor]
    operands: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Tensor]) -> Sample:
        """Runs the float model on a padded batch."""
        taken: dict[str, Tensor] = {}
        operands: dict[str, Tensor] = {}
        there = inputs["attention_mask"].bool()

        def keep(name: str) -> Any:
            def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
                if given[0].dim() == 3 and given[0].shape[:2] == there.shape:
                    taken[name] = given[0][there].detach().to(torch.float32)

            return hook

        def see(module: str, operand: str, x: Tensor) -> None:  # (batch, heads, rows, k); rows of values are channels
            rows = x if operand == "value" else x.transpose(1, 2)[there]
            operands[f"{module}.{operand}"] = rows.detach().to(torch.float32).reshape(-1, x.shape[-1])

        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        handles = [module.register_forward_pre_hook(keep(name)) for name, module in linears.items()]
        try:
            hidden = _hidden(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        if attention_modules(model):
            with observed_attention(model, see):
                _hidden(model, inputs)
        return cls(inputs, hidden, taken, operands)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.hidden.shape[0]


@dataclass(frozen=True)
class Stored:
    """Bits and bytes of a model: bits per value of what is in the format (None: nothing is), and bytes of all tensors."""

    bits_per_weight: float | None
    model_bytes: int


def emulated_copy(model: nn.Module, emulation: Emulation) -> nn.Module:
    """The model in a format; the original stays as it is."""
    return quantize_(copy.deepcopy(model), emulation).eval()


def stored(model: nn.Module) -> Stored:
    """What a file of the model would hold."""
    explained = explain(model)
    floats = sum(each.numel() * each.element_size() for each in model.parameters())
    in_format = sum(row.stored_bytes for row in explained.quantized)
    return Stored(explained.bits_per_weight if explained.quantized else None, floats + in_format)


def weight_errors(model: nn.Module, emulated: nn.Module) -> dict[str, Decibels]:
    """SQNR of each quantized weight."""
    return {
        name: finite(sqnr_db(model.get_submodule(name).get_parameter("weight").detach(), decode(module.quantized)))
        for name, module in emulated.named_modules()
        if isinstance(module, EmulatedModule)
    }


def activation_errors(sample: Sample, fmt: BlockFormat, rounded: set[str]) -> dict[str, Decibels]:
    """SQNR of what each of the linears takes, rounded alone: errors of earlier layers are not in it."""
    return {name: finite(sqnr_db(x, round_activations(x, fmt))) for name, x in sample.taken.items() if name in rounded}


def attention_errors(sample: Sample, fmt: BlockFormat) -> dict[str, Decibels]:
    """SQNR of each operand of attention's products, rounded alone."""
    return {name: finite(sqnr_db(x, round_activations(x, fmt))) for name, x in sample.operands.items()}


def sensitivity(
    model: nn.Module, emulated: nn.Module, sample: Sample, attention: AttentionFormats
) -> list[Sensitivity]:
    """The error of the last hidden states with one emulated linear, table or attention in the float model at a time."""
    found = []
    for name, module in emulated.named_modules():
        if isinstance(module, EmulatedModule):
            with _in_place(model, name, module):
                found.append(_part(name, hidden_error(model, sample)))
    for name in attention_modules(model) if attention.chosen() else ():
        with attention_of(model, name, attention):
            found.append(_part(name, hidden_error(model, sample)))
    return found


def _part(name: str, error: Decibels) -> Sensitivity:
    match = _LAYER.fullmatch(name)
    layer, part = (match["layer"], match["part"]) if match else ("", name)
    return Sensitivity(module=name, layer=layer, part=part, sqnr_db=error)


def hidden_error(model: nn.Module, sample: Sample) -> Decibels:
    """SQNR of a model's last hidden states."""
    return finite(sqnr_db(sample.hidden, _hidden(model, sample.inputs)))


def finite(decibels: float) -> Decibels:
    """None for no error at all; a signal that is lost altogether is 0 dB."""
    if decibels == math.inf:
        return None
    return decibels if math.isfinite(decibels) else 0.0


@torch.inference_mode()
def _hidden(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(tokens, hidden) float32 of the last layer, without padding."""
    base: Any = getattr(model, "base_model", model)
    return base(**inputs)[0][inputs["attention_mask"].bool()].to(torch.float32)


@contextmanager
def _in_place(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    path, _, last = name.rpartition(".")
    parent = model.get_submodule(path)
    before = parent._modules[last]
    parent._modules[last] = module
    try:
        yield
    finally:
        parent._modules[last] = before
