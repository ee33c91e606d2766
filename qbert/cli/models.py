"""Commands about checkpoints: quantize, inspect, verify; and about this installation: info."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qbert.cli import terminal
from qbert.cli.terminal import Data, Embedding, Exclude, Json, Linear, Model, Override, Tasks
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
        bool | None,
        typer.Option(
            "--fuse/--no-fuse", help="run encoders fused: few operators, no padding; by default where that pays"
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="TEXTS",
            help="static scales from: default (English prose), a task, a .txt, .tsv or .jsonl; none; by default where it pays",
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
        terminal.print_encoders(report.encoders if fuse is not False else [])
        for note in report.notes:
            terminal.out.print(note, soft_wrap=True, highlight=False, markup=False)
        terminal.out.print(
            f"{report.modules} modules at {report.bits_per_weight:.3f} bits per weight in {report.seconds:.1f} s; "
            f"{report.file_bytes / 1e6:.1f} MB, {report.percent_of_float32:.1f}% of float32: {report.folder}",
            soft_wrap=True,
        )


def compress(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="folder to write")],
    texts: Annotated[
        str | None,
        typer.Option(
            "--texts",
            help="of the kind the model is used on: a .txt, .tsv or .jsonl, tasks (a,b,c), or default (prose); "
            "needed without --max-drop; a search takes two thirds of the tasks' own training texts without it",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", help="SEARCH for a recipe that loses at most so many points of --task or --data"),
    ] = None,
    goal: Annotated[
        str | None, typer.Option("--goal", help="of a search: latency, the usual one, or size; implies --max-drop 1")
    ] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="the same as --goal size")] = False,
    speedup: Annotated[
        float | None,
        typer.Option(
            "--speedup",
            help="times as fast, measured here: in a search the finished model over the float one, else by fewer heads and "
            "neurons alone",
        ),
    ] = None,
    best_effort: Annotated[
        bool, typer.Option("--best-effort", help="of a search: the best there is where the speed-up is not reached")
    ] = False,
    steps: Annotated[
        str | None,
        typer.Option(
            "--steps", help="that a search may use: quantize,layers,prune,rank,vocabulary; for latency not the last"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="of a search: which texts are for what, and of all that is drawn")
    ] = 0,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help=".toml with what the options below say")
    ] = None,
    vocabulary: Annotated[int | None, typer.Option("--vocabulary", help="pieces that stay")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="layers that stay, chosen by measuring")] = None,
    macs: Annotated[
        float | None, typer.Option("--macs", help="in place of --speedup: share of the multiply-adds that is kept")
    ] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="a plain model: all heads, the same width in every layer")
    ] = False,
    rank: Annotated[
        str | None,
        typer.Option("--rank", help="of linears that become two thin ones: a number, or auto, where that pays here"),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option("--sparsity", help="share of weights that become zero, or 2:4: a smaller file, no less time"),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            help="scheme of the linears, calibrated and fused, as w8a8 or w8a8+none; without it none, and in a search those "
            "that pay",
        ),
    ] = None,
    embedding: Embedding = None,
    batch: Annotated[int, typer.Option("--batch", help="rows of the forward that is measured")] = 8,
    seq: Annotated[int, typer.Option("--seq", help="tokens of each")] = 128,
    task: Tasks = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make MODEL smaller without training: fewer words, layers, heads, neurons, ranks, then quantized, into the folder OUT.

    With --max-drop the recipe is searched for: every step is kept only if it pays, in time or bytes measured here, on texts
    that no method has seen. OUT then holds the report too: compression.json, compression.toml (the recipe), compression.png.
    """
    fixed = {
        "--recipe": recipe, "--vocabulary": vocabulary, "--layers": layers, "--macs": macs, "--uniform": uniform or None,
        "--embedding": embedding, "--rank": rank,
        "--sparsity": sparsity,
    }  # fmt: skip
    if max_drop is not None or goal is not None or smallest:
        _refuse([name for name, value in fixed.items() if value is not None], "a search finds these itself")
        if smallest and goal not in (None, "size"):
            raise QBertError(f"--smallest and --goal {goal}; allowed: one of them")
        _search(
            model, output, tasks=task or [], data=data, texts=texts, as_json=as_json,
            goal="size" if smallest else goal or "latency", speedup=speedup, max_drop=1.0 if max_drop is None else max_drop,
            steps=None if steps is None else steps.split(","), quantize=None if scheme is None else [scheme],
            batch=batch, seq=seq, seed=seed, best_effort=best_effort,
        )  # fmt: skip
        return
    searching = {"--best-effort": best_effort, "--steps": steps, "--data": data}
    _refuse([name for name, value in searching.items() if value], "they are for a search; allowed with --max-drop")
    if texts is None:
        raise QBertError(
            "no --texts; allowed: a file of what the model is used on (or default, prose), or --max-drop to search by the "
            "texts of --task"
        )
    prune = {"speedup": speedup, "macs": macs, "uniform": uniform} if speedup or macs else None
    fields = {
        "vocabulary": vocabulary, "layers": layers, "prune": prune, "quantize": None if scheme == NONE else scheme,
        "embedding": embedding, "rank": _number_or_word(rank), "sparsity": _number_or_word(sparsity),
    }  # fmt: skip
    _compress_by_recipe(model, output, recipe, fields, texts, task or [], batch, seq, as_json)


def _refuse(names: list[str], why: str) -> None:
    if names:
        raise QBertError(f"{', '.join(names)}: {why}")


def _search(model: str, output: Path, *, as_json: bool, **wanted: Any) -> None:
    from qbert.compress import BudgetNotMet
    from qbert.workflow import search_checkpoint

    typed = shlex.join(["qbert", *sys.argv[1:]])
    with terminal.progress("searching", as_json) as progress:
        tell = lambda done, total, what: progress(done, None, what)
        try:
            report = search_checkpoint(model, output, command=typed, progress=tell, **wanted)
        except BudgetNotMet as error:
            if as_json:
                terminal.emit(error.report, True)
            else:
                terminal.out.print(error.report.table())
            raise
    terminal.emit(report, as_json)
    if as_json:
        return
    terminal.out.print(report.report.table())
    for line in report.report.lines():
        terminal.out.print(line, soft_wrap=True, highlight=False, markup=False)
    terminal.out.print(
        f"{report.file_bytes / 1e6:.1f} MB, {100 * report.file_bytes / report.float32_bytes:.1f}% of float32: {report.folder}; "
        f"{', '.join(Path(each).name for each in report.files)}",
        soft_wrap=True,
    )


def _compress_by_recipe(
    model: str, output: Path, recipe: Path | None, fields: dict[str, Any], texts: str, task: list[str], batch: int, seq: int,
    as_json: bool,
) -> None:  # fmt: skip
    from qbert.compress import Compression
    from qbert.workflow import compress_checkpoint

    if recipe is not None and any(value is not None for value in fields.values()):
        raise QBertError("--recipe says all of it; leave out the options that say it too")
    chosen = Compression.read(recipe) if recipe is not None else Compression.of(**fields, batch=batch, seq=seq)
    with terminal.progress("compressing", as_json) as progress:
        report = compress_checkpoint(model, output, chosen, texts=texts, tasks=task, progress=progress)
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


def _number_or_word(value: str | None) -> int | float | str | None:
    if value is None or value.isdecimal():
        return None if value is None else int(value)
    try:
        return float(value)
    except ValueError:
        return value


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
    for note in report.notes:
        terminal.out.print(note, soft_wrap=True, highlight=False, markup=False)
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


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a quantized checkpoint")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="folder to write, new or empty")],
    to: Annotated[str, typer.Option("--to", help="onnx-qdq: int8 weights, QuantizeLinear and DequantizeLinear")],
    as_json: Json = False,
) -> None:
    """Write a quantized MODEL as a graph for other runtimes, and say how near ONNX Runtime's vectors are to qbert's."""
    from qbert.export import FORMATS, export_onnx

    if to not in FORMATS:
        raise QBertError(f"--to {to!r}; allowed: {', '.join(FORMATS)}")
    with terminal.err.status("exporting"):
        report = export_onnx(model, output)
    terminal.emit(report, as_json)
    if as_json:
        return
    lines = [
        f"{', '.join(report.inputs)} -> {report.output}, {report.variant}; {report.file_bytes / 1e6:.1f} MB: {report.folder}"
    ]
    if report.cosine_mean is None or report.cosine_min is None:
        lines.append("not compared: onnxruntime is not installed")
    else:
        near = f"{report.cosine_mean:.4f} (least {report.cosine_min:.4f})"
        lines.append(f"cosine of ONNX Runtime's vectors and qbert's: {near}, {report.texts} texts")
    for line in lines:
        terminal.out.print(line, soft_wrap=True, highlight=False, markup=False)


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
