"""`qbert embed`: a file or folder of texts to a file of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qbert.cli import terminal
from qbert.cli.terminal import Json
from qbert.errors import QBertError

if TYPE_CHECKING:
    from qbert.embed import EmbedReport, Engine, Estimate

_ENGINES = ("local", "ray")


def embed(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="quantized or float: folder, hub id, or alias")],
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help=".jsonl, .csv, .tsv, .parquet or .txt (a text a line), or a folder of them"),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="file to write, .npy or .parquet")
    ] = None,
    column: Annotated[str, typer.Option("--column", help="column with the texts")] = "text",
    id_column: Annotated[
        str | None, typer.Option("--id", metavar="COLUMN", help="column of ids that go beside the vectors (.parquet)")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option("--pooling", help="mean or cls; by default the model's own, from its files")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="vectors of length 1; by default as the files say")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="put before each text: a name of the model's prompts, or words")
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="tokens of a text that are read")] = None,
    scheme: Annotated[
        str | None, typer.Option("--scheme", help="quantize a float model in memory first, fused: w8a8")
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option("--calibrate", metavar="TEXTS", help="with --scheme: static scales, as in quantize")
    ] = None,
    chunk: Annotated[int, typer.Option("--chunk", help="rows that are stored together; all that a kill costs")] = 4096,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", help="texts times longest text of a batch")] = 4096,
    engine: Annotated[
        str, typer.Option("--engine", help="local, or ray: a cluster (RAY_ADDRESS) or this machine")
    ] = "local",
    workers: Annotated[int | None, typer.Option("--workers", help="of engine ray; by default one a CPU")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT, or what another job began")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="embed a sample only: hours, memory and machines of the whole job")
    ] = False,
    texts: Annotated[
        int | None, typer.Option("--texts", help="with --estimate: of so many texts, not those of IN")
    ] = None,
    within: Annotated[
        float | None, typer.Option("--within", metavar="HOURS", help="with --estimate: machines for it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Vectors of all texts of IN by MODEL, into OUT. Killed and run again, it goes on where it was, with the same bytes."""
    from qbert import embed as embedding

    if (output is None) == (not estimate):
        raise QBertError("say where to write (-o OUT), or --estimate, and not both")
    if not estimate and (texts is not None or within is not None):
        raise QBertError("--texts and --within go with --estimate; leave them out, or say that, too")
    if engine not in _ENGINES:
        raise QBertError(f"engine {engine!r}; allowed: {', '.join(_ENGINES)}")
    if workers is not None and engine != "ray":
        raise QBertError("--workers goes with --engine ray")
    where = embedding.Source(source, column, id_column)
    where.files()  # before a model is loaded for nothing
    embedder = embedding.embedder_of(
        model, scheme=scheme, calibrate_with=calibrate, pooling=pooling, normalize=normalize, max_length=max_length,
        prompt=prompt, batch_tokens=batch_tokens,
    )  # fmt: skip
    if output is None:
        with terminal.err.status("embedding a sample"):
            found = embedding.estimate(embedder, where, texts=texts, within_hours=1.0 if within is None else within)
        terminal.emit(found, as_json)
        if not as_json:
            _print_estimate(found)
        return
    with terminal.progress("", as_json) as progress:
        report = embedding.embed_file(
            embedder,
            where,
            output,
            chunk_rows=chunk,
            overwrite=overwrite,
            engine=_engine(engine, workers),
            progress=progress,
        )
    terminal.emit(report, as_json)
    if not as_json:
        _print_report(report)


def _engine(name: str, workers: int | None) -> Engine:
    if name == "local":
        from qbert.embed import here

        return here
    from qbert.embed.on_ray import RayEngine

    return RayEngine(workers)


def _print_report(report: EmbedReport) -> None:
    fresh = report.rows - report.resumed
    lines = [f"{report.rows} vectors of {report.dimension} float32: {report.output}"]
    if report.resumed:
        lines.append(f"{report.resumed} of them were finished before")
    if fresh:
        lines.append(f"{fresh} texts in {report.seconds:.1f} s, {fresh / report.seconds:.0f} a second")
    normalized = "normalized" if report.job["normalize"] else "not normalized"
    lines.append(f"pooling {report.job['pooling']}, {normalized}, up to {report.job['max_length']} tokens")
    if report.truncated:
        lines.append(
            f"{report.truncated} texts were longer than {report.job['max_length']} tokens; their ends were not read"
        )
    lines.append(f"bits: {report.batch_bits}")
    for line in lines:
        terminal.out.print(line, soft_wrap=True, highlight=False, markup=False)


def _print_estimate(found: Estimate) -> None:
    spread = f"{found.slowest:.0f} to {found.fastest:.0f}"
    sampled = f"{found.sampled} sampled, {found.tokens_per_text:.1f} tokens each"
    machines = f"{found.machines} machine{'s' if found.machines > 1 else ''}"
    lines = [
        f"{found.texts_per_second:.0f} texts a second here ({spread}; {sampled})",
        f"{found.texts} texts: {found.hours:.3g} hours on one machine like this; within {found.within_hours:g}: {machines}",
        f"memory: {found.memory_gb:.2f} GB a process; output: {found.output_gb:.3g} GB, twice that while it is made",
    ]
    for line in lines:
        terminal.out.print(line, soft_wrap=True, highlight=False, markup=False)
