"""Does quantizing pay, and which scheme: from what was measured on a device, and from its roofline where nothing was.

Speed-ups are over the fastest float row of the same run, compiled or not: over what a user can have without any quantization,
not over float32. Where rows of the same shape were measured they are quoted; between two numbers of tokens they are
interpolated, on logarithms; linears that were measured alone stand for a whole encoder next; and where there is nothing, the
roofline says what is possible at most. Each answer says which of these it is.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from qbert.analyze.targets import HERE, TARGETS, RooflineTarget, measure_here
from qbert.errors import QBertError
from qbert.formats import SCHEMES, Scheme
from qbert.zoo import resolve_model

from .machine import describe
from .problems import LINEAR_SCHEMES, SHAPES, Shape, read_config, shape_of
from .results_schema import RESULTS, AccuracyRow, BertRow, GemmRow, Results, load_results

Basis = Literal["measured", "interpolated", "linears", "roofline"]
BASES: dict[Basis, str] = {
    "measured": "measured on this device, this shape",
    "interpolated": "interpolated between shapes measured on this device",
    "linears": "linears measured alone on this device; the rest assumed alike",
    "roofline": "modelled by the roofline only: at most",
}
# Less is not worth a change of the model. What is modelled only is an upper bound that no kernel reaches.
WORTH: dict[Basis, float] = {"measured": 1.1, "interpolated": 1.15, "linears": 1.25, "roofline": 1.5}
MAX_DROP = 1.0  # points
_EQUAL = 0.97  # less apart than that is no difference
_NEAR = 2.0  # a number of tokens this much beyond what was measured still counts as near
_SYSTEM = re.compile(r"qbert-(?P<scheme>[a-z0-9]+)(?P<how>(-static|-graph|-unfused)*)")
_FLOAT_SYSTEMS = "torch-"
_LAYER_PASSES = 12  # reads and writes of (tokens, hidden) values a layer between its products: norms, residuals, GELU
_LAYER_LAUNCHES = 7
_LAUNCH_BOUND = 2.0
_FLOAT_PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Encoder:
    """A model: what it is called, and its sizes."""

    name: str
    shape: Shape


class Option(BaseModel):
    """One way to run the model.

    Attributes:
        name: scheme, with ":static" or ":dynamic" for the fused encoder, ":graph" for CUDA graphs.
        speedup: expected, over the fastest float row; None where nothing is known.
        basis: where that comes from; `detail` says it in words.
        share_of_float32: of the stored model.
        drop, drop_interval: in points of accuracy, and the model and task that it was measured on.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    scheme: str
    speedup: float | None
    basis: Basis
    detail: str
    share_of_float32: float
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    drop_on: str | None = None


class Advice(BaseModel):
    """The answer.

    Attributes:
        best: name of the option to take; None: do not quantize for speed.
        reason: why, in a sentence or two.
        smallest: the smallest option whose accuracy holds, for whom size counts.
        faster_elsewhere: rows of other libraries that beat qbert's best in the nearest measured case.
        results: files that were read.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    target: str
    batch: int
    seq: int
    best: str | None
    reason: str
    smallest: str | None
    options: list[Option]
    faster_elsewhere: list[str] = []
    results: list[str] = []

    @property
    def verdict(self) -> str:
        """In three words."""
        return "do not quantize" if self.best is None else f"quantize with {self.best}"


def advise(
    model: str, batch: int, seq: int, target: str = HERE, *, results: Sequence[Results] | None = None,
    roofline: RooflineTarget | None = None, max_drop: float = MAX_DROP,
) -> Advice:  # fmt: skip
    """What pays for this model on batches of this shape.

    Args:
        model: base, large, minilm-shape, or what `resolve_model` takes.
        target: "here", or a GPU of `qbert.analyze.TARGETS`.
        results: what was measured; by default all files in `benchmarks/results`.
        roofline: of the target; by default its datasheet, or measured here where it is needed.
        max_drop: points of accuracy that an option may cost.

    Raises:
        QBertError: unknown model or target, or a batch or length that is not positive.
    """
    if batch < 1 or seq < 1:
        raise QBertError(f"batch {batch}, seq {seq}: must be positive")
    if target != HERE and target not in TARGETS:
        raise QBertError(f"unknown target {target!r}; allowed: {', '.join((HERE, *TARGETS))}")
    encoder = encoder_of(model)
    found = list(stored_results()) if results is None else list(results)
    device = [each for each in found if on_target(each, target)]
    rates = functools.cache(lambda: roofline or (measure_here() if target == HERE else TARGETS[target]))
    options = [*_from_encoders(encoder, batch, seq, device)]
    for name in LINEAR_SCHEMES:
        if not any(each.scheme == name for each in options):
            options.append(
                _from_linears(encoder, name, batch * seq, device) or _modelled(encoder, name, batch, seq, rates())
            )
    for option in options:
        _add_accuracy(option, encoder, found)
    options.sort(key=lambda each: -(each.speedup or 0.0))
    best, reason = _choose(options, max_drop, encoder, batch, seq, rates if target != HERE else None)
    return Advice(
        model=model, target=target, batch=batch, seq=seq, best=best, reason=reason, smallest=_smallest(options, max_drop),
        options=options, faster_elsewhere=_elsewhere(encoder, batch * seq, device), results=[each.path.name for each in device],
    )  # fmt: skip


# ---- what there is --------------------------------------------------------------------------------------------------


def encoder_of(model: str) -> Encoder:
    """The shape behind a name.

    Raises:
        QBertError: unknown, or no encoder.
    """
    if model in SHAPES:
        return Encoder(model, SHAPES[model])
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        raise QBertError(f"model {model!r} is not here; allowed: a folder, an alias, or {', '.join(SHAPES)}")
    config = read_config(folder)
    shape = shape_of(config)
    if shape is None:
        raise QBertError(
            f"model {model!r}: its configuration ({type(config).__name__}) is that of no BERT-type encoder"
        )
    return Encoder(model, shape)


def stored_results(folder: Path = RESULTS) -> Iterable[Results]:
    """All results files below a folder."""
    return [load_results(path) for path in sorted(folder.rglob("*.json"))]


def on_target(results: Results, target: str) -> bool:
    """Whether they were measured on that device."""
    gpu = results.machine.gpu
    if target == HERE:
        return gpu is None and results.machine.slug == _here()
    return gpu is not None and re.search(rf"\b{target}\b", gpu.name, re.IGNORECASE) is not None


@functools.cache
def _here() -> str:
    return describe("cpu").slug


# ---- expected speed -------------------------------------------------------------------------------------------------


def _from_encoders(encoder: Encoder, batch: int, seq: int, results: Sequence[Results]) -> Iterable[Option]:
    """One option for each of qbert's rows that whole encoders of this model were measured with."""
    points: dict[str, dict[int, float]] = {}
    exact: dict[str, float] = {}
    for each in results:
        for case in _cases(each, encoder):
            for row in case:
                if not (fit := _SYSTEM.fullmatch(row.name)):
                    continue
                speedup = _over_float(row, case)
                if speedup is None or fit["scheme"] not in SCHEMES:
                    continue
                points.setdefault(row.name, {})[row.tokens] = speedup
                if (row.batch, row.width) == (batch, seq):
                    exact[row.name] = speedup
    for name, measured in points.items():
        if name in exact:
            yield _option(encoder, name, exact[name], "measured", f"{batch} x {seq}")
        elif (between := interpolate(measured, batch * seq)) is not None:
            low, high = min(measured), max(measured)
            yield _option(
                encoder, name, between, "interpolated", f"from {len(measured)} shapes of {low} to {high} tokens"
            )


def _cases(results: Results, encoder: Encoder) -> list[list[BertRow]]:
    """Rows of dense batches of this model, case by case."""
    cases: dict[str, list[BertRow]] = {}
    for row in results.of(BertRow):
        same = row.model in _names(encoder)
        if same and row.time is not None and row.padding_share == 0 and row.tokens == row.batch * row.width:
            cases.setdefault(row.case, []).append(row)
    return list(cases.values())


def _names(encoder: Encoder) -> set[str]:
    """Names in results that stand for this shape: random weights run as fast as trained ones."""
    sizes = lambda shape: (shape.family, shape.layers, shape.hidden, shape.inner)
    return {encoder.name, *(name for name, shape in SHAPES.items() if sizes(shape) == sizes(encoder.shape))}


def _over_float(row: BertRow, case: Sequence[BertRow]) -> float | None:
    floats = [each.time.median for each in case if each.time is not None and each.name.startswith(_FLOAT_SYSTEMS)]
    return None if row.time is None or not floats else min(floats) / row.time.median


def interpolate(points: dict[int, float], tokens: int) -> float | None:
    """A speed-up for so many tokens, on logarithms of both; the nearest one just outside; None far outside."""
    below = max((t for t in points if t <= tokens), default=None)
    above = min((t for t in points if t >= tokens), default=None)
    if below is None or above is None:
        nearest = above if below is None else below
        if nearest is None or max(nearest / tokens, tokens / nearest) > _NEAR:
            return None
        return points[nearest]
    if below == above:
        return points[below]
    weight = math.log(tokens / below) / math.log(above / below)
    return math.exp((1 - weight) * math.log(points[below]) + weight * math.log(points[above]))


def _from_linears(encoder: Encoder, scheme: str, tokens: int, results: Sequence[Results]) -> Option | None:
    """From rows of `bench_gemm` with just this model's shapes: their times, added up."""
    name = f"qbert {scheme}" + (" + quantize" if SCHEMES[scheme].activation else "")
    for each in reversed(results):
        rows = [row for row in each.of(GemmRow) if row.time is not None]
        sums = [(_seconds(rows, n, k, tokens, name), _best_float(rows, n, k, tokens)) for n, k in encoder.shape.linears]
        if all(ours and floats for ours, floats in sums):
            speedup = sum(floats for _, floats in sums if floats) / sum(ours for ours, _ in sums if ours)
            return _option(encoder, f"qbert-{scheme}", speedup, "linears", f"{len(sums)} shapes of `qbert bench gemm`")
    return None


def _seconds(rows: Sequence[GemmRow], n: int, k: int, tokens: int, name: str) -> float | None:
    points = {
        row.t: row.time.median for row in rows if (row.n, row.k, row.name) == (n, k, name) and row.time is not None
    }
    return interpolate(points, tokens)


def _best_float(rows: Sequence[GemmRow], n: int, k: int, tokens: int) -> float | None:
    times = [_seconds(rows, n, k, tokens, f"torch {precision}") for precision in _FLOAT_PRECISIONS]
    return min((each for each in times if each is not None), default=None)


def _modelled(encoder: Encoder, scheme: str, batch: int, seq: int, rates: RooflineTarget) -> Option:
    ours = modelled_seconds(encoder, batch, seq, rates, SCHEMES[scheme])
    return _option(
        encoder, f"qbert-{scheme}", modelled_seconds(encoder, batch, seq, rates) / ours, "roofline", rates.source
    )


def modelled_seconds(
    encoder: Encoder, batch: int, seq: int, rates: RooflineTarget, scheme: Scheme | None = None
) -> float:  # fmt: skip
    """Floor of a forward: each product and each pass over values at the device's peak; float where there is no scheme."""
    tokens = batch * seq
    precision = max((each for each in _FLOAT_PRECISIONS if each in rates.peaks), key=rates.peak)
    value_bytes = 4 if precision == "fp32" else 2
    integer = scheme is not None and scheme.activation is not None
    peak = rates.peak("int8" if integer and "int8" in rates.peaks else precision)
    weight_bytes = value_bytes if scheme is None else scheme.weight_bits / 8
    in_bytes = 1 if integer else value_bytes
    products = 0.0
    for n, k in encoder.shape.linears:
        moved = weight_bytes * n * k + in_bytes * tokens * k + value_bytes * tokens * n
        products += max(2.0 * tokens * n * k / peak, moved / rates.bandwidth)
    attention = 4.0 * batch * seq**2 * encoder.shape.hidden / rates.peak(precision)
    between = _LAYER_PASSES * value_bytes * tokens * encoder.shape.hidden / rates.bandwidth
    return encoder.shape.layers * (products + attention + between)


# ---- size and accuracy ----------------------------------------------------------------------------------------------


def _option(encoder: Encoder, system: str, speedup: float, basis: Basis, detail: str) -> Option:
    fit = _SYSTEM.fullmatch(system)
    assert fit is not None
    scheme, how = fit["scheme"], fit["how"]
    fused = "static" if "-static" in how else "dynamic"
    name = scheme if "-unfused" in how or basis in ("linears", "roofline") else f"{scheme}:{fused}"
    return Option(
        name=name + (":graph" if "-graph" in how else ""), scheme=scheme, speedup=speedup, basis=basis, detail=detail,
        share_of_float32=_share(encoder, SCHEMES[scheme]),
    )  # fmt: skip


def _share(encoder: Encoder, scheme: Scheme) -> float:
    """Of the stored bytes, embeddings left float: what `quantize_` does unless it is told otherwise."""
    group = 0.0 if not scheme.group_size else (8 if scheme.activation else 16) / scheme.group_size
    linears = encoder.shape.linear_weights * (scheme.weight_bits + group) / 8
    return (linears + 4 * encoder.shape.table_weights) / (
        4 * (encoder.shape.linear_weights + encoder.shape.table_weights)
    )


def _add_accuracy(option: Option, encoder: Encoder, results: Sequence[Results]) -> None:
    """From this model's rows, else any other's: the largest drop over the tasks."""
    rows = [row for each in results for row in each.of(AccuracyRow) if _is_of(row, option)]
    own = [row for row in rows if row.model in _names(encoder)]
    worst = max(own or rows, key=lambda row: row.drop or 0.0, default=None)
    if worst is None or worst.drop is None:
        return
    option.drop, option.drop_on = 100 * worst.drop, f"{worst.model}, {worst.task}"
    if worst.drop_low is not None and worst.drop_high is not None:
        option.drop_interval = (100 * worst.drop_low, 100 * worst.drop_high)
    if worst.share_of_float32 is not None and worst.model in _names(encoder):
        option.share_of_float32 = worst.share_of_float32


def _is_of(row: AccuracyRow, option: Option) -> bool:
    """Of the same scheme, run the same way where that makes a difference; embeddings float."""
    return not row.published and row.library == "qbert" and row.drop is not None and row.name in (
        option.name.removesuffix(":graph"), f"{option.scheme}:dynamic" if ":" not in option.name else option.scheme,
    )  # fmt: skip


# ---- the answer -----------------------------------------------------------------------------------------------------


def _keeps(option: Option, max_drop: float) -> bool:
    """Its accuracy is not known to be worse than allowed."""
    return option.drop is None or option.drop <= max_drop


def _choose(
    options: Sequence[Option], max_drop: float, encoder: Encoder, batch: int, seq: int,
    rates: Callable[[], RooflineTarget] | None,
) -> tuple[str | None, str]:  # fmt: skip
    """The option to take and why, or None and why not."""
    nothing_measured = all(each.basis == "roofline" for each in options)
    if rates is not None and nothing_measured and (bound := _bound_by_launches(encoder, batch, seq, rates())):
        return None, bound
    fit = [each for each in options if _keeps(each, max_drop) and each.speedup is not None]
    paying = [each for each in fit if (each.speedup or 0) >= WORTH[each.basis]]
    if not paying:
        return None, _why_not(options, fit, max_drop)
    # What was measured comes before what is only modelled, however high that is.
    sure = [each for each in paying if each.basis != "roofline"] or paying
    fastest = max(each.speedup or 0 for each in sure)
    # Of equally fast ones the one that keeps the most bits.
    equal = [each for each in sure if (each.speedup or 0) >= _EQUAL * fastest]
    best = max(equal, key=lambda each: (SCHEMES[each.scheme].weight_bits, each.speedup or 0))
    unknown = "" if best.drop is not None else "; its accuracy was not measured: try `qbert compare`"
    at_most = "at most " if best.basis == "roofline" else ""
    return best.name, (
        f"{at_most}{best.speedup:.2f} times as fast as the fastest float ({BASES[best.basis]}; {best.detail}){unknown}"
    )


def _bound_by_launches(encoder: Encoder, batch: int, seq: int, rates: RooflineTarget) -> str | None:
    """A reason, where a GPU's host needs longer to launch a forward's kernels than these need to run in float."""
    launches, floor = (
        encoder.shape.layers * _LAYER_LAUNCHES * rates.launch_s,
        modelled_seconds(encoder, batch, seq, rates),
    )
    if launches <= _LAUNCH_BOUND * floor:
        return None
    return (
        f"so small a problem is bound by launching kernels ({launches * 1e6:.0f} us), not by what they compute "
        f"({floor * 1e6:.0f} us in float at best): a CUDA graph helps, fewer bits do not"
    )


def _why_not(options: Sequence[Option], fit: Sequence[Option], max_drop: float) -> str:
    if not fit:
        return f"every scheme costs more than the {max_drop:g} points of accuracy that are allowed"
    best = max(fit, key=lambda each: each.speedup or 0)
    lost = max(options, key=lambda each: each.speedup or 0)
    reason = (
        f"the best that keeps its accuracy, {best.name}, is expected to be {best.speedup:.2f} times as fast as the fastest "
        f"float ({BASES[best.basis]}): less than the {WORTH[best.basis]:g} that is worth it"
    )
    if lost.name != best.name and (lost.speedup or 0) >= WORTH[lost.basis]:
        reason += f"; {lost.name} is faster, {lost.speedup:.2f}, but costs {lost.drop:.1f} points"
    return reason


def _smallest(options: Sequence[Option], max_drop: float) -> str | None:
    fit = [each for each in options if _keeps(each, max_drop)]
    return min(fit, key=lambda each: each.share_of_float32).name if fit else None


def _elsewhere(encoder: Encoder, tokens: int, results: Sequence[Results]) -> list[str]:
    """Other libraries' rows that are faster than qbert's best in the measured case nearest to so many tokens."""
    cases = [case for each in results for case in _cases(each, encoder)]
    if not cases:
        return []
    nearest = min(cases, key=lambda case: abs(math.log(case[0].tokens / tokens)))
    faster = [row for row in nearest if not row.name.startswith("qbert") and (row.over_best_qbert or 1) < 1]
    return [
        f"{row.name} in {row.case}: {1 / (row.over_best_qbert or 1):.2f} times as fast as qbert's best"
        for row in faster
    ]


def table(advice: Advice) -> Table:
    """All options, the fastest first."""
    shown = Table(
        title=f"{advice.model}, {advice.batch} x {advice.seq} tokens on {advice.target}: {advice.verdict}",
        title_justify="left", caption_justify="left",
        caption="speed-up: over the fastest float row of the same run. drop: points of accuracy with its 95% interval, the "
        "largest of the tasks measured; embeddings stay float.",
    )  # fmt: skip
    for header in ("scheme", "speed-up", "% of float32", "drop", "measured on", "how sure"):
        shown.add_column(
            header, justify="left" if header in ("scheme", "measured on", "how sure") else "right", overflow="fold"
        )
    for option in advice.options:
        ends = option.drop_interval
        interval = "" if ends is None else f" [{ends[0]:+.1f}, {ends[1]:+.1f}]"
        at_most = "at most " if option.basis == "roofline" else ""
        shown.add_row(
            option.name, "-" if option.speedup is None else f"{at_most}{option.speedup:.2f}",
            f"{option.share_of_float32:.0%}", "not measured" if option.drop is None else f"{option.drop:+.1f}{interval}",
            option.drop_on or "-", f"{BASES[option.basis]}: {option.detail}",
        )  # fmt: skip
    return shown
