"""Commands about checkpoints: quantize, inspect, verify; and about this installation: info."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from qbert.cli import terminal
from qbert.cli.terminal import Embedding, Exclude, Json, Linear, Model, Override
from qbert.errors import QBertError
from qbert.recipe import NONE, Recipe, in_words


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="folder to write")],
    scheme: Linear = "w8a8",
    embedding: Embedding = None,
    exclude: Exclude = None,
    override: Override = None,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="run BERT-type encoders fused: few operators, no padding")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate", metavar="TEXTS", help="static scales from: default, a task, a .txt, .tsv or .jsonl"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into the folder OUT, which AutoModel.from_pretrained loads after `import qbert`."""
    from qbert.workflow import quantize_checkpoint

    recipe = _recipe(scheme, embedding, exclude, override)
    with terminal.progress("quantizing", as_json) as progress:
        report = quantize_checkpoint(model, output, recipe, fuse=fuse, calibrate_with=calibrate, progress=progress)
    terminal.emit(report, as_json)
    if not as_json:
        terminal.print_encoders(report.encoders if fuse else [])
        terminal.out.print(
            f"{report.modules} modules at {report.bits_per_weight:.3f} bits per weight in {report.seconds:.1f} s; "
            f"{report.file_bytes / 1e6:.1f} MB, {report.percent_of_float32:.1f}% of float32: {report.folder}",
            soft_wrap=True,
        )


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="checkpoint folder")], as_json: Json = False
) -> None:
    """What stands in a checkpoint, module by module, and the kernel that would run here."""
    from qbert.workflow import inspect_checkpoint

    report = inspect_checkpoint(folder)
    terminal.emit(report, as_json)
    if as_json:
        return
    table = Table(
        title=f"{folder}" + (f", quantized from {report.source}" if report.source else ""), title_justify="left"
    )
    for header in ("module", "scheme", "shape", "layout", "bits", "KiB", "outliers", "kernel"):
        right = header in ("bits", "KiB", "outliers")
        table.add_column(header, justify="right" if right else "left", overflow="fold")
    for row in report.modules:
        shape = f"{row['shape'][0]}x{row['shape'][1]}"
        figures = (f"{row['bits_per_weight']:.3f}", f"{row['stored_bytes'] / 1024:.1f}", str(row["outliers"] or ""))
        table.add_row(row["name"], row["scheme"], shape, row["layout"], *figures, row["kernel"])
    terminal.out.print(table)
    for kernel, reason in dict.fromkeys((row["kernel"], row["reason"]) for row in report.modules):
        terminal.out.print(f"{kernel}: {reason}", soft_wrap=True, highlight=False)
    terminal.print_encoders(report.encoders)
    for extension, state in report.extensions.items():
        terminal.out.print(f"{extension}: {state}", soft_wrap=True, highlight=False, markup=False)
    terminal.out.print(
        f"quantized {report.quantized_bytes / 1e6:.2f} MB at {report.bits_per_weight:.3f} bits per weight, "
        f"float {report.float_bytes / 1e6:.2f} MB; file {report.file_bytes / 1e6:.2f} MB, "
        f"{report.percent_of_float32:.1f}% of float32 ({report.float32_bytes / 1e6:.1f} MB)",
        soft_wrap=True,
    )


def info(as_json: Json = False) -> None:
    """What is installed here and what would run: versions, instruction set, extensions or why not, GPUs."""
    from qbert.workflow import info as ask

    report = ask()
    terminal.emit(report, as_json)
    if as_json:
        return
    lines = [f"{name}: {version or 'not installed'}" for name, version in report.versions.items()]
    lines.append(f"CPU: {report.cpu['isa'] or 'instruction set not asked for'}, {report.cpu['cores']} cores")
    lines += [f"{extension}: {state}" for extension, state in report.extensions.items()]
    lines += [f"GPU: {name}" for name in report.gpus] or ["GPU: none"]
    for line in lines:
        terminal.out.print(line, soft_wrap=True, highlight=False, markup=False)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="checkpoint folder")],
    against: Annotated[str | None, typer.Option("--against", metavar="MODEL", help="the float original")] = None,
    as_json: Json = False,
) -> None:
    """Hold a checkpoint to every rule; with --against, measure each weight against the original's."""
    from qbert.workflow import verify_checkpoint

    report = verify_checkpoint(folder, against)
    terminal.emit(report, as_json)
    if as_json:
        return
    if report.sqnr:
        table = Table(title=f"{folder} against {against}", title_justify="left")
        for header in ("module", "scheme", "bits", "SQNR dB", "largest error"):
            table.add_column(header, justify="left" if header in ("module", "scheme") else "right", overflow="fold")
        for row in report.sqnr:
            ratio = "exact" if row.sqnr_db is None else f"{row.sqnr_db:.2f}"
            table.add_row(row.name, row.scheme, f"{row.bits_per_weight:.3f}", ratio, f"{row.max_error:.4g}")
        terminal.out.print(table)
    terminal.out.print(
        f"ok: {report.tensors} tensors of {report.modules} quantized modules keep every rule", soft_wrap=True
    )


def _recipe(scheme: str, embedding: str | None, exclude: list[str] | None, override: list[str] | None) -> Recipe:
    overrides: dict[str, str | None] = {}
    for each in override or ():
        pattern, equals, value = each.partition("=")
        if not (pattern and equals and value):
            raise QBertError(f"override {each!r}; allowed: PATTERN=SCHEME, or PATTERN=none to leave it float")
        overrides[pattern] = None if value == NONE else value
    return replace(in_words(scheme, embedding), exclude=tuple(exclude or ()), overrides=overrides)
