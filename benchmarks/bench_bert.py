"""BERT's latency end to end: qbert beside torch, torchao, ONNX Runtime, OpenVINO and bitsandbytes, measured in turns.

    python -m benchmarks.bench_bert --target cpu --peers all                  base, about ten minutes
    python -m benchmarks.bench_bert --model minilm --sentences                sentences per second on real text
    python -m benchmarks.bench_bert --prepare                                 convert once, measure nothing

Every system is a process of its own with all the threads and its own defaults. The parent lets one run at a time, in rounds,
and goes on only when that one's threads are idle. A system that is missing, broken or refuses a shape is a row with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.bert_inputs import (
    DEFAULT_CASES,
    Batch,
    Sentence,
    make_batch,
    pad,
    parse_case,
    real_sentences,
    tokenize,
)
from benchmarks.bert_models import ModelFolder, find_model, load_float32
from benchmarks.bert_report import CaseRow, Cell, Report, SystemRow, add_ratios, cosines, spread, tables
from benchmarks.machine import Machine, describe, memory_bytes, physical_cores
from benchmarks.peers import ISAS, ROWS, Job, RowSpec, Unavailable, isa_environment, one_line, rows_of
from benchmarks.peers.base import Bound, Floats, Loaded
from benchmarks.peers.child import come_to_rest, mean_pooled
from benchmarks.peers.driver import Child
from qbert.errors import QBertError
from qbert.zoo import cache_dir

TURN_SECONDS = 0.15  # short forwards are repeated for that long in each turn
MIN_ROUNDS, MAX_ROUNDS = 3, 25
SENTENCES, SENTENCE_BATCH = 512, 32  # sentence-transformers' own batch size
CALIBRATION_SENTENCES = 300
POOL = 2000  # sentences that batches are drawn from
WAIT_POLICIES = ("default", "passive", "active")
ALL = "all"
_SLOW, _LONG = 600.0, 1800.0  # seconds that a first forward and a conversion may take
_MEMORY_PER_MODEL, _SPARE_MEMORY = 3, 1 << 29  # a system loads a float model, converts it and keeps a packed copy
_CONVERTED_SECONDS = 2.0  # a longer preparation left memory behind: the system gets a fresh process
_QUIET_LOAD = 0.5
_FILE_WIDTH = 160

Rounds = dict[str, list[list[float]]]


class Caller(Protocol):
    """A child, or what stands for one in tests."""

    def call(self, command: str, *arguments: Any, timeout: float) -> Any: ...


@dataclass
class Settings:
    """What the command line says."""

    model: str = "base"
    rows: list[RowSpec] = field(default_factory=list)
    cases: tuple[str, ...] = DEFAULT_CASES
    minutes: float = 10.0
    threads: int = 1
    isa: str | None = None
    wait_policy: str = "default"
    cache: Path = field(default_factory=lambda: cache_dir() / "peers")
    sentences: bool = False
    machine: Machine = field(default_factory=describe)  # before anything runs: its load average is that of the others
    say: Callable[[str], None] = lambda text: None


# ---- systems --------------------------------------------------------------------------------------------------------


class Team:
    """All systems that could be started, each in its process."""

    def __init__(self, settings: Settings, model: ModelFolder, calibration: Sequence[str]) -> None:
        self._settings = settings
        self._model = model
        self._texts = tuple(calibration)
        self._calibration = tuple(map(tuple, tokenize(calibration)))
        self.children: dict[str, Child] = {}
        self.systems = {row.name: _system(row) for row in settings.rows}

    def start(self) -> None:
        """Processes first, all at once, because they import for seconds; then one after the other prepares and loads."""
        for row in self._settings.rows:
            with self._or_reason(row.name):
                self.children[row.name] = Child(row.name, self._environment(row))
        for row in self._settings.rows:
            if row.name in self.children:
                self._settings.say(f"loading {row.name}")
                with self._or_reason(row.name):
                    self._load(row)

    def prepare_only(self) -> None:
        """Conversions of all rows, one process at a time."""
        for row in self._settings.rows:
            self._settings.say(f"preparing {row.name}")
            with self._or_reason(row.name):
                self.children[row.name] = Child(row.name, self._environment(row))
                self.systems[row.name].prepare_seconds = self._prepare(row)
            self.close(row.name)

    def close(self, name: str | None = None) -> None:
        """Ends one process, or all."""
        for each in [name] if name else list(self.children):
            child = self.children.pop(each, None)
            if child is not None:
                child.close()

    def finish(self) -> list[SystemRow]:
        """The rows, with what is known at the end."""
        for name, child in self.children.items():
            system = self.systems[name]
            system.rest_seconds = float(np.median(child.rests))
            with self._or_reason(name):
                system.notes = child.call("notes", timeout=_SLOW)
        return list(self.systems.values())

    def _load(self, row: RowSpec) -> None:
        system = self.systems[row.name]
        self._check_memory()
        system.prepare_seconds = self._prepare(row)
        if system.prepare_seconds > _CONVERTED_SECONDS:
            self.close(row.name)
            self.children[row.name] = Child(row.name, self._environment(row))
            self._prepare(row)
        loaded: Loaded = self.children[row.name].call("load", timeout=_LONG)
        system.weight_bytes, system.padding, system.load_seconds = loaded.weight_bytes, loaded.padding, loaded.seconds

    def _prepare(self, row: RowSpec) -> float:
        settings = self._settings
        job = Job(
            self._model.folder, self._model.work, settings.threads, dict(row.options), settings.sentences,
            self._calibration, self._texts,
        )  # fmt: skip
        seconds: float = self.children[row.name].call("prepare", job, timeout=_LONG)
        return seconds

    def _check_memory(self) -> None:
        need = _MEMORY_PER_MODEL * self._model.float_bytes + _SPARE_MEMORY
        free = memory_bytes("MemAvailable")
        if free and free < need:
            raise Unavailable(f"{free / 1e9:.1f} GB of memory free, {need / 1e9:.1f} wanted: choose fewer with --rows")

    def _environment(self, row: RowSpec) -> dict[str, str]:
        settings, threads = self._settings, str(self._settings.threads)
        environment = {
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(settings.cache / "inductor"),
        }  # fmt: skip
        if settings.wait_policy != "default":
            environment["OMP_WAIT_POLICY"] = settings.wait_policy
        return environment | (isa_environment(row.library, settings.isa) if settings.isa else {})

    @contextmanager
    def _or_reason(self, name: str) -> Iterator[None]:
        try:
            yield
        except Unavailable as reason:
            self.systems[name].reason = str(reason)
            self.close(name)


def _system(row: RowSpec) -> SystemRow:
    return SystemRow(name=row.name, library=row.library, configuration=row.configuration, source=row.source)


# ---- measuring ------------------------------------------------------------------------------------------------------


def in_rounds(systems: Mapping[str, Caller], command: Sequence[Any], seconds: float) -> tuple[Rounds, dict[str, str]]:
    """Every system runs once a round, in turn, so that a disturbance meets all alike; each round begins with another one.

    Args:
        command: what each is told in its turn, and the arguments; it answers with the seconds of its forwards.
        seconds: as many rounds as fit, but no fewer than MIN_ROUNDS and no more than MAX_ROUNDS.

    Returns:
        Seconds of forwards by system and round, and the reasons of systems that failed on the way (they are left out).
    """
    rounds: Rounds = {name: [] for name in systems}
    failed: dict[str, str] = {}
    begin = time.perf_counter()
    done, last = 0, 0.0
    while done < MAX_ROUNDS and (done < MIN_ROUNDS or time.perf_counter() - begin + last < seconds):
        start = time.perf_counter()
        for name in _rotated([name for name in systems if name not in failed], done):
            try:
                rounds[name].append(systems[name].call(*command, timeout=_SLOW))
            except Unavailable as reason:
                failed[name] = str(reason)
        done, last = done + 1, time.perf_counter() - start
    return {name: times for name, times in rounds.items() if name not in failed}, failed


def _rotated(names: list[str], by: int) -> list[str]:
    at = by % len(names) if names else 0
    return names[at:] + names[:at]


def measure_case(
    systems: Mapping[str, Caller], case: str, inputs: Sequence[Any], reference: Floats, keep: Any, seconds: float,
    commands: tuple[str, Sequence[Any], str] = ("bind", ("turn", TURN_SECONDS), "memory"),
) -> list[Cell]:  # fmt: skip
    """All systems on one case.

    Args:
        inputs: arguments of the first command.
        reference: (rows, k), torch's float32 result, and `keep`: which rows of a system's result belong to it.
        seconds: to spend, first forwards included.
        commands: takes the case and runs it once; runs it for timing; runs it and says how much memory that took.
    """
    first, timed, memory = commands
    begin = time.perf_counter()
    cells = {name: Cell(row=name, case=case) for name in systems}
    for name, system in systems.items():
        with _reason_in(cells[name]):
            bound: Bound = system.call(first, *inputs, timeout=_SLOW)
            cells[name].first_seconds = bound.seconds
            cells[name].cosine_mean, cells[name].cosine_min = cosines(reference, bound.hidden[keep])
    able = {name: system for name, system in systems.items() if cells[name].reason is None}
    rounds, failed = in_rounds(able, timed, seconds - (time.perf_counter() - begin))
    for name, reason in failed.items():
        cells[name].reason = reason
    for name, times in rounds.items():
        cells[name].time = spread(times)
        with _reason_in(cells[name]):
            cells[name].peak_bytes = systems[name].call(memory, timeout=_SLOW)
    add_ratios(cells, rounds)
    return list(cells.values())


@contextmanager
def _reason_in(cell: Cell) -> Iterator[None]:
    try:
        yield
    except Unavailable as reason:
        cell.reason = str(reason)


def reference_hidden(folder: Path, batches: Mapping[str, Batch], threads: int) -> dict[str, Floats]:
    """torch's float32 hidden states at all tokens that are not padding: (tokens, hidden) a batch."""
    torch.set_num_threads(threads)
    model = load_float32(folder)
    with torch.inference_mode():
        found = {
            name: model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state[batch.mask.bool()].numpy()
            for name, batch in batches.items()
        }
    come_to_rest()
    return found


# ---- the two benchmarks ---------------------------------------------------------------------------------------------


def bench_cases(settings: Settings) -> Report:
    """Latency on batches of given shapes."""
    begin = time.perf_counter()
    model = find_model(settings.model, settings.cache)
    sentences = tokenize(real_sentences(POOL))
    batches = {name: make_batch(parse_case(name), sentences) for name in settings.cases}
    settings.say("float32 reference")
    references = reference_hidden(model.folder, batches, settings.threads)
    team = Team(settings, model, real_sentences(CALIBRATION_SENTENCES, part="train"))
    cells: list[Cell] = []
    try:
        team.start()
        # From small to large, so that memory which an allocator keeps from a larger batch is not counted for a smaller one.
        for index, name in enumerate(sorted(batches, key=lambda name: batches[name].mask.numel())):
            batch = batches[name]
            left = 60 * settings.minutes - (time.perf_counter() - begin)
            settings.say(f"{name}: {len(team.children)} systems, {left / 60:.1f} minutes left")
            keep = batch.mask.bool().numpy()
            inputs = (batch.ids.numpy(), batch.mask.numpy())
            share = left / (len(batches) - index)
            cells += measure_case(team.children, name, inputs, references[name], keep, share)
        systems = team.finish()
    finally:
        team.close()
    cases = [_case(name, batch) for name, batch in batches.items()]
    return _report(settings, model, time.perf_counter() - begin, systems, cases, cells)


def bench_sentences(settings: Settings) -> Report:
    """Time to embed real sentences, in batches of like length as sentence-transformers sorts them."""
    begin = time.perf_counter()
    model = find_model(settings.model, settings.cache)
    texts = real_sentences(SENTENCES)
    sentences = tokenize(texts, max_tokens=MAX_SENTENCE_TOKENS)
    order, batches = sorted_batches(sentences)
    named = {str(index): batch for index, batch in enumerate(batches)}
    settings.say("float32 reference")
    reference = _reference_embeddings(model.folder, named, settings.threads)
    inputs = ([(b.ids.numpy(), b.mask.numpy()) for b in batches], [texts[i] for i in order], SENTENCE_BATCH)
    team = Team(settings, model, real_sentences(CALIBRATION_SENTENCES, part="train"))
    name = f"{len(texts)} sentences"
    try:
        team.start()
        left = 60 * settings.minutes - (time.perf_counter() - begin)
        commands = ("sentences", ("sweep",), "sweep_memory")
        cells = measure_case(team.children, name, inputs, reference, slice(None), left, commands)
        systems = team.finish()
    finally:
        team.close()
    tokens, positions = sum(b.tokens for b in batches), sum(b.mask.numel() for b in batches)
    case = CaseRow(
        name=name, sequences=len(texts), width=max(b.mask.shape[1] for b in batches), tokens=tokens,
        padding_share=1 - tokens / positions,
    )  # fmt: skip
    return _report(settings, model, time.perf_counter() - begin, systems, [case], cells)


MAX_SENTENCE_TOKENS = 256  # MiniLM's own limit


def sorted_batches(sentences: Sequence[Sentence], size: int = SENTENCE_BATCH) -> tuple[list[int], list[Batch]]:
    """Indices by length, longest first, and the padded batches in that order."""
    order = sorted(range(len(sentences)), key=lambda i: (-len(sentences[i]), i))
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return order, [pad([sentences[i] for i in group]) for group in groups]


def _reference_embeddings(folder: Path, batches: Mapping[str, Batch], threads: int) -> Floats:
    torch.set_num_threads(threads)
    model = load_float32(folder)
    parts = []
    with torch.inference_mode():
        for batch in batches.values():
            hidden = model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
            parts.append(mean_pooled(hidden.numpy(), batch.mask.numpy()))
    come_to_rest()
    return np.concatenate(parts)


def prepare(settings: Settings) -> Report:
    """Everything that is done once and kept."""
    begin = time.perf_counter()
    model = find_model(settings.model, settings.cache)
    team = Team(settings, model, real_sentences(CALIBRATION_SENTENCES, part="train"))
    try:
        team.prepare_only()
    finally:
        team.close()
    return _report(settings, model, time.perf_counter() - begin, list(team.systems.values()), [], [])


def _case(name: str, batch: Batch) -> CaseRow:
    rows, width = batch.mask.shape
    return CaseRow(name=name, sequences=rows, width=width, tokens=batch.tokens, padding_share=batch.padding_share)


def _report(
    settings: Settings, model: ModelFolder, seconds: float, systems: list[SystemRow], cases: list[CaseRow],
    cells: list[Cell],
) -> Report:  # fmt: skip
    return Report(
        machine=settings.machine, model=model.name, random_weights=model.random, threads=settings.threads, isa=settings.isa,
        wait_policy=settings.wait_policy, minutes=settings.minutes, seconds=seconds, systems=systems, cases=cases,
        cells=cells,
    )  # fmt: skip


# ---- the command ----------------------------------------------------------------------------------------------------


def select_rows(peers: str, patterns: Sequence[str], *, sentences: bool) -> list[RowSpec]:
    """Rows by library and by name.

    Args:
        peers: `all`, `none`, or names of libraries with commas between them.
        patterns: shell wildcards of row names; none: all of those libraries.

    Raises:
        QBertError: an unknown library, or a pattern that fits no row.
    """
    libraries = frozenset(row.library for row in ROWS.values())
    asked = libraries if peers == ALL else frozenset(filter(None, peers.split(",")) if peers != "none" else ())
    if asked - libraries:
        known = ", ".join(sorted(libraries))
        raise QBertError(f"peers {', '.join(sorted(asked - libraries))}: allowed are {ALL}, none, or some of {known}")
    rows = rows_of(asked, texts=sentences)
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise QBertError(f"rows {pattern!r} fits none of {', '.join(row.name for row in rows)}")
    return [row for row in rows if not patterns or any(fnmatchcase(row.name, each) for each in patterns)]


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, text.split(","))) if text else ()


def main(
    target: Annotated[str, typer.Option(help="what to measure on: cpu")] = "cpu",
    peers: Annotated[str, typer.Option(help="all, none, or libraries with commas between them")] = ALL,
    model: Annotated[str, typer.Option(help="base, large or tiny (random weights), or a model by name")] = "base",
    rows: Annotated[str | None, typer.Option(help="wildcards of rows, with commas")] = None,
    cases: Annotated[str | None, typer.Option(help="BATCHxLENGTH and raggedBATCH, with commas")] = None,
    sentences: Annotated[bool, typer.Option(help="embed real sentences instead of cases")] = False,
    minutes: Annotated[float, typer.Option(help="rounds are chosen to fit, three at least")] = 10.0,
    quick: Annotated[bool, typer.Option(help="two cases, two minutes")] = False,
    threads: Annotated[int | None, typer.Option(help="of every system; all physical cores by default")] = None,
    isa: Annotated[str | None, typer.Option(help=f"limit every system to: {', '.join(ISAS)}")] = None,
    wait_policy: Annotated[str, typer.Option(help=f"OMP_WAIT_POLICY: {', '.join(WAIT_POLICIES)}")] = "default",
    prepare_only: Annotated[bool, typer.Option("--prepare", help="convert and calibrate, measure nothing")] = False,
    cache: Annotated[Path | None, typer.Option(help="where conversions are kept")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write everything to this file")] = None,
) -> None:
    """Times qbert and its peers on BERT."""
    errors = Console(stderr=True)
    try:
        settings = Settings(
            model=model, rows=select_rows(peers, _split(rows), sentences=sentences),
            cases=_split(cases) or (("8x128", "1x16") if quick else DEFAULT_CASES), minutes=2.0 if quick else minutes,
            threads=threads or physical_cores(), isa=isa, wait_policy=wait_policy, sentences=sentences,
            say=lambda text: errors.print(f"[dim]{text}[/dim]"),
        )  # fmt: skip
        settings.cache = cache or settings.cache
        _check(settings, target)
        report = (prepare if prepare_only else bench_sentences if sentences else bench_cases)(settings)
    except QBertError as error:
        errors.print(one_line(error))
        raise typer.Exit(2) from None
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(report.model_dump_json(indent=1))
    _print(report)


def _check(settings: Settings, target: str) -> None:
    if target != "cpu":
        raise QBertError(f"target {target!r}: allowed is cpu")
    if settings.isa is not None and settings.isa not in ISAS:
        raise QBertError(f"isa {settings.isa!r}: allowed are {', '.join(ISAS)}")
    if settings.wait_policy not in WAIT_POLICIES:
        raise QBertError(f"wait policy {settings.wait_policy!r}: allowed are {', '.join(WAIT_POLICIES)}")
    if settings.threads < 1 or settings.minutes <= 0:
        raise QBertError(f"threads {settings.threads}, minutes {settings.minutes}: must be positive")
    for name in settings.cases:
        parse_case(name)


def _print(report: Report) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    for table in tables(report):
        console.print(table)
    if report.machine.load_average > report.threads + _QUIET_LOAD:
        console.print(
            f"load average {report.machine.load_average:.1f}: something else was running; these are no measurements"
        )


if __name__ == "__main__":
    typer.run(main)
