"""Of which model a calibration is: samples of its values, which quantizing, casting, moving and saving leave recognizable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qbert.encoder.calibration import Fingerprint
from qbert.encoder.parts import parts_of
from qbert.families import EncoderFamily
from qbert.modules import QuantizedModule
from qbert.weight.codec import decode

_ROWS = 32  # of a layer's first linear whose sums are kept
_DIGITS = 6
_ROUNDING, _TINY = 2.0**-6, 1e-6  # what casts to bfloat16 and float16 may change of a value
_LEAST_COSINE = 0.7  # of sums; a dictionary of 8 values leaves 0.98, another model about 0


def fingerprint_of(base: nn.Module, family: EncoderFamily) -> Fingerprint | None:
    """The fingerprint of an encoder's layers, float or quantized; None of one without values."""
    kept: list[float] = []
    sums: list[float] = []
    for path in dict.fromkeys(family.calls(base, family.layers).values()):
        layer = base.get_submodule(path)
        for tensor in _left_alone(layer, family):
            if tensor.device.type == "meta":
                return None
            kept += tensor.detach().reshape(-1)[[tensor.numel() // 3, 2 * tensor.numel() // 3]].tolist()
        weight = _weight(layer.get_submodule(parts_of(family).linears[0]))
        if weight.device.type == "meta":
            return None
        sums += _sums(weight[:_ROWS]).tolist()
    return Fingerprint(family=family.name, kept=_rounded(kept), sums=_rounded(sums))


def differs(found: Fingerprint, expected: Fingerprint) -> str | None:
    """What says that two fingerprints are of two models; None where nothing does."""
    if found.family != expected.family:
        return f"it is of a model of the family {expected.family}, not {found.family}"
    if (len(found.kept), len(found.sums)) != (len(expected.kept), len(expected.sums)):
        return "it is of a model of another shape"
    for value, wanted in zip(found.kept, expected.kept, strict=True):
        if abs(value - wanted) > _ROUNDING * max(abs(value), abs(wanted)) + _TINY:
            return f"its model has a bias or a gain of {wanted:g} where this one has {value:g}"
    sums = torch.tensor([found.sums, expected.sums], dtype=torch.float64)
    cosine = float(torch.cosine_similarity(sums[0], sums[1], dim=0))
    if cosine < _LEAST_COSINE and bool(sums.any()):
        return f"its model's weights are others (cosine {cosine:.2f} of {len(found.sums)} sums)"
    return None


def _left_alone(layer: nn.Module, family: EncoderFamily) -> Iterator[Tensor]:
    """Gains and biases, which quantization leaves as they are."""
    parts = parts_of(family)
    for path in (*parts.norms, *parts.linears):
        module: Any = layer.get_submodule(path)
        own = (module.bias,) if path in parts.linears else (module.weight, module.bias)
        yield from (each for each in own if each is not None)


def _weight(linear: Any) -> Tensor:
    weight: Tensor = decode(linear.quantized) if isinstance(linear, QuantizedModule) else linear.weight.detach()
    return weight


def _sums(rows: Tensor) -> Tensor:
    """(rows,) of the values with signs that have no pattern which weights could share."""
    index = torch.arange(rows.shape[1], device=rows.device)
    signs = 1 - 2 * ((index * index * 40503 + index * 30011) // 64 % 2)
    return (rows.to(torch.float64) * signs).sum(1)


def _rounded(values: list[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_DIGITS}g}") if abs(value) < float("inf") else 0.0 for value in values)
