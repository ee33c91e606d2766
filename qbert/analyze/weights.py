"""Parameters and stored bytes of a model, float or quantized: the one place that looks inside a quantized module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qbert.analyze.components import Component, component_of

# The widest activation that integer (or fp8) matrix units take; anything wider is computed in floating point.
INTEGER_MATH_MAX_BITS = 8


@dataclass(frozen=True)
class QuantizedWeight:
    """What the counts need to know of a quantized linear or embedding.

    Attributes:
        rows, columns: logical shape: (out_features, in_features), or (num_embeddings, embedding_dim).
        nbytes: bytes of the weight that it reads, as they lie in memory.
        is_tied: the weight belongs to another module, which counts its parameters and bytes.
        is_embedding: looked up by index instead of multiplied.
        math: precision of the multiplication: ``"float"``, ``"int8"`` or ``"fp8"``.
    """

    rows: int
    columns: int
    nbytes: int
    is_tied: bool
    is_embedding: bool
    math: str


def quantized_weight(module: nn.Module) -> QuantizedWeight | None:
    """The quantized weight of `module`, or None where it is no quantized module.

    Duck typing: `weight_nbytes()`, `scheme` (`.name`, `.activation_bits`), in_features / out_features or
    num_embeddings / embedding_dim, and `owner` where the weight belongs to another quantized module.
    """
    owner = getattr(module, "owner", module)
    weight_nbytes, scheme = getattr(owner, "weight_nbytes", None), getattr(module, "scheme", None)
    if not callable(weight_nbytes) or scheme is None:
        return None
    for rows, columns, is_embedding in (
        ("out_features", "in_features", False),
        ("num_embeddings", "embedding_dim", True),
    ):
        if hasattr(module, rows) and hasattr(module, columns):
            shape = int(getattr(module, rows)), int(getattr(module, columns))
            is_tied = owner is not module
            return QuantizedWeight(*shape, int(weight_nbytes()), is_tied, is_embedding, _math_of(scheme))
    return None


def _math_of(scheme: object) -> str:
    bits = getattr(scheme, "activation_bits", None)
    if bits is None or bits > INTEGER_MATH_MAX_BITS:
        return "float"
    name = str(getattr(scheme, "name", ""))
    return "fp8" if "fp8" in name or "float8" in name else "int8"


@dataclass
class WeightCount:
    """Logical parameters, and the bytes they take in memory."""

    parameters: int = 0
    nbytes: int = 0

    def add(self, parameters: int, nbytes: int) -> None:
        """Count one more tensor."""
        self.parameters += parameters
        self.nbytes += nbytes


def count_weights(model: nn.Module) -> dict[Component, WeightCount]:
    """Parameters and their bytes per component. A parameter that two modules share counts once, where it is met first."""
    counts = {component: WeightCount() for component in Component}
    seen: set[torch.Tensor] = set()
    inside_quantized: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside_quantized:
            continue
        count = counts[component_of(name)]
        weight = quantized_weight(module)
        if weight is None:
            own = list(module.parameters(recurse=False))
        else:
            inside_quantized.update(module.modules())
            bias = getattr(module, "bias", None)
            own = [bias] if isinstance(bias, torch.Tensor) else []
            if not weight.is_tied:
                count.add(weight.rows * weight.columns, weight.nbytes)
        for tensor in own:
            if tensor not in seen:
                seen.add(tensor)
                count.add(tensor.numel(), tensor.nbytes)
    return counts
