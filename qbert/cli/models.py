"""Commands about checkpoints: quantize, inspect, verify; and about this installation: info."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from qbert.cli import terminal
from qbert.cli.terminal import Embedding, Exclude, Json, Linear, Model, Override, Tasks
from qbert.emulation import parse_emulation
from qbert.errors import QBertError
from qbert.recipe import NONE, Recipe, in_words


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="folder to write")],
    scheme: Linear = "w8a8",
    embedding: Embedding = None,
    exclude: Exclude = None,
    override: Override = None,
    emulate: Annotated[
        str | None,
        typer.Option("--emulate", help="block formats in place of a scheme: 'weights=mxfp4 activations=mxfp8'"),
    ] = None,
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

    recipe = _recipe(scheme, embedding, exclude, override) if emulate is None else parse_emulation(emulate)
    if emulate is not None and (embedding or exclude or override):
        raise QBertError("--emulate takes no --embedding, --exclude or --override; allowed in it: embeddings=FORMAT")
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


def compress(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="folder to write")],
    texts: Annotated[
        str,
        typer.Option(
            "--texts",
            help="of the kind the model is used on: a .txt, .tsv or .jsonl, tasks (a,b,c), or default (prose)",
        ),
    ],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help=".toml with what the options below say")
    ] = None,
    vocabulary: Annotated[int | None, typer.Option("--vocabulary", help="pieces that stay")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="layers that stay, chosen by measuring")] = None,
    speedup: Annotated[
        float | None, typer.Option("--speedup", help="by fewer heads and neurons, in milliseconds measured here")
    ] = None,
    macs: Annotated[
        float | None, typer.Option("--macs", help="in place of --speedup: share of the multiply-adds that is kept")
    ] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="a plain model: all heads, the same width in every layer")
    ] = False,
    scheme: Annotated[
        str,
        typer.Option(
            "--quantize", help="scheme of the linears, calibrated and fused, as w8a8 or w8a8+none; none to stay float"
        ),
    ] = "none",
    embedding: Embedding = None,
    batch: Annotated[int, typer.Option("--batch", help="rows of the forward that is measured")] = 8,
    seq: Annotated[int, typer.Option("--seq", help="tokens of each")] = 128,
    task: Tasks = None,
    as_json: Json = False,
) -> None:
    """Make MODEL smaller without training: fewer words, layers, heads and neurons, then quantized, into the folder OUT."""
    from qbert.compress import Compression
    from qbert.workflow import compress_checkpoint

    prune = {"speedup": speedup, "macs": macs, "uniform": uniform} if speedup or macs else None
    fields = {
        "vocabulary": vocabulary, "layers": layers, "prune": prune, "quantize": None if scheme == "none" else scheme,
        "embedding": embedding,
    }  # fmt: skip
    if recipe is not None and any(value is not None for value in fields.values()):
        raise QBertError("--recipe says all of it; leave out the options that say it too")
    chosen = Compression.read(recipe) if recipe is not None else Compression.of(**fields, batch=batch, seq=seq)
    with terminal.progress("compressing", as_json) as progress:
        report = compress_checkpoint(model, output, chosen, texts=texts, tasks=task or (), progress=progress)
    terminal.emit(report, as_json)
    if as_json:
        return
    terminal.out.print(str(report.report), soft_wrap=True, highlight=False)
    for step in report.report.steps[1:]:
        for note in step.notes:
            terminal.out.print(f"{step.method}: {note.strip()}", soft_wrap=True, highlight=False, markup=False)
        for found in step.scores or ():
            drop, (low, high) = -found["comparison"]["drop"], found["comparison"]["drop_interval"]
            change = f"{drop:+.1f} [{-high:+.1f}, {-low:+.1f}]"
            terminal.out.print(
                f"{step.method}: {found['task']} {found['score']:.1f}, {change}", highlight=False, markup=False
            )
    terminal.out.print(
        f"{report.file_bytes / 1e6:.1f} MB, {100 * report.file_bytes / report.float32_bytes:.1f}% of float32: {report.folder}",
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
    if report.shapes is not None:
        terminal.out.print(f"compressed: {report.shapes}", soft_wrap=True, highlight=False)
    for extension, state in report.extensions.items():
        terminal.out.print(f"{extension}: {state}", soft_wrap=True, highlight=False, markup=False)
    terminal.out.print(
        f"quantized {report.quantized_bytes / 1e6:.2f} MB at {report.bits_per_weight:.3f} bits per weight, "
        f"float {report.float_bytes / 1e6:.2f} MB; file {report.file_bytes / 1e6:.2f} MB, "
        f"{report.percent_of_float32:.1f}% of float32 ({report.float32_bytes / 1e6:.1f} MB)",
        soft_wrap=True,
    )


def explain(model: Model) -> None:
    """What runs for every linear and embedding of MODEL here, and why; of a compressed one also what is left."""
    from qbert.explain import explain as explained
    from qbert.workflow import load_any

    terminal.out.print(str(explained(load_any(model))), soft_wrap=True, highlight=False, markup=False)


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
