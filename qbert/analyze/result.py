"""What an analysis returns: plain data that goes to JSON and back without loss."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qbert.analyze.roofline import Bound

META_DEVICE = "meta (no data)"  # the `environment.device` of a model that was only counted


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PredictedTime(_Data):
    """Roofline floor on the target; see `qbert.analyze.roofline`."""

    ms: float
    bound: Bound
    intensity: float = Field(description="matrix and vector FLOPs per byte moved")
    bytes_moved: int = Field(description="at the predicted dtype")
    launch_ms: float = Field(description="launches x launch latency, not part of ms")


class Shares(_Data):
    """Percent of the model's total (measured: of the sum of the components); None where there is no total."""

    parameters: float | None
    matmul_flops: float | None
    bytes_moved: float | None
    bytes_at_peak: float | None
    measured: float | None
    predicted: float | None


class ComponentResult(_Data):
    """One component, or the whole model (`component` is then ``total``)."""

    component: str
    parameters: int = Field(description="logical: of a quantized weight as many as it stands for")
    weight_bytes: int = Field(description="as the weights lie in memory")
    matmul_flops: int = Field(description="matrix products, a multiply-add is 2")
    vector_flops: int = Field(description="element-wise work, norms, softmax")
    bytes_moved: int = Field(description="inputs and outputs of every operation, at the model's dtype")
    launches: int = Field(description="operations that take a kernel")
    peak_bytes: int = Field(description="most activation bytes alive (of any component) while this one allocated")
    bytes_at_peak: int = Field(description="its activation bytes at the moment of the model's peak; these add up")
    measured_ms: float | None
    predicted: PredictedTime
    shares: Shares


class Measurement(_Data):
    """How the measured times came about; milliseconds, medians over `repeats` passes."""

    repeats: int
    total_ms: float = Field(description="plain forward pass")
    fastest_ms: float = Field(description="fastest of the plain passes")
    slowest_ms: float = Field(description="slowest of them")
    stamped_ms: float = Field(description="forward pass with a time stamp at every change of component")
    hook_cost_ms: float = Field(description="median difference of the two")
    remainder_ms: float = Field(description="total_ms less the sum of the components; about -hook_cost_ms")


class StepResult(_Data):
    """One step of a fused encoder."""

    layer: str
    step: str
    part: str
    operation: str
    scheme: str | None
    kernel: str
    n: int = Field(description="output channels; heads of attention; 0 where rows go in and out")
    k: int = Field(description="input channels; head size of attention")
    macs: int = Field(description="multiply-adds of matrix products")
    weight_bytes: int
    activation_bytes: int = Field(description="read and written")
    measured_ms: float | None


class PartResult(_Data):
    """The steps of one part of a fused encoder, as the survey breaks BERT down."""

    part: str
    macs: int
    weight_bytes: int
    activation_bytes: int
    measured_ms: float | None


class ProgramResult(_Data):
    """What a fused encoder ran, step by step."""

    encoder: str
    family: str
    scales: Literal["static", "dynamic"]
    extra_bytes: int = Field(description="memory held beside the modules' own")
    steps: list[StepResult]
    parts: list[PartResult]
    steps_ms: float | None = Field(description="of all steps")
    rest_ms: float | None = Field(description="of a plain forward, less the steps: Python, padding, pooler and heads")


class Environment(_Data):
    """Where the analysis ran."""

    device: str
    torch_version: str
    transformers_version: str | None
    threads: int


class TargetFigures(_Data):
    """The figures that the predicted times rest on."""

    name: str
    description: str
    peak_tflops: dict[str, float]
    vector_tflops: float
    bandwidth_gb_s: float
    launch_us: float
    source: str


class AnalyzeResult(_Data):
    """The breakdown of one model at one batch and sequence length."""

    schema_version: Literal[1] = 1
    model: str
    model_dtype: str
    attention_implementation: str | None
    batch: int
    seq: int
    dtype: str = Field(description="float precision of the predicted times")
    environment: Environment
    target: TargetFigures
    components: list[ComponentResult]
    total: ComponentResult
    measurement: Measurement | None
    programs: list[ProgramResult] = Field(default=[], description="one for each fused encoder")
    uncounted_ops: dict[str, int] = Field(description="operations whose FLOPs no rule knows: they count as 0")

    def component(self, name: str) -> ComponentResult:
        """The row of that component. Raises KeyError where there is none."""
        for row in self.components:
            if row.component == name:
                return row
        raise KeyError(name)
