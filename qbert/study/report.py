"""A study as a table, a picture, and one self-contained page."""

from __future__ import annotations

import functools
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from qbert.errors import MissingDependency
from qbert.study import costs
from qbert.study.result import Decibels, PointResult, Study

_GOOD_DB, _BAD_DB = 40.0, 5.0  # ends of the map's colours


def to_table(study: Study) -> Table:
    """For a terminal."""
    sites = " + ".join(study.sites)
    table = Table(title=f"{study.model}: {sites}; {study.device}, torch {study.torch_version}", title_justify="left")
    for header in ("format", "bits", "MB", "% fp32", "SQNR dB", "worst", "cos mean", "cos min"):
        table.add_column(header, justify="left" if header in ("format", "worst") else "right", overflow="fold")
    for result in study.reference.results:
        table.add_column(f"{result.task}\n{result.metric}, n={result.n}", justify="right", no_wrap=True)
    reference = study.reference
    scores = [f"{each.score:.1f} [{each.interval[0]:.1f}, {each.interval[1]:.1f}]" for each in reference.results]
    table.add_row(
        "float32",
        "32",
        f"{reference.model_bytes / 1e6:.1f}",
        "100.0",
        "",
        "",
        "1.0000",
        "1.000",
        *scores,
    )
    for point in study.points:
        table.add_row(*_cells(point))
    table.caption = (
        "bits: stored, of what is in the format, all metadata counted. SQNR: of the last hidden states. Tasks: score, and the "
        "paired change in points with its 95% interval."
    )
    table.caption_justify = "left"
    return table


Measure = Callable[[PointResult], float]


def to_cost_table(study: Study) -> Table:
    """Modelled time, energy, bound and utilization of each format on each target, for a terminal."""
    table = Table(title=f"{study.model}, modelled", title_justify="left", caption_justify="left")
    for header in ("format", "target", "ms", "mJ", "bound", "used", "notes"):
        table.add_column(header, justify="right" if header in ("ms", "mJ", "used") else "left", overflow="fold")
    rows = [("float", study.reference.costs), *((point.name, point.costs) for point in study.points)]
    for name, modelled in rows:
        for cost in modelled:
            table.add_row(name, cost.target, *costs.cells([cost]), "; ".join(cost.notes))
    assumed = [f"{target.name}: {len(target.assumptions)} figures" for target in study.targets if target.assumptions]
    table.caption = (
        costs.caption(study) + (f" Assumed: {', '.join(assumed)}, as the page names." if assumed else "")
    ).strip()
    return table


def pareto(study: Study, value: Measure, cost: Measure = lambda point: point.model_bytes) -> list[PointResult]:
    """Points that no other one beats in both `cost(point)` (bytes) and `value(point)`, by cost."""
    front: list[PointResult] = []
    for point in sorted(study.points, key=lambda each: (cost(each), -value(each))):
        if not front or value(point) > value(front[-1]):
            front.append(point)
    return front


def plot(study: Study, path: str | Path) -> None:
    """Megabytes and modelled milliseconds against cosine and scores, with the points that no other beats joined; or, to an
    .html file, the whole page.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".html", ".htm"):
        path.write_text(to_html(study), encoding="utf-8")
    else:
        _figure(study).savefig(path, dpi=150)


def to_html(study: Study) -> str:
    """One page without scripts or outside files: figures, picture, map, worst layers, and the JSON it is made of."""
    picture = io.StringIO()
    _figure(study).savefig(picture, format="svg", metadata={"Date": None})
    svg = picture.getvalue()
    title = html.escape(f"{study.model}: number formats")
    # A script that is no program: data that a reader can take out again. No "<" may stand in it, for it could end it early.
    data = study.model_dump_json().replace("<", "\\u003c")
    about = html.escape(
        f"Formats at {', '.join(study.sites)}; {study.device}, torch {study.torch_version}, qbert {study.qbert_version}; "
        f"errors site by site on {study.sample_tokens} tokens. Intervals are 95%; changes are paired with float32."
        + costs.caption(study)
    )
    parts = [_summary(study), svg[svg.index("<svg") :], *(_details(point) for point in study.points)]
    parts.append(costs.about_targets(study, _html_table))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{about}</p>{''.join(parts)}"
        f'<script type="application/json" id="study">{data}</script></html>\n'
    )


def from_html(page: str) -> Study:
    """The study that a page was made of."""
    start = page.index(">", page.index('id="study"')) + 1
    return Study.model_validate(json.loads(page[start : page.index("</script>", start)]))


_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}"
    "td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
)


def _summary(study: Study) -> str:
    tasks = [f"{each.task} ({each.metric}, n={each.n})" for each in study.reference.results]
    heads = ["format", "bits", "MB", "% fp32", "SQNR dB", "worst", "cosine", "worst text", *tasks, *costs.heads(study)]
    reference = [
        f"{each.score:.1f} [{each.interval[0]:.1f}, {each.interval[1]:.1f}]" for each in study.reference.results
    ]
    first = [
        "float32",
        "32",
        f"{study.reference.model_bytes / 1e6:.1f}",
        "100.0",
        "",
        "",
        "1.0000",
        "1.000",
        *reference,
        *costs.cells(study.reference.costs),
    ]
    return _html_table(heads, [first, *([*_cells(point), *costs.cells(point.costs)] for point in study.points)])


def _details(point: PointResult) -> str:
    """The sensitivity map and the errors of one format."""
    name = html.escape(point.name)
    left_out = "".join(
        f"<p>Not at {html.escape(site)}: {html.escape(why)}.</p>" for site, why in point.left_out.items()
    )
    shown = html.escape(json.dumps(point.format))
    where = html.escape(", ".join(point.sites))
    body = f"<p>At {where}; <code>{shown}</code></p>{left_out}"
    if point.sensitivity:
        body += f"<p>Each part alone in {name}, SQNR in dB of the last hidden states:</p>{_map(point)}"
    sites = {
        "Weights": point.weight_sqnr_db,
        "Inputs of linears": point.activation_sqnr_db,
        "Attention": point.attention_sqnr_db,
    }
    for what, errors in sites.items():
        rows = [[key, _db(value)] for key, value in _worst(errors)]
        body += f"<p>{what}, the worst:</p>{_html_table(['site', 'SQNR dB'], rows)}" if rows else ""
    body += costs.steps_of(point, _html_table)
    return f"<details><summary><b>{name}</b></summary>{body}</details>"


def _map(point: PointResult) -> str:
    """Layers down, parts across."""
    parts = list(dict.fromkeys(each.part for each in point.sensitivity))
    layers = list(dict.fromkeys(each.layer for each in point.sensitivity))
    value = {(each.layer, each.part): each.sqnr_db for each in point.sensitivity}
    rows = []
    for layer in layers:
        cells = [f"<td>{html.escape(layer or 'outside of layers')}</td>"]
        for part in parts:
            there = (layer, part) in value
            decibels = value.get((layer, part))
            style = f' style="background:{_colour(decibels)}"' if there else ""
            cells.append(f"<td{style}>{_db(decibels) if there else ''}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{html.escape(each)}</th>" for each in ("layer", *parts))
    return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"


def _colour(decibels: Decibels) -> str:
    """Orange for little left of the signal, white for no harm."""
    value = _GOOD_DB if decibels is None else decibels
    share = min(1.0, max(0.0, (value - _BAD_DB) / (_GOOD_DB - _BAD_DB)))
    low, high = (213, 94, 0), (255, 255, 255)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return f"rgb({red},{green},{blue})"


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(each)}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _worst(values: dict[str, Decibels], count: int = 8) -> list[tuple[str, Decibels]]:
    known = [(name, value) for name, value in values.items() if value is not None]
    return sorted(known, key=lambda item: item[1])[:count]  # type: ignore[return-value]


def _cells(point: PointResult) -> list[str]:
    cells = [
        point.name if not point.left_out else f"{point.name} ({', '.join(point.sites)})",
        "" if point.bits_per_weight is None else f"{point.bits_per_weight:.3f}",
        f"{point.model_bytes / 1e6:.1f}",
        f"{point.percent_of_float32:.1f}",
        _db(point.hidden_sqnr_db),
        (point.worst or [""])[0],
        f"{point.cosine_mean:.4f}",
        f"{point.cosine_min:.3f}",
    ]
    for result in point.results:
        change = result.comparison
        assert change is not None
        low, high = -change.drop_interval[1], -change.drop_interval[0]
        cells.append(f"{result.score:.1f}  {-change.drop:+.1f} [{low:+.1f}, {high:+.1f}]")
    return cells


def _db(value: Decibels) -> str:
    return "exact" if value is None else f"{value:.1f}"


def _figure(study: Study) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("pictures need matplotlib; install it with: pip install 'qbert[plot]'") from None
    tasks = study.reference.results
    abscissae: list[tuple[str, Measure]] = [("megabytes of the model", lambda point: point.model_bytes / 1e6)]
    for number, target in enumerate(study.targets):
        abscissae.append((f"modelled ms on {target.name}", functools.partial(_modelled_ms, number)))
    figure = Figure(figsize=(5.2 * (1 + len(tasks)), 4.2 * len(abscissae)), layout="constrained")
    grid = figure.subplots(len(abscissae), 1 + len(tasks), squeeze=False)
    for row, (name, cost) in zip(grid, abscissae, strict=True):
        _draw(row[0], study, (name, cost), lambda point: point.cosine_mean, "mean cosine to float32")
        for index, (axis, task) in enumerate(zip(row[1:], tasks, strict=True)):
            score = functools.partial(_score, index)
            _draw(axis, study, (name, cost), score, f"{task.task}: {task.metric}, n={task.n}", index)
            axis.axhline(task.score, color="0.35", linestyle="--", linewidth=1)
    figure.suptitle(f"{study.model}: what a format costs against quality (bars: 95% of the paired change)")
    return figure


def _modelled_ms(target: int, point: PointResult) -> float:
    return point.costs[target].ms


def _score(task: int, point: PointResult) -> float:
    return point.results[task].score


def _draw(
    axis: Any, study: Study, abscissa: tuple[str, Measure], value: Measure, label: str, task: int | None = None
) -> None:
    name, cost = abscissa
    for point in study.points:
        bars = None
        change = None if task is None else point.results[task].comparison
        if change is not None:
            centre = change.baseline_score - change.drop
            low, high = (change.baseline_score - each for each in reversed(change.drop_interval))
            bars = [[max(0.0, centre - low)], [max(0.0, high - centre)]]
        place = (cost(point), value(point))
        axis.errorbar(*place, bars, fmt="o", color="#0072B2", elinewidth=0.8)
        axis.annotate(point.name, place, xytext=(4, 4), textcoords="offset points", fontsize=7, parse_math=False)
    front = pareto(study, value, cost)
    axis.plot([cost(each) for each in front], [value(each) for each in front], color="#D55E00", linewidth=1)
    axis.set_xlabel(name)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
