"""gemlite: Triton kernels for low-bit linears on a GPU, by the helpers its README shows, with the tiles that it ships."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qbert.formats import DEFAULT_GROUP_SIZE
from qbert.timing import Unavailable

from .base import library
from .torch_peer import TorchPeer

# What a helper is called in one version and another; the first that is there is taken.
HELPERS: dict[str, tuple[str, ...]] = {
    "a8w8": ("A8W8_INT8_dynamic", "A8W8_int8_dynamic"),
    "a16w4": ("A16W4_HQQ_INT",),
}
_LEVELS = 15


class Gemlite(TorchPeer):
    """float16 model, linears by gemlite. Option: `kind`, a key of `HELPERS`."""

    def converted(self, model: Any) -> Any:
        model = model.to(self.job.device, torch.float16)
        kind = self.job.options["kind"]
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, layer_of(child, kind))
        return model


def layer_of(linear: nn.Linear, kind: str) -> Any:
    """gemlite's layer of that kind with a float16 linear's weight, on its device.

    Raises:
        Unavailable: gemlite is not installed, or has no such helper.
    """
    helper = library("gemlite.helper")
    made = next((getattr(helper, name) for name in HELPERS[kind] if hasattr(helper, name)), None)
    if made is None:
        raise Unavailable(f"this version of gemlite has none of {', '.join(HELPERS[kind])}")
    device, weight = str(linear.weight.device), linear.weight.data
    if kind == "a8w8":
        return made(device=device).from_linear(linear)
    return made(device=device, dtype=weight.dtype).from_weights(*four_bits(weight), bias=linear.bias)


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 ... 15 (n, k), scales and zeros (n, k / 64): weight is about (codes - zeros) * scales, group by group."""
    groups = weight.float().unflatten(1, (-1, DEFAULT_GROUP_SIZE))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scales = ((high - low) / _LEVELS).clamp(min=torch.finfo(torch.float16).tiny)
    zeros = (-low / scales).round().clamp(0, _LEVELS)
    codes = (groups / scales + zeros).round().clamp(0, _LEVELS).to(torch.uint8)
    return codes.flatten(1), scales.squeeze(2).to(weight.dtype), zeros.squeeze(2).to(weight.dtype)
