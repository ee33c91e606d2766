"""What a study says, as data."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qbert.cost import Beside, EncoderCost
from qbert.evaluate import EvalResult

Decibels = float | None  # None: no error at all


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Sensitivity(_Record):
    """One part of the model in the format, all others float."""

    module: str = Field(description="qualified name")
    layer: str = Field(description="of the encoder; empty outside of one")
    part: str = Field(description="within the layer")
    sqnr_db: Decibels = Field(description="of the last hidden states of the sample, against float32")


class PointResult(_Record):
    """One format."""

    name: str
    format: dict[str, Any] = Field(description="as BlockFormat.to_dict spells it")
    sites: list[str] = Field(description="where it was")
    left_out: dict[str, str] = Field(description="site that was asked for -> why the format is not for it")
    bits_per_weight: float | None = Field(
        description="stored, of what is in the format, with all metadata; None: nothing is"
    )
    model_bytes: int = Field(description="of all tensors in a file")
    percent_of_float32: float
    weight_sqnr_db: dict[str, Decibels] = Field(description="of each weight or table")
    activation_sqnr_db: dict[str, Decibels] = Field(
        description="of what each linear takes, on the sample, rounded alone"
    )
    attention_sqnr_db: dict[str, Decibels] = Field(
        description="of each operand of attention, on the sample, rounded alone"
    )
    sensitivity: list[Sensitivity]
    hidden_sqnr_db: Decibels = Field(description="of the last hidden states of the sample, everything rounded")
    cosine_mean: float = Field(description="of text embeddings to float32's, over all texts of all tasks")
    cosine_min: float
    results: list[EvalResult] = Field(description="one for each task, paired with float32")
    forward_ratio: float = Field(
        description="seconds of the emulated forwards over those of float32: what emulating costs"
    )
    seconds: float = Field(description="all that this point took")
    costs: list[EncoderCost] = Field([], description="modelled, one for each target")

    @property
    def worst(self) -> list[str]:
        """The three modules that hurt most alone; by the error of their weights where that was not measured."""
        by_part = {each.module: each.sqnr_db for each in self.sensitivity} or self.weight_sqnr_db
        ranked = sorted((value, name) for name, value in by_part.items() if value is not None)
        return [name for _, name in ranked[:3]]


class Reference(_Record):
    """The float32 model."""

    model_bytes: int
    results: list[EvalResult]
    costs: list[EncoderCost] = Field([], description="of the target's own float")


class TargetNote(_Record):
    """A machine that costs were modelled for."""

    name: str
    description: str
    source: str
    assumptions: list[str] = Field(description="sections of its file whose figures are assumed")


class Study(_Record):
    """A study as it was made; `points` in the order in which they were asked for."""

    model: str
    sites: list[str]
    device: str
    torch_version: str
    qbert_version: str
    sample_tokens: int
    reference: Reference
    points: list[PointResult]
    targets: list[TargetNote] = []
    beside: list[Beside] = Field([], description="model beside measurement, where results are stored for a target")
    resumed: int = Field(description="points that were found in the store")
    seconds: float
