"""bitsandbytes as its documentation shows it: LLM.int8() (`Linear8bitLt`, threshold 6), or NF4 (`Linear4bit`)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from .base import library
from .torch_peer import TorchPeer

_THRESHOLD = 6.0  # columns with larger activations are multiplied in float: its paper's and its documentation's value


class BitsAndBytes(TorchPeer):
    """Linears in int8 or NF4, all else in `dtype`. Options: `nf4`, `dtype` (bfloat16 by default)."""

    def converted(self, model: Any) -> Any:
        model = model.to(self.job.device, getattr(torch, self.job.options.get("dtype", "bfloat16")))
        return replace_linears(model, self.job.device, nf4=bool(self.job.options.get("nf4")))

    def notes(self) -> list[str]:
        if self.job.device != "cpu" and not self.job.options.get("nf4"):
            return [
                "computes something else: features beyond the threshold, found in each batch, are multiplied in float16"
            ]
        return []


def replace_linears(model: Any, device: str, *, nf4: bool) -> Any:
    """A model on `device` with bitsandbytes' layers in place of its linears; they quantize on their way there."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, layer_of(child, nf4=nf4).to(device))
    return model.eval()


def layer_of(linear: nn.Linear, *, nf4: bool) -> nn.Module:
    """bitsandbytes' layer with that linear's weight, not quantized before it is moved."""
    layers, has_bias = library("bitsandbytes").nn, linear.bias is not None
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says in every call that it casts to float16
    if nf4:
        made = layers.Linear4bit(
            linear.in_features, linear.out_features, bias=has_bias, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
    else:
        made = layers.Linear8bitLt(
            linear.in_features, linear.out_features, bias=has_bias, has_fp16_weights=False, threshold=_THRESHOLD
        )
    made.load_state_dict(linear.state_dict())
    layer: nn.Module = made
    return layer
