"""L7. What calibration found out about an encoder: one static scale for each of five tensors of each layer, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qbert.errors import QBertError

# Scales outside would leave float32 where they are multiplied with one another; no real activation is near them.
_SMALLEST, _LARGEST = 2.0**-60, 2.0**60
MAX_OVERFLOW_NEURONS = 16  # one panel of output channels: fewer would cost the same

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
    """Static scales of one layer's int8 tensors: value = code * scale.

    Attributes:
        query, key, value: of the three projections of the input.
        attention_output: of the weighted values, all heads.
        gelu: of the hidden units of the feed-forward network.
        overflow: what `gelu` cuts off; None where it covers all there is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    query: Scale
    key: Scale
    value: Scale
    attention_output: Scale
    gelu: Scale
    overflow: Overflow | None = None


class Calibration(BaseModel):
    """The static scales of all layers of an encoder, from `qbert.calibrate`.

    Attributes:
        layers: name of the layer, from the encoder (``"encoder.layer.0"``), the same for a bare encoder and inside a head
            model -> its scales.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layers: dict[str, LayerScales] = Field(min_length=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` gives the same bits back."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_dict`.

        Raises:
            QBertError: an entry that is missing, unknown, of the wrong type, or a scale that is none.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise QBertError(f"calibration: {where}: {first['msg']}, got {first['input']!r:.80}") from None
