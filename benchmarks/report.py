"""One page from stored results: Markdown with pictures beside it, or HTML that holds everything.

    qbert bench report benchmarks/results/*/*.json -o docs/benchmarks.md

Only what the files say goes into it, so the same files give the same page. Nothing is left out: rows that lost are marked, rows
that could not be measured stand there with their reason.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import typer
from rich.console import Console

from qbert.errors import QBertError
from qbert.timing import Sample

from . import plots
from .bounds import Bounds
from .ceilings import rate
from .recorder import run_command
from .results_schema import (
    AccuracyRow,
    AttentionRow,
    BertRow,
    CeilingRow,
    GemmRow,
    QuantizeRow,
    Results,
    StepRow,
    SystemRow,
    TestsRow,
    TileRow,
    Work,
    load_results,
)

SUFFIXES = (".md", ".html")
FIGURES = "figures"  # folder of a Markdown page's pictures, beside it
_FIGURE = re.compile(r"\**[+-]?\d[^a-z]*(?!\w)")
LOST, BEST = "▼", "**"
_SHAPES_A_PICTURE = 4
_MS, _MICRO, _MB = 1e3, 1e6, 1e6
_LEGEND = (
    "Medians over interleaved rounds, ± half the distance of the quartiles. `x`: the baseline's time over this one's, as a "
    f"median of the ratios within rounds. {BEST}Bold{BEST}: the lowest median of a column. {LOST}: slower than the baseline, "
    "or a row of qbert whose median is above the fastest peer's. `%`: share of the roofline, the larger of operations over "
    "the measured matrix rate and bytes over the measured bandwidth, as part of the time. `-`: not measured; the reasons "
    "stand below each table."
)

Item = TypeVar("Item")


# ---- the page, as data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Items:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells may hold `**`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def figures(self) -> list[bool]:
        """For each column whether it holds figures, which stand on the right."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.header)
        return [all(cell == "-" or _FIGURE.match(cell) for cell in column) for column in columns]


@dataclass(frozen=True)
class Picture:
    """`name` is that of its file, without suffix; `draw` writes a PNG."""

    name: str
    caption: str
    draw: Callable[[BytesIO], None] = field(compare=False)


Block = Heading | Text | Items | Table | Picture


def page(files: Sequence[Results]) -> list[Block]:
    """Everything that these files say, in their order."""
    blocks: list[Block] = [
        Heading(1, "Benchmarks"),
        Text(
            "Made by `qbert bench report` from stored results; to change a figure, measure it again. Each section below is "
            "one run on one device."
        ),
        Text(_LEGEND),
        _devices(files),
    ]
    for results in files:
        blocks += _section(results)
    return blocks


def _devices(files: Sequence[Results]) -> Table:
    header = ("run", "device", "memory", "software", "commit", "date (UTC)")
    return Table(header, [_device(results) for results in files])


def _device(results: Results) -> list[str]:
    machine, gpu = results.machine, results.machine.gpu
    versions = dict(machine.versions)
    software = [
        f"{name} {versions.pop(name)}" for name in ("python", "torch", "triton", "transformers") if name in versions
    ]
    if gpu:
        clocks = f", up to {gpu.max_sm_mhz:.0f} MHz" if gpu.max_sm_mhz else ""
        power = f", {gpu.power_limit_watts:.0f} W" if gpu.power_limit_watts else ""
        device = (
            f"{gpu.name}, sm_{gpu.capability.replace('.', '')}, {gpu.multiprocessors} multiprocessors{clocks}{power}"
        )
        software = [f"driver {gpu.driver or '?'}", f"CUDA {gpu.cuda or '?'}", *software]
    else:
        device = f"{machine.processor}; {', '.join(machine.flags)}; {machine.cores} cores, {machine.threads} threads"
        device += f"; {', '.join(f'{k}={v}' for k, v in machine.pinning.items()) or 'not pinned'}"
    memory = gpu.memory if gpu else machine.memory
    busy = f"; load average {machine.load_average:.1f} before" if machine.load_average > 1 else ""
    return [
        results.path.stem, device + busy, f"{memory / 1e9:.0f} GB", ", ".join(software), machine.commit or "not known",
        machine.date,
    ]  # fmt: skip


def _section(results: Results) -> Iterator[Block]:
    name = results.machine.gpu.name if results.machine.gpu else f"{results.machine.processor} ({results.machine.isa})"
    yield Heading(2, f"{name}, {results.path.stem}")
    if results.torn:
        yield Text("The run was cut off while it wrote its last row, which is missing.")
    bounds = Bounds.of(results.of(CeilingRow))
    stem = _slug(f"{results.machine.slug} {results.path.stem}")
    for part in (_checks, _ceilings, _bert, _gemm, _attention, _quantize, _accuracy, _tiles):
        yield from part(results, bounds, stem)


# ---- one kind of row each -------------------------------------------------------------------------------------------


def _checks(results: Results, bounds: Bounds, stem: str) -> Iterator[Block]:
    tests, steps = results.of(TestsRow), results.of(StepRow)
    if tests or steps:
        yield Heading(3, "Tests and steps")
    if tests:
        rows = [[t.suite, f"{t.passed}", f"{t.failed}", f"{t.skipped}", f"{t.seconds:.0f}", _verdict(t)] for t in tests]
        yield Table(("suite", "passed", "failed", "skipped", "seconds", "verdict"), rows)
        yield from _reasons((test.suite, failure) for test in tests for failure in test.failures)
    if steps:
        rows = [[s.name, s.status, f"{s.seconds:.0f}", f"{s.rows}", s.reason or ""] for s in steps]
        yield Table(("step", "status", "seconds", "rows", "reason"), rows)


def _verdict(row: TestsRow) -> str:
    if row.reason:
        return row.reason
    return ("good" if row.good else "failed") if row.complete else "stopped before its end"


def _ceilings(results: Results, bounds: Bounds, stem: str) -> Iterator[Block]:
    rows = results.of(CeilingRow)
    if rows:
        yield Heading(3, "Measured ceilings")
        yield Table(
            ("ceiling", "measured", "datasheet", "how"),
            [
                [r.quantity, rate(r.quantity, r.per_second), rate(r.quantity, r.datasheet), r.reason or r.how]
                for r in rows
            ],
        )


def _bert(results: Results, bounds: Bounds, stem: str) -> Iterator[Block]:
    rows, systems = results.of(BertRow), results.of(SystemRow)
    for model in _unique([*(row.model for row in rows), *(system.model for system in systems)]):
        of = [row for row in rows if row.model == model]
        described = [system for system in systems if system.model == model]
        yield Heading(3, f"BERT: {model}")
        if of:
            yield Text(_bert_caption(of))
            yield _grid(of, lambda row: row.case, "system", lambda row: _milliseconds(row, bounds))
            yield from _reasons((f"{row.name}, {row.case}", row.reason) for row in of)
            yield from _bert_pictures(of, f"{stem}-bert-{_slug(model)}")
        if described:
            yield _systems(described, of)
            yield from _reasons((system.name, system.reason) for system in described)


def _bert_caption(rows: Sequence[BertRow]) -> str:
    cases = {row.case: row for row in rows}.values()
    padding = ", ".join(f"{row.case} ({row.batch} x {row.width}) {row.padding_share:.0%}" for row in cases)
    weights = " Its weights are random, so cosines say how exact the arithmetic is, not how good the model stays."
    return f"Milliseconds a forward (of all sentences, where sentences are embedded). Share of padding: {padding}." + (
        weights if rows[0].random_weights else ""
    )


def _bert_pictures(rows: Sequence[BertRow], stem: str) -> Iterator[Block]:
    if any(row.speedup and row.name != row.baseline for row in rows):
        yield Picture(f"{stem}-speedup", "Speed-up by batch", lambda where: plots.speedup_bars(rows, where))
    if len({row.tokens for row in rows if row.time}) > 1:
        yield Picture(f"{stem}-latency", "Latency against tokens", lambda where: plots.bert_latency(rows, where))


def _systems(systems: Sequence[SystemRow], rows: Sequence[BertRow]) -> Table:
    """Size, memory, agreement on the largest case, and what each is."""
    largest = max(rows, key=lambda row: row.tokens).case if rows else ""
    shown = []
    for system in systems:
        row = next((row for row in rows if row.name == system.name and row.case == largest), None)
        peak, mean, least = (row.peak_bytes, row.cosine_mean, row.cosine_min) if row else (None, None, None)
        shown.append([
            system.name, _megabytes(system.weight_bytes), _megabytes(peak), _number(mean, ".5f"), _number(least, ".5f"),
            system.padding or "-", "; ".join([system.configuration, *system.notes]),
        ])  # fmt: skip
    on = f" ({largest})" if largest else ""
    header = ("system", "weights MB", f"peak MB{on}", f"cosine mean{on}", "least", "padding", "configuration")
    return Table(header, shown)


def _gemm(results: Results, bounds: Bounds, stem: str) -> Iterator[Block]:
    rows = results.of(GemmRow)
    if not rows:
        return
    yield Heading(3, "Linears")
    yield Text("Microseconds a call by number of tokens; shapes are output x input channels.")
    shapes = sorted({(row.n, row.k) for row in rows})
    for n, k in shapes:
        of = [row for row in rows if (row.n, row.k) == (n, k)]
        yield Heading(4, f"{n} x {k}")
        yield _grid(of, lambda row: row.t, "tokens", lambda row: _microseconds(row, bounds), ordered=True)
        yield from _reasons((f"{row.name}, {row.t} tokens", row.reason) for row in of)
    yield _described(rows)
    if any(row.speedup and row.name != row.baseline for row in rows):
        yield Picture(f"{stem}-linears-speedup", "Speed-up by shape", lambda where: plots.gemm_speedups(rows, where))
    for index in range(0, len(shapes), _SHAPES_A_PICTURE):
        chosen = shapes[index : index + _SHAPES_A_PICTURE]
        of = [row for row in rows if (row.n, row.k) in chosen and row.time]
        if of:
            part = f"{stem}-linears-latency-{index // _SHAPES_A_PICTURE + 1}"
            yield Picture(part, "Latency against tokens", _latency(of))
    yield from _roofline(rows, bounds, f"{stem}-linears-roofline")


def _latency(rows: Sequence[GemmRow]) -> Callable[[BytesIO], None]:
    return lambda where: plots.latency_by_tokens(rows, where)


def _roofline(rows: Sequence[GemmRow | AttentionRow], bounds: Bounds, name: str) -> Iterator[Block]:
    if bounds.rates and any(row.time and row.work for row in rows):
        yield Picture(name, "Roofline, ceilings as measured", lambda where: plots.roofline(rows, bounds, where))


def _described(rows: Sequence[GemmRow | AttentionRow]) -> Table:
    """What each candidate is, and how it was timed."""
    found: dict[str, list[set[str]]] = {}
    for row in rows:
        kernels, notes = found.setdefault(row.name, [set(), set()])
        kernels |= {row.kernel} - {""}
        notes |= {row.configuration, row.time.how if row.time else ""} - {""}
    return Table(
        ("candidate", "kernel", "configuration and timing"),
        [
            [name, ", ".join(sorted(kernels)) or "-", "; ".join(sorted(notes))]
            for name, (kernels, notes) in found.items()
        ],
    )


def _attention(results: Results, bounds: Bounds, stem: str) -> Iterator[Block]:
    rows = results.of(AttentionRow)
    if not rows:
        return
    yield Heading(3, "Attention")
    yield Text("Microseconds a call; batch x longest sequence, and whether lengths differ.")
    for heads, size in sorted({(row.heads, row.head_dim) for row in rows}):
        of = [row for row in rows if (row.heads, row.head_dim) == (heads, size)]
        yield Heading(4, f"{heads} heads of {size}")
        yield _grid(of, _attention_case, "candidate", lambda row: _microseconds(row, bounds))
        yield from _reasons((f"{row.name}, {_attention_case(row)}", row.reason) for row in of)
    yield _described(rows)
    yield from _roofline(rows, bounds, f"{stem}-attention-roofline")


def _attention_case(row: AttentionRow) -> str:
    return f"{row.batch} x {row.length}{' ragged' if row.ragged else ''}"


def _quantize(results: Results, bounds: Bounds, stem: str) -> Iterator[Block]:
    rows = results.of(QuantizeRow)
    if rows:
        yield Heading(3, "Quantizing")
        shown = [
            [
                row.model, row.scheme, row.library, row.device, _number(row.bits_per_weight, ".3f"),
                _percent(row.share_of_float32), _number(row.seconds, ".2f"), _megabytes(row.peak_bytes),
            ]
            for row in rows
        ]  # fmt: skip
        header = (
            "model",
            "scheme",
            "library",
            "device",
            "bits a weight",
            "of float32",
            "seconds",
            "peak MB over the model",
        )
        yield Table(header, shown)
        yield from _reasons((f"{row.model}, {row.scheme}", row.reason) for row in rows)


def _accuracy(results: Results, bounds: Bounds, stem: str) -> Iterator[Block]:
    rows = results.of(AccuracyRow)
    if rows:
        yield Heading(3, "Accuracy")
        yield Text(
            "Drop: the float model's score minus this one's, with its interval; published rows are their papers' own."
        )
        header = (
            "model",
            "task",
            "name",
            "score",
            "float",
            "drop",
            "interval",
            "cosine",
            "bits",
            "of float32",
            "source",
        )
        yield Table(header, [_accuracy_cells(row) for row in rows])
        yield from _reasons((f"{row.name}, {row.task}", row.reason) for row in rows)


def _accuracy_cells(row: AccuracyRow) -> list[str]:
    interval = "-" if row.drop_low is None or row.drop_high is None else f"{row.drop_low:+.4f} ... {row.drop_high:+.4f}"
    source = f"published: {row.source or '?'}" if row.published else "measured"
    return [
        row.model, row.task, row.name, _number(row.score, ".4f"), _number(row.float_score, ".4f"), _number(row.drop, "+.4f"),
        interval, _number(row.cosine, ".5f"), _number(row.bits_per_weight, ".2f"), _percent(row.share_of_float32), source,
    ]  # fmt: skip


def _tiles(results: Results, bounds: Bounds, stem: str) -> Iterator[Block]:
    rows = [row for row in results.of(TileRow) if row.chosen]
    if rows:
        yield Heading(3, "Tiles")
        tried = len(results.of(TileRow))
        yield Text(f"{tried} measured; for each problem the one that was chosen, and its gain over what the table had.")
        shown = [
            [
                row.operation, row.scheme or "-", f"{row.t}", f"{row.n} x {row.k}",
                " ".join(f"{key}={value}" for key, value in row.tile.items()),
                _number(row.time.median * _MICRO if row.time else None, ".1f"), _number(row.speedup, ".2f"),
            ]
            for row in rows
        ]  # fmt: skip
        yield Table(("operation", "scheme", "tokens", "shape", "tile", "µs", "x"), shown)


# ---- cells ----------------------------------------------------------------------------------------------------------


class _Measured(Protocol):
    """What `_grid` needs of a row."""

    name: str
    library: str
    time: Sample | None
    speedup: float | None
    work: Work | None


Measured = TypeVar("Measured", bound=_Measured)


def _grid(
    rows: Sequence[Measured], column: Callable[[Measured], str | int], corner: str, cell: Callable[[Measured], str], *,
    ordered: bool = False,
) -> Table:  # fmt: skip
    """Candidates down, columns as they were met (or in order) across; of two rows for one cell the later one counts."""
    columns = _unique(column(row) for row in rows)
    columns = sorted(columns) if ordered else columns
    cells = {(row.name, column(row)): row for row in rows}
    marks: dict[tuple[str, str | int], str] = {}
    for each in columns:
        marks |= {
            (name, each): mark for name, mark in _marks([r for (_, at), r in cells.items() if at == each]).items()
        }

    def shown(name: str, at: str | int) -> str:
        row, mark = cells.get((name, at)), marks.get((name, at), "")
        if row is None or row.time is None:
            return "-"
        return f"{BEST}{cell(row)}{BEST}" if mark == BEST else f"{cell(row)} {mark}".rstrip()

    names = _unique(row.name for row in rows)
    return Table((corner, *map(str, columns)), [[name, *(shown(name, at) for at in columns)] for name in names])


def _marks(rows: Sequence[Measured]) -> dict[str, str]:
    """By name: BEST for the fastest of these rows, LOST for those that lost."""
    fastest, peer = _fastest(rows), _fastest(row for row in rows if row.library != "qbert")
    found = {}
    for row in rows:
        if row.time is not None:
            behind = row.library == "qbert" and peer is not None and row.time.median > peer
            lost = behind or (row.speedup is not None and row.speedup < 1)
            found[row.name] = BEST if row.time.median == fastest else LOST if lost else ""
    return found


def _fastest(rows: Iterable[Measured]) -> float | None:
    return min((row.time.median for row in rows if row.time), default=None)


def _milliseconds(row: Measured, bounds: Bounds) -> str:
    return _time(row, bounds, _MS)


def _microseconds(row: Measured, bounds: Bounds) -> str:
    return _time(row, bounds, _MICRO)


def _time(row: Measured, bounds: Bounds, unit: float) -> str:
    """`12.3 ±1% 1.52x 61%`: time, spread, speed-up, share of the bound."""
    assert row.time is not None
    value = row.time.median * unit
    parts = [f"{value:.0f}" if value >= 1000 else f"{value:.3g}", f"±{row.time.spread:.0%}"]
    if row.speedup is not None:
        parts.append(f"{row.speedup:.2f}x")
    share = bounds.share(row.work, row.time.median) if row.work else None
    if share is not None:
        parts.append(f"{share:.0%}")
    return " ".join(parts)


def _reasons(pairs: Iterable[tuple[str, str | None]]) -> Iterator[Block]:
    """What could not be measured, and why; rows with the same reason stand together."""
    found: dict[str, list[str]] = {}
    for who, reason in pairs:
        if reason:
            found.setdefault(reason, []).append(who)
    if found:
        yield Items([f"{'; '.join(who)}: {reason}" for reason, who in found.items()])


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / _MB:.0f}"


def _unique(items: Iterable[Item]) -> list[Item]:
    return list(dict.fromkeys(items))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ---- Markdown -------------------------------------------------------------------------------------------------------


def to_markdown(blocks: Iterable[Block], pictures: str = FIGURES) -> str:
    """The page; its pictures are linked in that folder.

    Args:
        pictures: folder, relative to the page.
    """
    return "\n\n".join(_markdown(block, pictures) for block in blocks) + "\n"


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Items(items):
            return "\n".join(f"- {item}" for item in items)
        case Picture(name, caption):
            return f"![{caption}]({pictures}/{name}.png)"
        case Table(header, rows):
            rule = ["---:" if figures else "---" for figures in block.figures]
            return "\n".join(_markdown_line(cells) for cells in (header, rule, *rows))


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


# ---- HTML -----------------------------------------------------------------------------------------------------------

_STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:90em;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right;white-space:nowrap}"
    "td.name,th.name{text-align:left;white-space:normal}img{max-width:100%}"
)


def to_html(blocks: Sequence[Block]) -> str:
    """The page in one file, its pictures inside."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Benchmarks")
    body = "\n".join(map(_html, blocks))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Items(items):
            return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
        case Picture(_, caption, draw):
            data = base64.b64encode(_drawn(draw)).decode()
            return f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}"></figure>'
        case Table(header, rows):
            right = block.figures
            lines = [_html_line(header, right, "th"), *(_html_line(row, right, "td") for row in rows)]
            return f"<table>{''.join(lines)}</table>"


def _html_line(cells: Sequence[str], right: Sequence[bool], tag: str) -> str:
    classes = ("" if figures else ' class="name"' for figures in right)
    inside = (f"<{tag}{kind}>{_inline(cell)}</{tag}>" for kind, cell in zip(classes, cells, strict=True))
    return f"<tr>{''.join(inside)}</tr>"


def _inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _drawn(draw: Callable[[BytesIO], None]) -> bytes:
    stream = BytesIO()
    draw(stream)
    return stream.getvalue()


# ---- the command ----------------------------------------------------------------------------------------------------


def write_report(files: Sequence[Results], out: str | Path) -> list[Path]:
    """Writes the page, and for Markdown the pictures beside it; what was written.

    Raises:
        QBertError: another suffix than .md or .html.
        MissingDependency: there are pictures to draw and matplotlib is not installed.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise QBertError(f"report {str(out)!r}: allowed are {' and '.join(SUFFIXES)}")
    blocks = page(files)
    written: Mapping[Path, bytes]
    if out.suffix == ".html":
        written = {out: to_html(blocks).encode()}
    else:
        drawn = {block.name: block.draw for block in blocks if isinstance(block, Picture)}
        pictures = {out.parent / FIGURES / f"{name}.png": _drawn(draw) for name, draw in drawn.items()}
        written = {**pictures, out: to_markdown(blocks).encode()}
    for path, content in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return list(written)


def main(
    files: Annotated[list[Path], typer.Argument(help="results files, in the order of the page")],
    out: Annotated[Path, typer.Option("-o", "--out", help="a page: .md or .html")] = Path("benchmarks.md"),
) -> None:
    """Makes a page from stored results."""
    for path in write_report([load_results(path) for path in files], out):
        Console(stderr=True).print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
