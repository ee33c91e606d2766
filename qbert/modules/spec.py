"""What a model's quantized modules are, as data: enough to rebuild them empty and to know every tensor's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import nn

from qbert.errors import QBertError
from qbert.formats import BlockFormat, EmulatedScheme, Role, Scheme, emulated_scheme, get_scheme, scheme_names
from qbert.modules.base import QuantizedModule
from qbert.modules.embedding import QEmbedding
from qbert.modules.linear import QLinear, QTiedLinear
from qbert.weight import Layout, TensorSpec, Weight, stored_specs

_MAX_DIMENSION = 2**31 - 1
_FORMATS = ("weights", "activations")
_UNSAID = (*_FORMATS, "zeros", "nonzeros")  # left out where they are None


class ModuleSpec(BaseModel):
    """One quantized module, as it stands in a checkpoint's configuration.

    Attributes:
        kind: which module stands there.
        scheme: of the weight; of the owner's, for a tied linear.
        shape: (n, k) of the weight.
        outliers: weights kept exactly (dictionary schemes).
        tied_to: qualified name of the module that holds a tied linear's weight.
        zeros: how a file stores a weight with many of them (`qbert.weight.zeros`); None of one that it stores whole.
        nonzeros: codes that are stored, where `zeros` is "bitmap".
        weights, activations: block formats of an emulated module, whole, as `BlockFormat.to_dict` spells them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["linear", "embedding", "tied_linear"]
    scheme: str
    shape: tuple[int, int] = Field(strict=False)
    outliers: int = Field(default=0, ge=0, le=_MAX_DIMENSION)
    tied_to: str | None = None
    zeros: Literal["bitmap", "2:4"] | None = None
    nonzeros: Annotated[int, Field(ge=0)] | None = None
    weights: dict[str, Any] | None = None
    activations: dict[str, Any] | None = None

    @model_serializer(mode="wrap")
    def _without_formats(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)  # what says nothing is left out: older versions read it, digests stay
        return {name: value for name, value in data.items() if name not in _UNSAID or value is not None}

    @model_validator(mode="after")
    def _consistent(self) -> ModuleSpec:
        n, k = self.shape
        if not (1 <= n <= _MAX_DIMENSION and 1 <= k <= _MAX_DIMENSION and self.outliers <= n * k):
            raise ValueError(f"shape {self.shape} with {self.outliers} outliers is not a matrix")
        if (self.kind == "tied_linear") != (self.tied_to is not None):
            raise ValueError(f"tied_to is {self.tied_to!r} for a {self.kind}")
        scheme = self.resolved_scheme
        if scheme.group_size and k % scheme.group_size:
            raise ValueError(f"k is {k}, which groups of {scheme.group_size} do not divide")
        if self.outliers and not scheme.keeps_outliers:
            raise ValueError(f"{self.outliers} outliers, but scheme {scheme.name} keeps none")
        self._check_zeros(scheme)
        return self

    def _check_zeros(self, scheme: Scheme) -> None:
        n, k = self.shape
        if self.zeros is not None and (self.kind != "linear" or isinstance(scheme, EmulatedScheme)):
            raise ValueError(
                f"zeros is {self.zeros!r} for a {self.kind} of {scheme.name}; only linears with codes store them so"
            )
        if (self.zeros == "bitmap") != (self.nonzeros is not None):
            raise ValueError(f"nonzeros is {self.nonzeros} with zeros {self.zeros!r}; it goes with 'bitmap'")
        if self.nonzeros is not None and self.nonzeros > n * k:
            raise ValueError(f"{self.nonzeros} nonzeros of {n * k} weights")
        if self.zeros == "2:4" and k % 4:
            raise ValueError(f"zeros is '2:4', and k is {k}, no multiple of 4")

    @property
    def resolved_scheme(self) -> Scheme:
        """The scheme itself."""
        if self.weights is not None:
            activations = None if self.activations is None else BlockFormat.from_dict(self.activations)
            emulated = emulated_scheme(BlockFormat.from_dict(self.weights), activations)
            if self.scheme != emulated.name:
                raise QBertError(f"scheme {self.scheme!r} has the formats {emulated.name}")
            return emulated
        if self.kind == "tied_linear":  # the owner may be of either kind, and its own spec is checked where it stands
            role = Role.LINEAR if self.scheme in scheme_names(Role.LINEAR) else Role.EMBEDDING
            return get_scheme(self.scheme, role)
        return get_scheme(self.scheme, Role(self.kind))

    @property
    def layout(self) -> Layout:
        """In which a file holds the weight."""
        return Layout.PLAIN if self.zeros is None else Layout(self.zeros)

    def stored_specs(self) -> dict[str, TensorSpec]:
        """The tensors that a file holds."""
        return stored_specs(self.resolved_scheme, self.shape, self.outliers, self.layout, self.nonzeros or 0)

    def empty_weight(self, device: torch.device | str = "meta") -> Weight:
        """A weight of this shape without values, in the layout of the file."""
        specs = self.stored_specs()
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}
        return Weight(self.resolved_scheme, self.shape, self.layout, tensors)


def spec_of(module: nn.Module) -> ModuleSpec | None:
    """The spec of a quantized module, None for any other."""
    if isinstance(module, QTiedLinear):
        formats = formats_of(module.owner.scheme)
        return ModuleSpec(
            kind="tied_linear",
            scheme=module.owner.scheme.name,
            shape=module.shape,
            tied_to=module.owner_name,
            **formats,
        )
    if not isinstance(module, QuantizedModule):
        return None
    kind: Literal["linear", "embedding"] = "linear" if isinstance(module, QLinear) else "embedding"
    assert isinstance(module, QLinear | QEmbedding)
    weight = module.quantized
    formats = formats_of(module.scheme)
    if module.stored_as is not Layout.PLAIN:
        bitmap = module.stored_as is Layout.BITMAP
        formats |= {"zeros": module.stored_as.value, "nonzeros": module.nonzeros() if bitmap else None}
    return ModuleSpec(kind=kind, scheme=module.scheme.name, shape=module.shape, outliers=weight.outliers, **formats)


def formats_of(scheme: Scheme) -> dict[str, Any]:
    """The block formats of an emulated scheme, as data; nothing of any other."""
    if not isinstance(scheme, EmulatedScheme):
        return {}
    activations = None if scheme.activations is None else scheme.activations.to_dict()
    return {"weights": scheme.weights.to_dict(), "activations": activations}


def collect_specs(model: nn.Module) -> dict[str, ModuleSpec]:
    """Qualified name -> spec of every quantized module, in the model's order. A shared module goes by its first name."""
    specs = {name: spec_of(module) for name, module in model.named_modules()}
    return {name: spec for name, spec in specs.items() if spec is not None}
