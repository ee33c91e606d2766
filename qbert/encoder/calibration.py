"""What calibration found out about an encoder: a static scale for each quantized slot of each layer, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from qbert.errors import QBertError
from qbert.formats import INT8

# Scales outside would leave float32 where they are multiplied with one another; no real activation is near them.
_SMALLEST, _LARGEST = 2.0**-60, 2.0**60
MAX_OVERFLOW_NEURONS = 16  # one panel of output channels: fewer would cost the same
# The five slots that version 1 of a record had as fields, by their names there.
_VERSION_1 = {"query": "query", "key": "key", "value": "value", "attention_output": "context", "gelu": "inner"}

Scale = Annotated[float, Field(ge=_SMALLEST, le=_LARGEST, allow_inf_nan=False)]


class Overflow(BaseModel):
    """The few neurons of a feed-forward network that outgrow the static scale of all others, and how much.

    In trained encoders a handful of neurons answer some tokens with values ten times larger than any other neuron's; a scale
    that covers them leaves the others a few codes, a scale that clips them changes what those tokens mean. So they saturate
    like any other, and what saturation cut off is added back: GELU(x) is x for large x, hence
    GELU(x) ~ min(GELU(x), top) + GELU(x - top), where the second term is a neuron with another bias.

    Attributes:
        neurons: indices of the neurons, ascending.
        scale: of the int8 codes of GELU(x - top).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    neurons: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
    scale: Scale

    @model_validator(mode="after")
    def _ascending(self) -> Overflow:
        if not 1 <= len(self.neurons) <= MAX_OVERFLOW_NEURONS:
            raise ValueError(f"{len(self.neurons)} neurons; allowed: 1 ... {MAX_OVERFLOW_NEURONS}")
        if list(self.neurons) != sorted(set(self.neurons)):
            raise ValueError(f"neurons must ascend, got {list(self.neurons)}")
        return self


class LayerScales(BaseModel):
    """Static scales of one layer's int8 slots: value = (code - zero) * scale.

    Attributes:
        scales: name of the slot in the family's program (``"query"``, ``"context"``, ``"inner"``) -> its scale.
        zeros: slot -> its code of 0, where that is another than 0: GELU has next to nothing below 0, so codes around 0 would be
            left empty by half.
        overflow: slot -> what its scale cuts off; slots that are not here are covered.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scales: dict[str, Scale] = Field(min_length=1)
    zeros: dict[str, Annotated[int, Field(ge=-INT8.qmax, le=INT8.qmax)]] = {}
    overflow: dict[str, Overflow] = {}

    @model_validator(mode="after")
    def _all_is_of_a_slot(self) -> LayerScales:
        for what, slots in (("overflow", self.overflow), ("zero", self.zeros)):
            for slot in slots:
                if slot not in self.scales:
                    raise ValueError(f"{what} of a slot {slot!r} without a scale; it has {', '.join(self.scales)}")
        return self

    def top(self, slot: str) -> float:
        """The largest value that a slot has a code for."""
        return (INT8.qmax - self.zeros.get(slot, 0)) * self.scales[slot]

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> Any:
        """Without zeros as it was before there were any, for digests are of this."""
        return {name: value for name, value in serialize(self).items() if name != "zeros" or value}


class Fingerprint(BaseModel):
    """Samples of a model's values, by which it is known again after quantizing, casting, moving and saving.

    Attributes:
        family: of the encoder.
        kept: gains and biases, a few of each layer; equal but for the rounding of casts.
        sums: of rows of weights; near each other whatever the scheme.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    family: str
    kept: Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], Field(strict=False)]
    sums: Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], Field(strict=False)]


class Calibration(BaseModel):
    """The static scales of all layers of an encoder, from `qbert.calibrate`.

    Attributes:
        layers: name of the layer, from the encoder (``"encoder.layer.0"``), the same for a bare encoder and inside a head
            model -> its scales.
        fingerprint: of the model that it was made of; None in files that were written before there was one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layers: dict[str, LayerScales] = Field(min_length=1)
    fingerprint: Fingerprint | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, data: Any) -> Any:
        """Files of version 1 have the five slots of a post-norm layer as fields."""
        layers = data.get("layers") if isinstance(data, Mapping) else None
        if not isinstance(layers, Mapping):
            return data
        return {**data, "layers": {name: _from_version_1(layer) for name, layer in layers.items()}}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` gives the same bits back."""
        return self.model_dump(mode="json", exclude=None if self.fingerprint else {"fingerprint"})

    def to_version_1(self) -> dict[str, Any]:
        """The same as version 1 of a record spelled it; what such a record's digest is of."""
        return {"layers": {name: _to_version_1(layer) for name, layer in self.layers.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_dict`; takes version 1 of a record too.

        Raises:
            QBertError: an entry that is missing, unknown, of the wrong type, or a scale that is none.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise QBertError(f"calibration: {where}: {first['msg']}, got {first['input']!r:.80}") from None


def _from_version_1(layer: Any) -> Any:
    if not isinstance(layer, Mapping) or "scales" in layer or not _VERSION_1.keys() & layer.keys():
        return layer
    rest = {name: value for name, value in layer.items() if name not in _VERSION_1}
    overflow = rest.pop("overflow", None)
    scales = {slot: layer[name] for name, slot in _VERSION_1.items() if name in layer}
    return {**rest, "scales": scales, "overflow": {} if overflow is None else {"inner": overflow}}


def _to_version_1(layer: LayerScales) -> dict[str, Any]:
    fields: dict[str, Any] = {name: layer.scales[slot] for name, slot in _VERSION_1.items() if slot in layer.scales}
    overflow = layer.overflow.get("inner")
    return {**fields, "overflow": None if overflow is None else overflow.model_dump(mode="json")}
