"""From what was counted, measured and predicted to the rows of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qbert.analyze.components import Component
from qbert.analyze.count import OpCount
from qbert.analyze.program import StepName
from qbert.analyze.result import ComponentResult, PartResult, PredictedTime, ProgramResult, Shares, StepResult
from qbert.analyze.roofline import Prediction
from qbert.analyze.weights import WeightCount
from qbert.encoder import Cost, FusedForward, Step

TOTAL = "total"
_PERCENT = 100.0


@dataclass(frozen=True)
class Facts:
    """All that is known of one component; the fields are those of `ComponentResult`."""

    ops: list[OpCount]
    weight: WeightCount
    peak_bytes: int
    bytes_at_peak: int
    measured_ms: float | None
    prediction: Prediction

    @property
    def matmul_flops(self) -> int:
        """FLOPs of the matrix products."""
        return sum(op.matmul_flops for op in self.ops)

    @property
    def bytes_moved(self) -> int:
        """Bytes at the model's dtype."""
        return sum(op.bytes_moved for op in self.ops)


def make_rows(
    facts: Mapping[Component, Facts], peak_bytes: int, total_ms: float | None
) -> tuple[list[ComponentResult], ComponentResult]:
    """Rows of the components and of the whole model.

    Args:
        facts: of every component.
        peak_bytes: the model's peak of activations.
        total_ms: measured time of a plain forward pass, or None. Shares of measured time refer to the sum of the
            components instead, which the remainder keeps apart from it.
    """
    whole = _sum(facts, peak_bytes)
    total = _row(TOTAL, whole, whole).model_copy(update={"measured_ms": total_ms})
    return [_row(component.value, each, whole) for component, each in facts.items()], total


def _sum(facts: Mapping[Component, Facts], peak_bytes: int) -> Facts:
    weight = WeightCount()
    for each in facts.values():
        weight.add(each.weight.parameters, each.weight.nbytes)
    measured = [each.measured_ms for each in facts.values() if each.measured_ms is not None]
    return Facts(
        ops=[op for each in facts.values() for op in each.ops],
        weight=weight,
        peak_bytes=peak_bytes,
        bytes_at_peak=peak_bytes,
        measured_ms=sum(measured) if measured else None,
        prediction=sum((each.prediction for each in facts.values()), Prediction()),
    )


def _row(name: str, part: Facts, whole: Facts) -> ComponentResult:
    prediction = part.prediction
    return ComponentResult(
        component=name,
        parameters=part.weight.parameters,
        weight_bytes=part.weight.nbytes,
        matmul_flops=part.matmul_flops,
        vector_flops=sum(op.vector_flops for op in part.ops),
        bytes_moved=part.bytes_moved,
        launches=sum(op.launches for op in part.ops),
        peak_bytes=part.peak_bytes,
        bytes_at_peak=part.bytes_at_peak,
        measured_ms=part.measured_ms,
        predicted=PredictedTime(
            ms=prediction.ms,
            bound=prediction.bound,
            intensity=prediction.intensity,
            bytes_moved=round(prediction.bytes_moved),
            launch_ms=prediction.launch_ms,
        ),
        shares=Shares(
            parameters=_share(part.weight.parameters, whole.weight.parameters),
            matmul_flops=_share(part.matmul_flops, whole.matmul_flops),
            bytes_moved=_share(part.bytes_moved, whole.bytes_moved),
            bytes_at_peak=_share(part.bytes_at_peak, whole.bytes_at_peak),
            measured=_share(part.measured_ms, whole.measured_ms),
            predicted=_share(prediction.ms, whole.prediction.ms),
        ),
    )


def _share(part: float | None, whole: float | None) -> float | None:
    return _PERCENT * part / whole if part is not None and whole else None


# ---- fused encoders -------------------------------------------------------------------------------------------------


def program_rows(
    name: str, fused: FusedForward, lengths: Sequence[int], step_ms: Mapping[StepName, float] | None, total_ms: float | None
) -> ProgramResult:  # fmt: skip
    """Rows of a fused encoder's steps and parts.

    Args:
        name: of the encoder, as in `StepName`.
        lengths: tokens of each sequence of the batch.
        step_ms: measured time of each step, or None.
        total_ms: measured time of a plain forward pass, or None.
    """
    encoder, measured = fused.encoder(), step_ms or {}
    steps = [
        _step_row(layer, step, step.cost(lengths), measured.get(StepName(name, layer, step.name)))
        for layer, step in encoder.program.steps()
    ]
    steps_ms = _measured(steps)
    return ProgramResult(
        encoder=name,
        family=encoder.program.family.name,
        scales="dynamic" if fused.calibration is None else "static",
        extra_bytes=fused.extra_bytes(),
        steps=steps,
        parts=[_part_row(part, cost, steps) for part, cost in encoder.program.cost_by_part(lengths).items()],
        steps_ms=steps_ms,
        rest_ms=None if total_ms is None or steps_ms is None else total_ms - steps_ms,
    )


def _step_row(layer: str, step: Step, cost: Cost, milliseconds: float | None) -> StepResult:
    return StepResult(
        layer=layer,
        step=step.name,
        part=step.part,
        operation=step.operation,
        scheme=None if step.scheme is None else step.scheme.name,
        kernel=step.kernel,
        n=step.shape[0],
        k=step.shape[1],
        macs=cost.macs,
        weight_bytes=cost.weight_bytes,
        activation_bytes=cost.activation_bytes,
        measured_ms=milliseconds,
    )


def _part_row(part: str, cost: Cost, steps: Sequence[StepResult]) -> PartResult:
    return PartResult(
        part=part,
        macs=cost.macs,
        weight_bytes=cost.weight_bytes,
        activation_bytes=cost.activation_bytes,
        measured_ms=_measured([step for step in steps if step.part == part]),
    )


def _measured(steps: Sequence[StepResult]) -> float | None:
    """Of all of them; None where nothing was measured."""
    times = [step.measured_ms for step in steps if step.measured_ms is not None]
    return sum(times) if times else None
