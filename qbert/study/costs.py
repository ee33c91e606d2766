"""Modelled costs in a study's table and page: columns, what a step runs as, and the model beside what was measured."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from qbert.cost import Beside, EncoderCost
from qbert.study.result import PointResult, Study

HEADS = ("ms", "mJ", "bound", "used")
Draw = Callable[[Sequence[str], Sequence[Sequence[str]]], str]  # heads, rows -> HTML


def heads(study: Study) -> list[str]:
    """Of the columns of each target."""
    return [f"{target.name}\n{head}" for target in study.targets for head in HEADS]


def cells(costs: Sequence[EncoderCost]) -> list[str]:
    """Time, energy, what bounds most of the time, and the share of the units' rate that is used."""
    found = []
    for cost in costs:
        energy = "" if cost.mj is None else _three(cost.mj)
        found += [_three(cost.ms), energy, f"{cost.bound} {cost.bounds[cost.bound]:.0%}", f"{cost.utilization:.0%}"]
    return found


def caption(study: Study) -> str:
    """What the columns are; empty without targets."""
    if not study.targets:
        return ""
    cost = study.reference.costs[0]
    return (
        f" Modelled, a forward of {cost.batch} sequences, {cost.tokens} tokens: milliseconds, millijoules, what bounds most of "
        "the time, and the share of the units' rate that is used. float32: the target's own float."
    )


def steps_of(point: PointResult, draw: Draw) -> str:
    """HTML: each step of one format on each target."""
    body = ""
    for cost in point.costs:
        rows = [
            [
                each.name, str(each.layers), " x ".join(map(str, each.shape)), each.runs_as, _three(each.ms), each.bound,
                f"{each.utilization:.0%}" if each.runs_as else "", "" if each.mj is None else _three(each.mj),
            ]
            for each in cost.operations
        ]  # fmt: skip
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in cost.notes)
        body += f"<p>{html.escape(cost.target)}: {_three(cost.ms)} ms, step by step:</p>"
        body += draw(["step", "layers", "tokens x n x k", "runs as", "ms", "bound", "used", "mJ"], rows)
        body += f"<ul>{notes}</ul>" if notes else ""
        layers = [[each.name, _three(each.ms), each.bound, f"{each.utilization:.0%}"] for each in cost.layers]
        body += f"<details><summary>by layer</summary>{draw(['layer', 'ms', 'bound', 'used'], layers)}</details>"
    return body


def about_targets(study: Study, draw: Draw) -> str:
    """HTML: what each target is, what of it is assumed, and the model beside stored measurements."""
    body = ""
    for target in study.targets:
        assumed = "".join(f"<li>{html.escape(each)}</li>" for each in target.assumptions)
        body += f"<p><b>{html.escape(target.name)}</b>: {html.escape(target.description)}. {html.escape(target.source)}.</p>"
        body += f"<details><summary>assumed</summary><ul>{assumed}</ul></details>" if assumed else ""
    if study.beside:
        body += "<p>The model beside stored measurements of fused W8A8 encoders on these machines:</p>"
        body += draw(
            ["target", "system", "model", "case", "measured ms", "modelled ms", "error", "results"],
            besides(study.beside),
        )
    return f"<h2>Targets</h2>{body}" if body else ""


def besides(rows: Sequence[Beside]) -> list[list[str]]:
    """Rows of model beside measurement."""
    return [
        [
            each.target, each.system, each.model, each.case, f"{each.measured_ms:.1f}", f"{each.modelled_ms:.1f}",
            f"{each.error:+.0%}", each.results,
        ]
        for each in rows
    ]  # fmt: skip


def _three(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
