"""Pictures of stored rows: roofline, speed-ups by shape and batch, latency against tokens. The same rows give the same bytes.

qbert's candidates have warm colours and full lines, its peers cold ones and dashed lines, in every picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

from qbert.errors import MissingDependency, QBertError

from .bounds import COPY, Bounds
from .results_schema import AttentionRow, BertRow, GemmRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Where = str | Path | IO[bytes]
_WARM = ("#c0392b", "#e67e22", "#f1c40f", "#8e44ad", "#e84393", "#7f4f24", "#ff7675", "#b8860b", "#6c3483")
_COLD = (
    "#2c3e50", "#2980b9", "#16a085", "#7f8c8d", "#5dade2", "#27ae60", "#1f618d", "#95a5a6", "#0e6655", "#85929e", "#34495e",
)  # fmt: skip
_MARKERS = "os^Dv<>Ph*X"
_MS, _MICRO, _TERA = 1e3, 1e6, 1e12
_DPI = 90
_COLUMNS = 2  # of panels side by side
# Of all numbers of tokens that were measured, bars are drawn for those nearest to these.
_BAR_TOKENS = (1, 16, 128, 1024, 16384)
_WIDEST_BAR = 0.8  # of the distance of two groups

Item = TypeVar("Item")


# ---- the pictures ---------------------------------------------------------------------------------------------------


def speedup_bars(rows: Sequence[BertRow], where: Where) -> None:
    """Speed-ups of whole encoders over the baseline: a group of bars for each batch, a panel for each model.

    Raises:
        QBertError: no row has a speed-up.
        MissingDependency: matplotlib is not installed.
    """
    timed = _some([row for row in rows if row.speedup and row.name != row.baseline], "speed-up")
    colours = _colours(row.name for row in timed)

    def draw(axes: Axes, model: str) -> None:
        of = [row for row in timed if row.model == model]
        _bars(axes, {(row.case, row.name): row.speedup or 0.0 for row in of}, colours)
        axes.set(title=f"{model}", ylabel=f"times as fast as {of[0].baseline}")

    _panels(_unique(row.model for row in timed), draw, where, colours, size=(9.0, 4.2), columns=1)


def gemm_speedups(rows: Sequence[GemmRow], where: Where) -> None:
    """Speed-ups of linears over the baseline: a group of bars for each shape, a panel for each of a few numbers of tokens.

    Raises: as `speedup_bars`.
    """
    timed = _some([row for row in rows if row.speedup and row.name != row.baseline], "speed-up")
    colours = _colours(row.name for row in timed)

    def draw(axes: Axes, tokens: int) -> None:
        of = [row for row in timed if row.t == tokens]
        _bars(axes, {(f"{row.n} x {row.k}", row.name): row.speedup or 0.0 for row in of}, colours)
        axes.set(title=f"{tokens} tokens", ylabel=f"times as fast as {of[0].baseline}")

    _panels(_nearest(sorted({row.t for row in timed}), _BAR_TOKENS), draw, where, colours, size=(9.0, 3.4), columns=1)


def latency_by_tokens(rows: Sequence[GemmRow], where: Where) -> None:
    """Microseconds of a linear against tokens, with quartiles, both axes logarithmic; a panel for each shape.

    Raises: as `speedup_bars`.
    """
    timed = _some([row for row in rows if row.time], "time")
    colours = _colours(row.name for row in timed)

    def draw(axes: Axes, shape: tuple[int, int]) -> None:
        of = [row for row in timed if (row.n, row.k) == shape]
        _lines(axes, {name: [(r.t, r) for r in of if r.name == name] for name in colours}, _MICRO, colours)
        axes.set(title=f"{shape[0]} x {shape[1]}", xlabel="tokens", ylabel="µs")

    _panels(sorted({(row.n, row.k) for row in timed}), draw, where, colours, size=(5.6, 4.0), columns=_COLUMNS)


def bert_latency(rows: Sequence[BertRow], where: Where) -> None:
    """Milliseconds of a forward against tokens that are not padding; a panel for each model.

    Batches with padding are points off the lines: how far off is what padding costs.

    Raises: as `speedup_bars`.
    """
    timed = _some([row for row in rows if row.time], "time")
    colours = _colours(row.name for row in timed)

    def draw(axes: Axes, model: str) -> None:
        of = [row for row in timed if row.model == model]
        for padded in (False, True):
            held = [row for row in of if (row.padding_share > 0) == padded]
            points = {name: [(row.tokens, row) for row in held if row.name == name] for name in colours}
            _lines(axes, points, _MS, colours, joined=not padded)
        axes.set(title=f"{model}; points off the lines: batches with padding", xlabel="tokens", ylabel="ms a forward")

    _panels(_unique(row.model for row in timed), draw, where, colours, size=(9.0, 5.0), columns=1)


def roofline(rows: Sequence[GemmRow | AttentionRow], bounds: Bounds, where: Where) -> None:
    """Operations a second against operations a byte, below the measured ceilings; one point for each row.

    Raises: as `speedup_bars`.
    """
    timed = _some([row for row in rows if row.time and row.work and row.work.bytes], "time and work")
    colours = _colours(row.name for row in timed)
    precisions = [name for name in _unique(row.work.precision for row in timed if row.work) if name in bounds.rates]

    def draw(axes: Axes, _: object) -> None:
        points: dict[str, list[tuple[float, float]]] = {name: [] for name in colours}
        for row in timed:
            if row.work and row.time:
                rate = row.work.operations / row.time.median / _TERA
                points[row.name].append((row.work.operations / row.work.bytes, rate))
        for name, at in points.items():
            axes.plot(
                *zip(*at, strict=True), linestyle="", color=colours[name], markersize=4, marker=_mark(name, colours)
            )
        _roofs(axes, bounds, precisions, [x for at in points.values() for x, _ in at])
        axes.set(xlabel="operations a byte", ylabel="10^12 operations a second", title="share of the roofline")
        axes.set_xscale("log")
        axes.set_yscale("log")

    _panels([None], draw, where, colours, size=(8.0, 5.4), columns=1)


def _roofs(axes: Axes, bounds: Bounds, precisions: Sequence[str], intensities: Sequence[float]) -> None:
    copy = bounds.rates.get(COPY)
    if copy is None:
        return
    low, high = min(intensities) / 2, max(intensities) * 2
    for precision in precisions:
        peak = bounds.rates[precision]
        knee = min(max(peak / copy, low), high)
        heights = [min(peak, copy * x) / _TERA for x in (low, knee, high)]
        axes.plot((low, knee, high), heights, color="0.3", linewidth=1)
        axes.annotate(precision, (high, heights[-1]), ha="right", va="bottom", fontsize="small", color="0.3")


# ---- their parts ----------------------------------------------------------------------------------------------------


def _bars(axes: Axes, values: Mapping[tuple[str, str], float], colours: Mapping[str, str]) -> None:
    """One group for each first key, one bar for each second; a line at 1, below which a row has lost."""
    groups = _unique(group for group, _ in values)
    names = [name for name in colours if any(name == each for _, each in values)]
    width = _WIDEST_BAR / len(names)
    for index, name in enumerate(names):
        at = [(place, values[group, name]) for place, group in enumerate(groups) if (group, name) in values]
        places = [place + (index - (len(names) - 1) / 2) * width for place, _ in at]
        axes.bar(places, [height for _, height in at], width, color=colours[name])
    axes.axhline(1.0, color="0.3", linewidth=1)
    axes.set_xticks(range(len(groups)), groups)


def _lines(
    axes: Axes, series: Mapping[str, Sequence[tuple[int, Any]]], unit: float, colours: Mapping[str, str], *,
    joined: bool = True,
) -> None:  # fmt: skip
    for name, points in series.items():
        at = sorted(((x, row.time) for x, row in points), key=lambda point: point[0])
        if at:
            middle = [time.median * unit for _, time in at]
            errors = [
                [(time.median - time.p25) * unit for _, time in at],
                [(time.p75 - time.median) * unit for _, time in at],
            ]
            axes.errorbar(
                [x for x, _ in at], middle, errors, color=colours[name], linestyle=_style(name) if joined else "",
                linewidth=1, marker=_mark(name, colours), markersize=4,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _mark(name: str, colours: Mapping[str, str]) -> str:
    return _MARKERS[list(colours).index(name) % len(_MARKERS)]


def _style(name: str) -> Literal["-", "--"]:
    return "-" if _ours(name) else "--"


def _ours(name: str) -> bool:
    return name.startswith("qbert")


def _colours(names: Iterable[str]) -> dict[str, str]:
    """By name, peers first, in the order in which they were met."""
    met = _unique(names)
    peers, ours = [name for name in met if not _ours(name)], [name for name in met if _ours(name)]
    found = {name: _COLD[index % len(_COLD)] for index, name in enumerate(peers)}
    return found | {name: _WARM[index % len(_WARM)] for index, name in enumerate(ours)}


def _unique(items: Iterable[Item]) -> list[Item]:
    return list(dict.fromkeys(items))


def _nearest(there: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Of the numbers that are there, those nearest to the wanted ones, each once, ascending."""
    return sorted({min(there, key=lambda each: abs(each - want) / want) for want in wanted})


def _some(rows: list[Item], what: str) -> list[Item]:
    if not rows:
        raise QBertError(f"nothing to draw: no row has a {what}")
    return rows


# ---- the canvas -----------------------------------------------------------------------------------------------------


def _panels(
    keys: Sequence[Item], draw: Callable[[Axes, Item], None], where: Where, colours: Mapping[str, str], *,
    size: tuple[float, float], columns: int,
) -> None:  # fmt: skip
    """One panel a key, one legend for all, to a file or stream."""
    columns = min(columns, len(keys))
    lines = -(-len(keys) // columns)
    figure = _figure(size[0] * columns, size[1] * lines + 0.3 * (1 + len(colours) // 5))
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, key in zip(panels, keys, strict=False):
        draw(axes, key)
    for axes in panels[len(keys) :]:
        axes.set_axis_off()
    handles = [_handle(name, colours) for name in colours]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize="small")
    _save(figure, where)


def _handle(name: str, colours: Mapping[str, str]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colours[name], label=name, linestyle=_style(name), marker=_mark(name, colours))


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("pictures need matplotlib; install it with: pip install 'qbert[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, where: Where) -> None:
    """Without date, version and random names, so that a picture changes only when what it shows does."""
    import matplotlib

    name = str(where) if isinstance(where, str | Path) else "stream.png"
    kind = Path(name).suffix.lower().removeprefix(".") or "png"
    metadata: dict[str, None] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}.get(
        kind, {}
    )
    if isinstance(where, str | Path):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "qbert"}):
        try:
            figure.savefig(where, format=kind, dpi=_DPI, metadata=metadata)
        except ValueError as error:
            raise QBertError(f"picture {name!r}: {error}") from None
