"""qbert's linear operators on the CPU, beside torch's own: many tokens (bound by arithmetic) and few (bound by weight bytes).

    python -m benchmarks.bench_gemm                     int8 at BERT-base's shapes, then weight-only at 1 to 64 tokens
    python -m benchmarks.bench_gemm --kind compute --json build/gemm.json

Candidates of a problem run in turns. Between two turns it waits until no thread of this process is busy, because torch's idle
threads spin. With few tokens every call takes another copy of its weight, more of them than the caches hold: in a model, too,
each weight is met once a forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.bert_models import realistic_weights
from benchmarks.machine import Machine, bytes_beyond_caches, describe, physical_cores
from benchmarks.peers.base import one_line
from benchmarks.peers.child import come_to_rest
from qbert import ops as _ops  # noqa: F401  (defines torch.ops.qbert)
from qbert.dispatch import linear_operation, select_kernel, select_layout
from qbert.errors import QBertError
from qbert.formats import SCHEMES, Role
from qbert.quantizers import quantize
from qbert.target import cpu_target, native_cpu
from qbert.timing import interleaved_medians

Kind = Literal["compute", "memory"]
KINDS: tuple[Kind, ...] = ("compute", "memory")
# (output channels, input channels): the feed-forward network's two linears, and one of attention
SHAPES = ((3072, 768), (768, 3072), (768, 768))
COMPUTE_TOKENS, MEMORY_TOKENS = (1024, 16, 1), (1, 2, 4, 8, 16, 32, 64)
COMPUTE_SCHEMES, MEMORY_SCHEMES = ("w8a8", "w4a8", "gobo4a8", "gobo3a8"), ("w8a16", "w4a16", "gobo4", "gobo3")
TORCH_FP32, TORCH_BF16, TORCH_INT8 = "torch fp32", "torch bf16", "torch._int_mm"
_ENOUGH_SECONDS = 2e-3  # of one measurement: short calls are repeated
_PEAK_TRIES = 3
_GIGA = 1e9


class Row(BaseModel):
    """One candidate on one problem.

    Attributes:
        kind: compute (one weight, warm) or memory (copies of the weight in turn, cold).
        t, n, k: tokens, output channels, input channels.
        seconds: of one call, median of interleaved rounds.
        gops: multiply-adds count two, in 10^9 a second.
        weight_bytes: of one copy of the weight as the kernel reads it.
        gbs: weight bytes read, in 10^9 a second.
        peak_share: of what the same instruction reaches with operands in registers, on as many threads; None where unknown.
        speedup: over torch's float32.
        reason: why there is no time.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Kind
    t: int
    n: int
    k: int
    name: str
    kernel: str
    weight_bytes: int
    seconds: float | None = None
    gops: float | None = None
    gbs: float | None = None
    peak_share: float | None = None
    speedup: float | None = None
    reason: str | None = None


class GemmReport(BaseModel):
    """Everything."""

    model_config = ConfigDict(extra="forbid")

    benchmark: str = "gemm"
    machine: Machine
    threads: int
    peak_gops: float | None
    rows: list[Row]


class Candidate:
    """A call, over one or several copies of its weight.

    Args:
        weights: tensors of the weight, by argument name.
        call: takes them.
    """

    def __init__(self, kernel: str, weights: Mapping[str, Tensor], call: Callable[[Mapping[str, Tensor]], Any]) -> None:
        self.kernel = kernel
        self.weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        self._weights = weights
        self._call = call

    def runner(self, copies: int, repeats: int) -> Callable[[], None]:
        """So many calls, each with the next copy."""
        held = [self._weights, *({k: v.clone() for k, v in self._weights.items()} for _ in range(copies - 1))]
        turn = itertools.cycle(held)

        def run() -> None:
            for _ in range(repeats):
                self._call(next(turn))

        return run


def candidates(kind: Kind, t: int, n: int, k: int) -> dict[str, Candidate]:
    """Everything that computes a (t, k) x (n, k) linear with a bias, by name."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = realistic_weights(n, k, generator=generator), torch.randn(n, generator=generator)
    x = torch.randn(t, k, generator=generator)
    found = {
        TORCH_FP32: _torch_linear(x, weight, bias),
        TORCH_BF16: _torch_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
    }
    if kind == "compute":
        found[TORCH_INT8] = _torch_int8(x, weight)
    for name in COMPUTE_SCHEMES if kind == "compute" else MEMORY_SCHEMES:
        found[name] = _qbert_linear(name, x, weight, bias)
    return found


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Candidate:
    return Candidate("torch", {"weight": weight}, lambda held: torch.nn.functional.linear(x, held["weight"], bias))


def _torch_int8(x: Tensor, weight: Tensor) -> Candidate:
    """The int32 product alone: no scales, no bias."""
    codes, right = (torch.randint(-127, 128, like.shape, dtype=torch.int8) for like in (x, weight))
    return Candidate("torch", {"weight": right}, lambda held: torch._int_mm(codes, held["weight"].t()))


def _qbert_linear(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Candidate:
    scheme, target = SCHEMES[name], cpu_target()
    operation, layout = linear_operation(scheme), select_layout(scheme, Role.LINEAR, target)
    operator = getattr(torch.ops.qbert, operation).default
    held = quantize(weight, scheme).to_layout(layout).tensors
    given: dict[str, Any] = {"x": x, "bias": bias, "activation": "none", "out_dtype": x.dtype, "layout": layout.value}
    given["q"], given["s"] = torch.ops.qbert.quantize_per_token(x)
    names = [argument.name for argument in operator._schema.arguments]
    weights = {each: held[each] for each in names if each in held}

    def call(tensors: Mapping[str, Tensor]) -> Any:
        return operator(*(tensors[each] if each in tensors else given[each] for each in names))

    return Candidate(select_kernel(operation, target, layout).name, weights, call)


def measure(
    kind: Kind, t: int, n: int, k: int, *, repeats: int, peak: float | None, beyond: int | None = None
) -> list[Row]:
    """All candidates on one problem.

    Args:
        repeats: rounds.
        peak: products that the int8 instruction reaches, in 10^9 operations a second, or None.
        beyond: bytes that all copies of a cold weight hold at least; twice the last level cache by default.
    """
    beyond = bytes_beyond_caches() if beyond is None else beyond
    rows, runs, counts = [], {}, {}
    for name, candidate in candidates(kind, t, n, k).items():
        row = Row(kind=kind, t=t, n=n, k=k, name=name, kernel=candidate.kernel, weight_bytes=candidate.weight_bytes)
        rows.append(row)
        copies = 1 if kind == "compute" else 1 + beyond // max(1, candidate.weight_bytes)
        try:
            counts[name] = _repeats(candidate)
            runs[name] = candidate.runner(copies, counts[name])
        except (RuntimeError, QBertError) as error:
            row.reason = one_line(error)
    seconds = interleaved_medians(_with_rests(runs), repeats=repeats)
    for row in rows:
        if row.reason is None:
            _fill_in(row, seconds[row.name] / counts[row.name], peak)
    _add_speedups(rows)
    return rows


def _repeats(candidate: Candidate) -> int:
    """Calls that take long enough to be timed."""
    run = candidate.runner(1, 1)
    seconds = interleaved_medians({"": run}, repeats=3)[""]
    return max(1, int(_ENOUGH_SECONDS / seconds))


def _with_rests(runs: Mapping[str, Callable[[], None]]) -> dict[str, Callable[[], object]]:
    """A rest before each candidate's turn, as a candidate of its own whose time nobody looks at."""
    pairs = [((f"rest before {name}", come_to_rest), (name, run)) for name, run in runs.items()]
    return dict(itertools.chain.from_iterable(pairs))


def _fill_in(row: Row, seconds: float, peak: float | None) -> None:
    row.seconds = seconds
    row.gops = 2 * row.t * row.n * row.k / seconds / _GIGA
    row.gbs = row.weight_bytes / seconds / _GIGA
    if peak is not None and row.name in COMPUTE_SCHEMES:
        row.peak_share = row.gops / peak


def _add_speedups(rows: Iterable[Row]) -> None:
    rows = list(rows)
    base = next((row.seconds for row in rows if row.name == TORCH_FP32), None)
    for row in rows:
        row.speedup = base / row.seconds if base and row.seconds else None


def peak_gops(threads: int) -> float | None:
    """Operations a second of the best int8 instruction with operands in registers, in 10^9; None without the extension."""
    measured = getattr(native_cpu(), "peak_products_per_second", None)
    return None if measured is None else max(2 * float(measured(threads)) / _GIGA for _ in range(_PEAK_TRIES))


def problems(kinds: Iterable[Kind]) -> list[tuple[Kind, int, int, int]]:
    """(kind, t, n, k) of everything that is measured."""
    tokens: dict[Kind, tuple[int, ...]] = {"compute": COMPUTE_TOKENS, "memory": MEMORY_TOKENS}
    return [(kind, t, n, k) for kind in kinds for t in tokens[kind] for n, k in SHAPES]


def table(report: GemmReport, kind: Kind) -> Table:
    """The rows of one kind."""
    peak = f"; int8 peak {report.peak_gops:.0f} GOP/s" if report.peak_gops and kind == "compute" else ""
    cold = "" if kind == "compute" else ", weights out of cache"
    machine = report.machine
    title = f"linear, {kind}{cold}; {machine.device}; qbert on {machine.isa}; commit {machine.commit}{peak}"
    shown = Table(title=title, title_justify="left")
    for header in ("t", "n", "k", "candidate", "kernel", "us", "GOP/s", "% of peak", "GB/s weights", "x fp32"):
        shown.add_column(header, justify="left" if header in ("candidate", "kernel") else "right")
    last = None
    for row in (row for row in report.rows if row.kind == kind):
        if last not in (None, (row.t, row.n, row.k)):
            shown.add_section()
        last = (row.t, row.n, row.k)
        shown.add_row(str(row.t), str(row.n), str(row.k), row.name, row.reason or row.kernel, *_figures(row))
    return shown


def _figures(row: Row) -> list[str]:
    def cell(value: float | None, pattern: str) -> str:
        return "-" if value is None else pattern.format(value)

    share = None if row.peak_share is None else 100 * row.peak_share
    micro = None if row.seconds is None else 1e6 * row.seconds
    return [
        cell(micro, "{:.1f}"), cell(row.gops, "{:.1f}"), cell(share, "{:.0f}"), cell(row.gbs, "{:.1f}"),
        cell(row.speedup, "{:.2f}"),
    ]  # fmt: skip


def main(
    kind: Annotated[str, typer.Option(help=f"all, {' or '.join(KINDS)}")] = "all",
    repeats: Annotated[int, typer.Option(help="rounds that count")] = 9,
    threads: Annotated[int | None, typer.Option(help="all physical cores by default")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write everything to this file")] = None,
) -> None:
    """Times qbert's linear operators beside torch's."""
    errors = Console(stderr=True)
    kinds = [each for each in KINDS if kind in ("all", each)]
    if not kinds:
        errors.print(f"kind {kind!r}: allowed are all, {', '.join(KINDS)}")
        raise typer.Exit(2)
    machine = describe()
    threads = threads or physical_cores()
    torch.set_num_threads(threads)
    peak = peak_gops(threads)
    run = partial(measure, repeats=repeats, peak=peak)
    jobs = track(problems(kinds), console=errors, transient=True)
    report = GemmReport(machine=machine, threads=threads, peak_gops=peak, rows=[r for job in jobs for r in run(*job)])
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(report.model_dump_json(indent=1))
    console = Console()
    for each in kinds:
        console.print(table(report, each))


if __name__ == "__main__":
    typer.run(main)
