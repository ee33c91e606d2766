"""The entry point: count, measure, predict, and put the rows together."""

from __future__ import annotations

import importlib.metadata

import torch
from torch import nn

from qbert.analyze.components import Component
from qbert.analyze.count import count_ops
from qbert.analyze.inputs import make_inputs, require_encoder, require_positive
from qbert.analyze.measure import Latency, measure_latency
from qbert.analyze.memory import peak_memory
from qbert.analyze.program import fused_encoders, whole_programs
from qbert.analyze.result import META_DEVICE, AnalyzeResult, Environment, Measurement, TargetFigures
from qbert.analyze.roofline import predict
from qbert.analyze.rows import Facts, make_rows, program_rows
from qbert.analyze.targets import DTYPE_BYTES, DTYPE_NAMES, HERE, RooflineTarget, device_description, get_target
from qbert.analyze.weights import count_weights
from qbert.errors import QBertError
from qbert.modes import evaluation_mode

DEFAULT_REPEATS = 10
_TERA, _GIGA, _MICRO = 1e12, 1e9, 1e-6


def analyze(
    model: nn.Module,
    *,
    batch: int,
    seq: int,
    target: str | RooflineTarget = HERE,
    dtype: str | None = None,
    measure: bool = True,
    repeats: int = DEFAULT_REPEATS,
    name: str | None = None,
) -> AnalyzeResult:
    """Where parameters, FLOPs, bytes, run-time memory and latency of an encoder are.

    Args:
        model: a transformers encoder with or without a task head, or any module with `config.vocab_size` that takes
            `input_ids`; float, quantized or fused (which shows its program, too, step by step). It runs where its weights
            are, in eval mode and without CUDA graphs, and is left as it was.
        batch: sequences.
        seq: tokens of each; none of them padding.
        target: machine of the predicted times: a name in `TARGETS`, ``"here"`` (measured), or a `RooflineTarget`.
        dtype: float precision of the predicted times (fp32, tf32, bf16, fp16); the model's own by default.
        measure: time the model here. A model on the meta device can only be counted.
        repeats: timed passes of each kind.
        name: what reports call the model; its class by default.

    Raises:
        QBertError: a value that is not allowed, named with what is.
    """
    model = require_encoder(model)
    require_positive("repeats", repeats)
    device, model_dtype = _device_and_dtype(model)
    if measure and device.type == "meta":
        raise QBertError("model is on the meta device and cannot be timed; allowed: measure=False, or real weights")
    own_dtype = DTYPE_NAMES[model_dtype]
    dtype = own_dtype if dtype is None else dtype
    if dtype not in DTYPE_BYTES:
        raise QBertError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPE_BYTES)}")
    inputs = make_inputs(model, batch, seq, device)
    machine = _machine(target, device)
    with evaluation_mode(model), whole_programs(model):
        counts = count_ops(model, inputs, model_dtype)
        peak = peak_memory(model, inputs)
        latency = measure_latency(model, inputs, device, repeats) if measure else None
    weights = count_weights(model)
    facts = {
        each: Facts(
            ops=counts.of(each),
            weight=weights[each],
            peak_bytes=peak.while_running[each],
            bytes_at_peak=peak.at_peak[each],
            measured_ms=latency.component_ms[each] if latency else None,
            prediction=predict(counts.of(each), machine, dtype, own_dtype),
        )
        for each in Component
    }
    total_ms, step_ms = (latency.total_ms, latency.step_ms) if latency else (None, None)
    components, total = make_rows(facts, peak.total, total_ms)
    return AnalyzeResult(
        model=name or type(model).__name__,
        model_dtype=own_dtype,
        attention_implementation=getattr(getattr(model, "config", None), "_attn_implementation", None),
        batch=batch,
        seq=seq,
        dtype=dtype,
        environment=_environment(device),
        target=_target_figures(machine),
        components=components,
        total=total,
        measurement=_measurement(latency),
        programs=[
            program_rows(encoder, fused, [seq] * batch, step_ms, total_ms)
            for encoder, fused in fused_encoders(model).items()
        ],
        uncounted_ops=dict(counts.uncounted),
    )


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the model is, and the dtype of its float parameters."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            if parameter.dtype not in DTYPE_NAMES:
                allowed = ", ".join(str(dtype) for dtype in DTYPE_NAMES)
                raise QBertError(f"model has {parameter.dtype} parameters; allowed: {allowed}")
            return parameter.device, parameter.dtype
    raise QBertError(f"model {type(model).__name__} has no floating-point parameter; allowed: an encoder with weights")


def _machine(target: str | RooflineTarget, device: torch.device) -> RooflineTarget:
    if isinstance(target, RooflineTarget):
        return target
    # A model without data has no "here" of its own; the CPU stands in.
    return get_target(target, torch.device("cpu") if device.type == "meta" else device)


def _measurement(latency: Latency | None) -> Measurement | None:
    if latency is None:
        return None
    return Measurement(
        repeats=latency.repeats,
        total_ms=latency.total_ms,
        fastest_ms=latency.fastest_ms,
        slowest_ms=latency.slowest_ms,
        stamped_ms=latency.stamped_ms,
        hook_cost_ms=latency.hook_cost_ms,
        remainder_ms=latency.remainder_ms,
    )


def _environment(device: torch.device) -> Environment:
    try:
        transformers_version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        transformers_version = None
    return Environment(
        device=META_DEVICE if device.type == "meta" else device_description(device),
        torch_version=torch.__version__,
        transformers_version=transformers_version,
        threads=torch.get_num_threads(),
    )


def _target_figures(machine: RooflineTarget) -> TargetFigures:
    return TargetFigures(
        name=machine.name,
        description=machine.description,
        peak_tflops={precision: peak / _TERA for precision, peak in machine.peaks.items()},
        vector_tflops=machine.vector_flops / _TERA,
        bandwidth_gb_s=machine.bandwidth / _GIGA,
        launch_us=machine.launch_s / _MICRO,
        source=machine.source,
    )
