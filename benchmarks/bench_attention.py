"""Attention alone: qbert's int8 attention on packed tokens beside torch's `scaled_dot_product_attention` and FlashAttention.

    python -m benchmarks.bench_attention --quick
    python -m benchmarks.bench_attention --target cuda --json out.json

All read query, key and value as one projection leaves them, (tokens, 3, heads, head size). qbert reads int8 codes, the others
what these stand for, in bfloat16 or float16. Operations are counted without padding, a multiply-add as two, so figures in
TFLOP/s compare: what computes padding has fewer. Every result is held to float64 first.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from qbert import ops
from qbert.errors import QBertError
from qbert.ops.kernel import problem_of
from qbert.ops.operations import Attention, Out
from qbert.ops.table import select
from qbert.target import physical_cores, target_of
from qbert.timing import Candidate, Rules, Unavailable, measure, ratio, reason_of

from . import options
from .bert_inputs import squad_lengths
from .bounds import Bounds
from .ceilings import device_bounds
from .machine import Machine
from .peers.base import library
from .problems import PRECISIONS, SHAPES
from .recorder import Recorder, check_picture, device_name, device_of, run_command, table_console
from .results_schema import AttentionRow, Precision, Work

BASELINE = "torch sdpa"
LENGTHS = (128, 512, 384, 64, 256)
# Kind of heads -> (heads, head size).
HEADS = {
    name: (SHAPES[shape].heads, SHAPES[shape].head_dim)
    for name, shape in {"base": "base", "large": "large", "minilm": "minilm-shape"}.items()
}
TOKENS = {"cpu": 1024, "cuda": 16384}  # of a dense batch
RAGGED = {"cpu": 4, "cuda": 64}  # sequences, with lengths as in SQuAD
SECONDS, QUICK_SECONDS = 0.3, 0.1
_LIMIT = 0.03  # largest error over the largest value; probabilities of 8 bits have 0.01
_SCALES = (0.02, 0.03, 0.01)  # of int8 query, key and value
_MICRO, _TERA, _GIGA = 1e6, 1e12, 1e9

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Sequences of these lengths."""

    lengths: tuple[int, ...]
    heads: int
    head_dim: int

    @property
    def ragged(self) -> bool:
        """Whether they differ."""
        return len(set(self.lengths)) > 1

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(self.lengths)

    @property
    def operations(self) -> float:
        """Of both products, without padding."""
        return 4.0 * sum(length**2 for length in self.lengths) * self.heads * self.head_dim


@dataclass
class Problem:
    """A case with its numbers, which are the same for all candidates.

    Attributes:
        codes: (tokens, 3, heads, head size) int8, packed.
        values: what they stand for, float32.
    """

    case: Case
    device: torch.device
    codes: Tensor = field(init=False)
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        case, generator = self.case, torch.Generator(self.device).manual_seed(0)
        shape = (case.tokens, 3, case.heads, case.head_dim)
        normal = torch.randn(shape, generator=generator, device=self.device)
        self.codes = (normal * 40).clamp(-127, 127).round().to(torch.int8)
        self.values = self.codes * torch.tensor(_SCALES, device=self.device)[:, None, None]

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        """(batch + 1,) int32."""
        lengths = torch.tensor(self.case.lengths, device=self.device)
        return pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    @functools.cached_property
    def there(self) -> Tensor:
        """(batch, width) bool: where a token is."""
        lengths = torch.tensor(self.case.lengths, device=self.device)
        return torch.arange(max(self.case.lengths), device=self.device) < lengths[:, None]

    @functools.cached_property
    def expected(self) -> Tensor:
        """(tokens, heads, head size) float64, sequence by sequence."""
        parts = []
        for sequence in self.values.double().split(list(self.case.lengths)):
            query, key, value = sequence.permute(1, 2, 0, 3)
            scores = query @ key.transpose(1, 2) / math.sqrt(self.case.head_dim)
            parts.append((scores.softmax(-1) @ value).transpose(0, 1))
        return torch.cat(parts)

    def padded(self, dtype: torch.dtype) -> Tensor:
        """(batch, width, 3, heads, head size), random numbers at padding: never zeros."""
        batch, width = self.there.shape
        full = torch.randn(batch, width, *self.values.shape[1:], device=self.device)
        full[self.there] = self.values
        return full.to(dtype)


@dataclass(frozen=True)
class Built:
    """A candidate, ready: `unpadded` gives (tokens, heads, head size) of its result."""

    candidate: Candidate
    unpadded: Callable[[Tensor], Tensor]
    padding: str
    kernel: str
    work: Work
    scale: float = 1.0  # of a result in int8


@dataclass(frozen=True)
class Entry:
    """What a candidate is, before it is built."""

    name: str
    library: str
    build: Callable[[Problem], Built]
    configuration: str = ""


# ---- candidates -----------------------------------------------------------------------------------------------------


def entries(device: torch.device) -> Iterator[Entry]:
    """Everything that is measured, the baseline first."""
    yield Entry(BASELINE, "torch", _sdpa, "torch's own choice of a backend, bfloat16")
    if device.type == "cuda":
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            name = f"torch sdpa {backend.partition('_')[0].lower()}"
            yield Entry(name, "torch", functools.partial(_sdpa, backend=backend), "bfloat16")
        yield Entry("torch varlen_attn", "torch", _varlen, "FlashAttention on packed tokens, bfloat16")
        yield Entry("flash_attn", "flash_attn", _flash_attn, "flash_attn_varlen_func on packed tokens, float16")
    else:
        yield Entry("torch sdpa fp32", "torch", functools.partial(_sdpa, dtype=torch.float32), "float32")
    yield Entry("torch math", "torch", functools.partial(_sdpa, math_=True), "two products and a softmax, bfloat16")
    yield Entry("qbert int8", "qbert", _qbert, "static scales, leaves float")
    yield Entry(
        "qbert int8 per token", "qbert", functools.partial(_qbert, per_token=True), "scales per token, leaves float"
    )
    yield Entry("qbert int8 int8 out", "qbert", functools.partial(_qbert, requant=True), "static scales, leaves int8")


def _work(problem: Problem, precision: Precision, in_bytes: int, out_bytes: int) -> Work:
    values = problem.case.tokens * problem.case.heads * problem.case.head_dim
    return Work(operations=problem.case.operations, precision=precision, bytes=values * (3 * in_bytes + out_bytes))


def _sdpa(
    problem: Problem, backend: str | None = None, dtype: torch.dtype = torch.bfloat16, math_: bool = False
) -> Built:
    qkv, ragged = problem.padded(dtype), problem.case.ragged
    seen = problem.there[:, None, None, :] if ragged else None
    attend: Attend = _plain if math_ else scaled_dot_product_attention

    def call(qkv: Tensor) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in qkv.unbind(2))
        with _only(backend):
            return attend(query, key, value, attn_mask=seen)

    return Built(
        Candidate(call, [(qkv,)]), lambda found: found.transpose(1, 2)[problem.there], "masked" if ragged else "none",
        (backend or ("math" if math_ else "chosen by torch")).lower(),
        _work(problem, PRECISIONS[dtype], dtype.itemsize, dtype.itemsize),
    )  # fmt: skip


def _only(backend: str | None) -> Any:
    if backend is None:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([getattr(SDPBackend, backend)])


def _plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ value


def _packed(problem: Problem, dtype: torch.dtype, kernel: str, attend: Callable[[Tensor], Tensor]) -> Built:
    return Built(
        Candidate(attend, [(problem.values.to(dtype),)]), lambda found: found,
        "not computed" if problem.case.ragged else "none", kernel, _work(problem, PRECISIONS[dtype], 2, 2),
    )  # fmt: skip


def _varlen(problem: Problem) -> Built:
    function, longest, offsets = (
        library("torch.nn.attention.varlen").varlen_attn,
        max(problem.case.lengths),
        problem.cu_seqlens,
    )
    call = lambda qkv: function(*qkv.unbind(1), offsets, offsets, longest, longest)
    return _packed(problem, torch.bfloat16, "flash_attention", call)


def _flash_attn(problem: Problem) -> Built:
    function, longest, offsets = (
        library("flash_attn").flash_attn_varlen_func,
        max(problem.case.lengths),
        problem.cu_seqlens,
    )
    call = lambda qkv: function(*qkv.unbind(1), offsets, offsets, longest, longest)
    return _packed(problem, torch.float16, "flash_attn", call)


def _qbert(problem: Problem, per_token: bool = False, requant: bool = False) -> Built:
    case, device = problem.case, problem.device
    cuda = device.type == "cuda"
    out_dtype = torch.bfloat16 if cuda else torch.float32
    scales = torch.tensor(_SCALES, device=device)
    scales = scales.expand(case.tokens, 3).contiguous() if per_token else scales
    out_scale = float(problem.expected.abs().max()) / 127
    out: Out = out_scale if requant else out_dtype
    a = Attention(
        problem.codes.flatten(1), scales, problem.cu_seqlens, case.heads, case.head_dim**-0.5, None, None, None, out
    )
    kernel = select("attention", problem_of(a), target_of(device)).name
    # Its second product is in float16 on a GPU: held to the bound of the other candidates there.
    work = _work(problem, "bf16" if cuda else "int8", 1, 1 if requant else out_dtype.itemsize)
    return Built(
        Candidate(ops.call, [(a,)]),
        lambda found: found.view(case.tokens, case.heads, case.head_dim),
        "not computed" if case.ragged else "none", kernel, work, out_scale if requant else 1.0,
    )  # fmt: skip


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure_case(
    case: Case, device: torch.device, seconds: float, chosen: Iterable[Entry] | None = None
) -> list[AttentionRow]:
    """One row for each candidate: figures, or the reason why there are none."""
    problem = Problem(case, device)
    rows: dict[str, AttentionRow] = {}
    ready: dict[str, Candidate] = {}
    for entry in entries(device) if chosen is None else chosen:
        rows[entry.name] = row = _row(case, entry)
        try:
            made = entry.build(problem)
            row.padding, row.kernel, row.work = made.padding, made.kernel, made.work
            row.largest_error = error = _error(made, problem.expected)
            if not error <= _LIMIT:
                raise Unavailable(f"wrong result: off by {error:.3g} of the largest value, allowed {_LIMIT:g}")
            ready[entry.name] = made.candidate
        except Exception as raised:  # whatever a library raises is a row with its reason
            row.reason = reason_of(raised)
    samples = measure(ready, device, Rules(seconds))
    for name, sample in samples.items():
        rows[name].time = sample
        if BASELINE in samples:
            rows[name].baseline, rows[name].speedup = BASELINE, ratio(samples[BASELINE], sample)
    for name, reason in samples.failures.items():
        rows[name].reason = reason
    return list(rows.values())


def _row(case: Case, entry: Entry) -> AttentionRow:
    return AttentionRow(
        name=entry.name, library=entry.library, configuration=entry.configuration, batch=len(case.lengths),
        heads=case.heads, head_dim=case.head_dim, length=max(case.lengths), tokens=case.tokens, ragged=case.ragged, padding="",
    )  # fmt: skip


def _error(made: Built, expected: Tensor) -> float:
    """Largest error of one call over the largest value; infinite where the result is not finite."""
    result: Any = made.candidate.call(*made.candidate.sets[0])
    found = made.unpadded(result).double() * made.scale
    error = float((found - expected).abs().max() / expected.abs().max())
    return error if math.isfinite(error) else math.inf


def cases(models: Sequence[str], lengths: Sequence[int], target: str) -> list[Case]:
    """For each kind of head: a dense batch of each length, a single sequence, and a ragged batch."""
    found = []
    for model in models:
        heads, head_dim = HEADS[model]
        dense = [(length,) * max(1, TOKENS[target] // length) for length in lengths]
        ragged = tuple(squad_lengths(RAGGED[target]))
        found += [Case(each, heads, head_dim) for each in (*dense, ragged, (lengths[0],))]
    return list(dict.fromkeys(found))


def table(rows: Sequence[AttentionRow], machine: Machine, bounds: Bounds | None = None) -> Table:
    """All rows, case by case."""
    drawn = Table(
        title=f"attention; {device_name(machine)}; commit {machine.commit}, {machine.date}",
        title_justify="left", caption_justify="left",
        caption=f"TFLOP/s: of the products without padding. x: {BASELINE}'s time over this one's. error: largest, over the "
        "largest value, against float64. bound: share of what this device reaches at best.",
    )  # fmt: skip
    for header in ("sequences", "heads", "candidate", "padding", "us", "TFLOP/s", "bound", "x", "error", "kernel"):
        left = header in ("candidate", "padding", "kernel")
        drawn.add_column(header, justify="left" if left else "right", overflow="fold")
    last: tuple[object, ...] | None = None
    for row in rows:
        case = (row.batch, row.length, row.tokens, row.heads, row.head_dim)
        if last not in (None, case):
            drawn.add_section()
        last = case
        shape = f"{row.batch} x {'up to ' if row.ragged else ''}{row.length}"
        drawn.add_row(shape, f"{row.heads} x {row.head_dim}", row.name, row.padding, *_cells(row, bounds))
    return drawn


def _cells(row: AttentionRow, bounds: Bounds | None) -> list[str]:
    error = "-" if row.largest_error is None else f"{row.largest_error:.1g}"
    if row.time is None or row.work is None:
        return ["-", "-", "-", "-", error, row.reason or ""]
    seconds = row.time.median
    share = None if bounds is None else bounds.share(row.work, seconds)
    return [
        f"{seconds * _MICRO:.1f} ±{row.time.spread:.0%}", f"{row.work.operations / seconds / _TERA:.2f}",
        "-" if share is None else f"{share:.0%}", "-" if row.speedup is None else f"{row.speedup:.2f}", error, row.kernel,
    ]  # fmt: skip


def main(
    target: options.Target = "cpu",
    model: Annotated[list[str] | None, typer.Option("--model", help="base, large, minilm; may be repeated")] = None,
    length: Annotated[
        list[int] | None, typer.Option("--length", help="tokens of a dense batch; may be repeated")
    ] = None,
    quick: Annotated[bool, typer.Option(help="base only, three lengths, short rounds")] = False,
    seconds: options.Seconds = None,
    minutes: options.Minutes = None,
    threads: options.Threads = None,
    json_path: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Times attention beside its peers."""
    models = model or (["base"] if quick else list(HEADS))
    if unknown := [each for each in models if each not in HEADS]:
        raise QBertError(f"model {unknown[0]!r}: allowed are {', '.join(HEADS)}")
    lengths = length or (LENGTHS[:3] if quick else LENGTHS)
    if bad := [each for each in lengths if not 1 <= each <= 512]:
        raise QBertError(f"length {bad[0]}: allowed are 1 to 512")
    device = device_of(target)
    check_picture(plot)
    torch.set_num_threads(threads or physical_cores())
    spend = seconds or (QUICK_SECONDS if quick else SECONDS)
    recorder = Recorder("attention", {"target": target, "models": models, "seconds": spend}, json_path, device)
    bounds = device_bounds(recorder, device)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for case in track(cases(models, lengths, target), "attention", console=Console(stderr=True), transient=True):
        if time.monotonic() < deadline:
            with torch.inference_mode():
                recorder.extend(measure_case(case, device, spend))
    table_console().print(table(recorder.of(AttentionRow), recorder.machine, bounds))
    if plot is not None:
        from .plots import roofline

        roofline(recorder.of(AttentionRow), bounds, plot)


if __name__ == "__main__":
    run_command(main)
