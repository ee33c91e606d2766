"""What the model says of an encoder on a target, as data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OperationCost(_Record):
    """A step of the program; those that are alike in several layers stand together."""

    name: str
    kind: str
    layers: int = Field(description="how many layers have it")
    shape: tuple[int, int, int] = Field(description="tokens, output channels, input channels; attention: of a head")
    runs_as: str = Field(description="operands that the units multiply; empty for rows")
    tile: tuple[int, int, int] | None
    ms: float = Field(description="of one layer's")
    bound: str
    parts: dict[str, float] = Field(description="milliseconds of each possible bound")
    utilization: float = Field(description="operations over what its units could do in that time; 0 for rows")
    mj: float | None = Field(description="millijoules; None where the target does not say")


class LayerCost(_Record):
    """One layer, or the embeddings."""

    name: str
    ms: float
    bound: str
    utilization: float
    mj: float | None


class EncoderCost(_Record):
    """An encoder on a target.

    Attributes:
        bounds: share of the time that each bound has, the largest first.
        utilization: of the units: the time that all products would take at their rates, over the time.
        notes: what is decoded, rounded or assumed on the way.
    """

    target: str
    description: str
    batch: int
    tokens: int
    weights: str
    activations: str
    attention: str
    ms: float
    bounds: dict[str, float]
    utilization: float
    mj: float | None
    layers: list[LayerCost]
    operations: list[OperationCost]
    notes: list[str]

    @property
    def bound(self) -> str:
        """What most of the time is spent on."""
        return next(iter(self.bounds), "nothing")


class Beside(_Record):
    """Model beside measurement, one case of one stored results file."""

    target: str
    results: str = Field(description="file in benchmarks/results")
    system: str
    model: str
    case: str
    tokens: int
    measured_ms: float
    modelled_ms: float

    @property
    def error(self) -> float:
        """Of the model, as a share of what was measured: above 0 it says too much."""
        return self.modelled_ms / self.measured_ms - 1.0
