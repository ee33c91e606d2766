"""An encoder's latency end to end: qbert beside torch, torchao, ONNX Runtime, OpenVINO, bitsandbytes and gemlite, in turns.

    python -m benchmarks.bench_bert --target cpu --peers all                  base, about ten minutes
    python -m benchmarks.bench_bert --target cuda --model large --json out.json
    python -m benchmarks.bench_bert --model base,mpnet-base --rows "*-int8,qbert-w8a8*"     two models, in the same rounds
    python -m benchmarks.bench_bert --model modernbert-base --cases 8x128,2x1024
    python -m benchmarks.bench_bert --model mpnet --sentences --unsorted      sentences per second on real text
    python -m benchmarks.bench_bert --prepare                                 convert once, measure nothing

Every system is a process of its own with all the threads and its own defaults. The parent lets one run at a time, in rounds,
and goes on only when that one's threads are idle; on a GPU only loading and first forwards, which compile, are done at once. A
system that is missing, broken or refuses a shape is a row with its reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
import torch
import typer
from rich.console import Console

from qbert.clocks import GpuState, gpu_state
from qbert.errors import QBertError
from qbert.target import physical_cores
from qbert.timing import Unavailable, come_to_rest, in_rounds
from qbert.zoo import cache_dir

from . import options
from .bert_inputs import (
    DEFAULT_CASES,
    QUICK_CASES,
    Batch,
    Sentence,
    any_sentences,
    make_batch,
    pad,
    parse_case,
    real_sentences,
    tokenize,
    within,
)
from .bert_models import ModelFolder, find_model, load_float32
from .bert_report import add_ratios, cosines, sample, tables
from .bert_work import work_of
from .linears import true_float32
from .machine import memory_bytes
from .peers import BASELINES, ISAS, ROWS, TARGETS, Job, RowSpec, isa_environment, rows_of
from .peers.base import Bound, Floats, Loaded
from .peers.child import mean_pooled
from .peers.driver import Child
from .problems import SHAPES
from .recorder import QUIET_LOAD, Recorder, Setting, check_picture, device_of, run_command, table_console
from .results_schema import BertRow, SystemRow

TURN_SECONDS = 0.15  # short forwards are repeated for that long in each turn
MIN_ROUNDS, MAX_ROUNDS = 3, 25
SENTENCES, SENTENCE_BATCH = 512, 32  # sentence-transformers' own batch size
CALIBRATION_SENTENCES = 300
POOL = 2000  # sentences that batches are drawn from
WAIT_POLICIES = ("default", "passive", "active")
ALL = "all"
# Without what compiles for a minute (torchao on a CPU).
QUICK_ROWS = {
    "cpu": ("torch-bf16", "torch-bf16-compile", "onnxruntime-int8", "openvino-bf16", "bitsandbytes-int8", "qbert-w8a8",
            "qbert-w8a8-static"),
    "cuda": ("torch-bf16-compile", "torch-bf16-graph", "torch-bf16-unpadded", "torchao-int8-dynamic", "bitsandbytes-int8",
             "gemlite-a8w8", "qbert-w8a8", "qbert-w8a8-static", "qbert-w8a8-static-graph", "qbert-w8a8-static-graph-triton",
             "qbert-w8a8-static-graph-cuda", "qbert-gobo3a8-static-graph"),
}  # fmt: skip
_SLOW, _LONG = 600.0, 1800.0  # seconds that a first forward and a conversion may take
_LEAST_COSINE = 0.5  # of a result that may count as one; 3-bit codes of random weights have 0.67, unrelated ones 0
_PATIENCE = 120.0  # for a first forward on a GPU, whose time is borrowed
_MEMORY_PER_MODEL, _SPARE_MEMORY = 3, 1 << 29  # a system loads a float model, converts it and keeps a packed copy
_CONVERTED_SECONDS = 2.0  # a longer preparation left memory behind: the system gets a fresh process

Item = TypeVar("Item")


class Caller(Protocol):
    """A child, or what stands for one in tests."""

    def call(self, command: str, *arguments: Any, timeout: float) -> Any: ...


@dataclass
class Settings:
    """What the command line says."""

    models: tuple[str, ...] = ("base",)
    rows: list[RowSpec] = field(default_factory=list)
    target: str = "cpu"
    cases: tuple[str, ...] = DEFAULT_CASES["cpu"]
    minutes: float = 10.0
    threads: int = 1
    isa: str | None = None
    wait_policy: str = "default"
    cache: Path = field(default_factory=lambda: cache_dir() / "peers")
    sentences: bool = False
    unsorted: bool = False
    json_path: Path | None = None
    say: Callable[[str], None] = lambda text: None


# ---- systems --------------------------------------------------------------------------------------------------------


class Team:
    """All systems that run one model and could be started, each in its process."""

    def __init__(self, settings: Settings, model: ModelFolder) -> None:
        self._settings = settings
        self.model = model
        sentences, texts = sentences_for(model, CALIBRATION_SENTENCES, part="train")
        self._texts = tuple(texts)
        self._calibration = tuple(map(tuple, sentences))
        self.children: dict[str, Child] = {}
        self.systems = {row.name: _system(row, model.name) for row in settings.rows}

    def start(self) -> None:
        """Processes first, all at once, because they import for seconds; then each prepares and loads."""
        for row in self._settings.rows:
            with self._or_reason(row.name):
                self._begin(row)
        started = [row for row in self._settings.rows if row.name in self.children]
        for_each(self._load_or_reason, started, at_once=self._settings.target == "cuda")

    def _begin(self, row: RowSpec) -> None:
        self.children[row.name] = Child(row.name, self._environment(row), self._settings.target)

    def _load_or_reason(self, row: RowSpec) -> None:
        self._settings.say(f"loading {self.model.name} {row.name}")
        with self._or_reason(row.name):
            self._load(row)

    def prepare_only(self) -> None:
        """Conversions of all rows, one process at a time."""
        for row in self._settings.rows:
            self._settings.say(f"preparing {self.model.name} {row.name}")
            with self._or_reason(row.name):
                self._begin(row)
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

    def entrants(self, case: BertRow, script: Script) -> list[Entrant]:
        """What is left of its systems, for a case."""
        return [Entrant(child, self._row(case, name), script) for name, child in self.children.items()]

    def refusals(self, case: BertRow, reason: str) -> list[BertRow]:
        """Rows of the same for a case that the model cannot take."""
        return [self._row(case, name).model_copy(update={"reason": reason}) for name in self.children]

    def _row(self, case: BertRow, name: str) -> BertRow:
        system = self.systems[name]
        signed = {"name": name, "library": system.library, "configuration": system.configuration}
        return case.model_copy(update=signed)

    def _load(self, row: RowSpec) -> None:
        system = self.systems[row.name]
        self._check_memory()
        system.prepare_seconds = self._prepare(row)
        if system.prepare_seconds > _CONVERTED_SECONDS and self._settings.target == "cpu":
            self.close(row.name)
            self._begin(row)
            self._prepare(row)
        loaded: Loaded = self.children[row.name].call("load", timeout=_LONG)
        system.weight_bytes, system.padding, system.load_seconds = loaded.weight_bytes, loaded.padding, loaded.seconds

    def _prepare(self, row: RowSpec) -> float:
        settings = self._settings
        job = Job(
            self.model.folder, self.model.work, settings.threads, dict(row.options), settings.sentences,
            self._calibration, self._texts, settings.target, self.model.padding,
        )  # fmt: skip
        seconds: float = self.children[row.name].call("prepare", job, timeout=_LONG)
        return seconds

    def _check_memory(self) -> None:
        need = _MEMORY_PER_MODEL * self.model.float_bytes + _SPARE_MEMORY
        free = memory_bytes("MemAvailable")
        if free and free < need:
            raise Unavailable(f"{free / 1e9:.1f} GB of memory free, {need / 1e9:.1f} wanted: choose fewer with --rows")

    def _environment(self, row: RowSpec) -> dict[str, str]:
        settings, threads = self._settings, str(self._settings.threads)
        environment = {
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(settings.cache / "inductor"), **row.environment,
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


def _system(row: RowSpec, model: str) -> SystemRow:
    return SystemRow(
        name=row.name, library=row.library, model=model, configuration=row.configuration, source=row.source
    )


@dataclass(frozen=True)
class Script:
    """What every system is told in a case, and what it has to answer.

    Attributes:
        inputs: arguments of the first command, which takes the case and runs it once.
        reference: (rows, k), torch's float32 result, and `keep`: which rows of a system's result belong to it.
        timed: the command that runs it for timing, with its arguments.
        memory: the command that runs it and says how much memory that took.
    """

    inputs: Sequence[Any]
    reference: Floats
    keep: Any
    first: str = "bind"
    timed: Sequence[Any] = ("turn", TURN_SECONDS)
    memory: str = "memory"


@dataclass(frozen=True)
class Entrant:
    """One system in one case.

    Attributes:
        system: its process.
        row: whose model, name and case are said, to be filled in.
        script: what it is told.
    """

    system: Caller
    row: BertRow
    script: Script

    @property
    def key(self) -> str:
        """What tells it from the others of its case."""
        return f"{self.row.model} {self.row.name}"


def sentences_for(model: ModelFolder, count: int, part: str = "test") -> tuple[list[Sentence], list[str]]:
    """See `any_sentences`; token ids that the model's table has."""
    sentences, texts = any_sentences(count, part, model.tokenizer)
    return within(sentences, model.vocabulary), texts


# ---- measuring ------------------------------------------------------------------------------------------------------


def for_each(do: Callable[[Item], None], items: Iterable[Item], *, at_once: bool) -> None:
    """One item after the other; or all at once, where what is waited for is done by other processes that compile.

    Never at once on a CPU that is measured: they would fight for its cores and its memory.
    """
    if not at_once:
        for item in items:
            do(item)
        return
    waiting = list(items)
    with ThreadPoolExecutor(max(1, len(waiting))) as pool:
        for done in [pool.submit(do, item) for item in waiting]:
            done.result()


def measure_case(entrants: Sequence[Entrant], seconds: float, target: str = "cpu") -> list[BertRow]:
    """All systems on one case, their rows filled in and given back.

    Args:
        seconds: to spend, first forwards included.
    """
    begin = time.perf_counter()
    cuda = target == "cuda"
    patience = min(_SLOW, max(_PATIENCE, seconds)) if cuda else _SLOW

    def first_forward(entrant: Entrant) -> None:
        row, script = entrant.row, entrant.script
        with _reason_in(row):
            bound: Bound = entrant.system.call(script.first, *script.inputs, timeout=patience)
            row.first_seconds = None if cuda else bound.seconds  # at once, all of them are slower
            row.cosine_mean, row.cosine_min = mean, _ = cosines(script.reference, bound.hidden[script.keep])
            if not mean > _LEAST_COSINE:
                raise Unavailable(
                    f"wrong result: mean cosine {mean:.3f} to torch float32, at least {_LEAST_COSINE:g} is right"
                )

    for_each(first_forward, entrants, at_once=cuda)
    able = {entrant.key: entrant for entrant in entrants if entrant.row.reason is None}
    before = _state(target)
    turns = {key: partial(each.system.call, *each.script.timed, timeout=_SLOW) for key, each in able.items()}
    left = seconds - (time.perf_counter() - begin)
    rounds, failed = in_rounds(turns, left, MIN_ROUNDS, MAX_ROUNDS, refusal=Unavailable)
    after = _state(target)
    for key, reason in failed.items():
        able[key].row.reason = reason
    for key, times in rounds.items():
        row = able[key].row
        row.time = sample(times, before, after)
        with _reason_in(row):
            row.peak_bytes = able[key].system.call(able[key].script.memory, timeout=_SLOW)
    rows = [entrant.row for entrant in entrants]
    for model in dict.fromkeys(row.model for row in rows):
        add_ratios({row.name: row for row in rows if row.model == model}, BASELINES[target])
    return rows


def _state(target: str) -> GpuState | None:
    return gpu_state(torch.device(target)) if target == "cuda" else None


@contextmanager
def _reason_in(row: BertRow) -> Iterator[None]:
    try:
        yield
    except Unavailable as reason:
        row.reason = str(reason)


def reference_hidden(folder: Path, batches: Mapping[str, Batch], settings: Settings) -> dict[str, Floats]:
    """torch's float32 hidden states at all tokens that are not padding: (tokens, hidden) a batch."""
    torch.set_num_threads(settings.threads)
    device = device_of(settings.target)
    model = load_float32(folder).to(device)
    found = {}
    with torch.inference_mode(), true_float32():
        for name, batch in batches.items():
            hidden = model(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device)).last_hidden_state.cpu()
            found[name] = hidden[batch.mask.bool()].numpy()
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    come_to_rest()
    return found


# ---- the two benchmarks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """What one model is fed and held to, by case.

    Attributes:
        cases: rows of nobody.
        scripts: what its systems are told; a case that is too long for the model has none.
    """

    batches: Mapping[str, Batch]
    cases: Mapping[str, BertRow]
    scripts: Mapping[str, Script]


def _material(model: ModelFolder, settings: Settings) -> Material:
    sentences, _ = sentences_for(model, POOL)
    batches = {name: make_batch(parse_case(name), sentences, model.padding) for name in settings.cases}
    fitting = {name: batch for name, batch in batches.items() if batch.mask.shape[1] <= model.longest}
    settings.say(f"float32 reference of {model.name}")
    references = reference_hidden(model.folder, fitting, settings)
    scripts = {
        name: Script((batch.ids.numpy(), batch.mask.numpy()), references[name], batch.mask.bool().numpy())
        for name, batch in fitting.items()
    }
    return Material(batches, {name: _case(model, name, batch) for name, batch in batches.items()}, scripts)


def bench_cases(settings: Settings) -> Recorder:
    """Latency on batches of given shapes; systems of all models in the same rounds."""
    begin = time.perf_counter()
    recorder = _recorder(settings)
    models = [find_model(name, settings.cache) for name in settings.models]
    materials = {model.name: _material(model, settings) for model in models}
    with _teams(settings, models) as teams:
        batches = materials[models[0].name].batches
        for index, name in enumerate(_order(batches, settings.target)):
            left = 60 * settings.minutes - (time.perf_counter() - begin)
            if left <= 0 and settings.target == "cuda":
                settings.say(f"{name} is left out: the {settings.minutes:g} minutes are over")
                continue
            systems = sum(len(team.children) for team in teams)
            settings.say(f"{name}: {systems} systems, {left / 60:.1f} minutes left")
            recorder.extend(_measured(teams, materials, name, left / (len(batches) - index), settings.target))
        recorder.extend(row for team in teams for row in team.finish())
    return recorder


@contextmanager
def _teams(settings: Settings, models: Sequence[ModelFolder]) -> Iterator[list[Team]]:
    """A team for each model, all of them ready; their processes end with the block."""
    teams = [Team(settings, model) for model in models]
    try:
        for team in teams:
            team.start()
        yield teams
    finally:
        for team in teams:
            team.close()


def _measured(
    teams: Sequence[Team], materials: Mapping[str, Material], case: str, seconds: float, target: str
) -> list[BertRow]:
    """Rows of all models in one case."""
    entrants, refused = [], []
    for team in teams:
        material, model = materials[team.model.name], team.model
        if case in material.scripts:
            entrants += team.entrants(material.cases[case], material.scripts[case])
        else:
            width = material.cases[case].width
            refused += team.refusals(material.cases[case], f"{width} tokens; {model.name} takes {model.longest}")
    rows = measure_case(entrants, seconds, target)
    for row in rows:
        if row.time is not None:
            team = next(team for team in teams if team.model.name == row.model)
            batch = materials[row.model].batches[case]
            row.work = work_of(team.model.folder, batch, row.name, team.systems[row.name].weight_bytes or 0)
    return rows + refused


def _order(batches: Mapping[str, Batch], target: str) -> list[str]:
    """On a GPU, whose time may end, in order of value: as they were given.

    On a CPU from small to large, so that memory which an allocator keeps from a larger batch is not counted for a smaller one.
    """
    return list(batches) if target == "cuda" else sorted(batches, key=lambda name: batches[name].mask.numel())


def bench_sentences(settings: Settings) -> Recorder:
    """Time to embed real sentences, in batches of like length as sentence-transformers sorts them, or as they come."""
    begin = time.perf_counter()
    recorder = _recorder(settings)
    models = [find_model(name, settings.cache) for name in settings.models]
    texts = real_sentences(SENTENCES)
    embedded = {model.name: _sentences_of(model, texts, settings) for model in models}
    with _teams(settings, models) as teams:
        left = 60 * settings.minutes - (time.perf_counter() - begin)
        entrants = [entrant for team in teams for entrant in team.entrants(*embedded[team.model.name])]
        recorder.extend(measure_case(entrants, left, settings.target))
        recorder.extend(row for team in teams for row in team.finish())
    return recorder


def _sentences_of(model: ModelFolder, texts: Sequence[str], settings: Settings) -> tuple[BertRow, Script]:
    """A row of nobody for these texts, and what the model's systems are told."""
    sentences = within(tokenize(texts, MAX_SENTENCE_TOKENS, model.tokenizer), model.vocabulary)
    order, batches = batched(sentences, model.padding, by_length=not settings.unsorted)
    settings.say(f"float32 reference of {model.name}")
    reference = _reference_embeddings(model.folder, batches, settings)
    ordered = [texts[i] for i in order]
    calls = groups_of(ordered, SENTENCE_BATCH) if settings.unsorted else [ordered]
    inputs = ([(b.ids.numpy(), b.mask.numpy()) for b in batches], calls, SENTENCE_BATCH)
    tokens, positions = sum(b.tokens for b in batches), sum(b.mask.numel() for b in batches)
    case = BertRow(
        name="", library="", model=model.name, random_weights=model.random,
        case=f"{len(texts)} sentences{', unsorted' if settings.unsorted else ''}", batch=len(texts),
        width=max(b.mask.shape[1] for b in batches), tokens=tokens, padding_share=1 - tokens / positions,
    )  # fmt: skip
    return case, Script(inputs, reference, slice(None), "sentences", ("sweep",), "sweep_memory")


MAX_SENTENCE_TOKENS = 256  # MiniLM's own limit


def batched(
    sentences: Sequence[Sentence], padding: int = 0, size: int = SENTENCE_BATCH, *, by_length: bool = True
) -> tuple[list[int], list[Batch]]:
    """Indices by length, longest first, or as they come, and the padded batches in that order."""
    order = list(range(len(sentences)))
    if by_length:
        order.sort(key=lambda i: -len(sentences[i]))
    return order, [pad([sentences[i] for i in group], padding) for group in groups_of(order, size)]


def groups_of(items: Sequence[Item], size: int) -> list[list[Item]]:
    """So many at a time; the last group has what is left."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _reference_embeddings(folder: Path, batches: Sequence[Batch], settings: Settings) -> Floats:
    hidden = reference_hidden(folder, {str(i): batch for i, batch in enumerate(batches)}, settings)
    parts = []
    for packed, batch in zip(hidden.values(), batches, strict=True):
        padded = np.zeros((*batch.mask.shape, packed.shape[1]), dtype=np.float32)
        padded[batch.mask.bool().numpy()] = packed
        parts.append(mean_pooled(padded, batch.mask.numpy()))
    return np.concatenate(parts)


def prepare(settings: Settings) -> Recorder:
    """Everything that is done once and kept."""
    recorder = _recorder(settings)
    for name in settings.models:
        team = Team(settings, find_model(name, settings.cache))
        try:
            team.prepare_only()
        finally:
            team.close()
        recorder.extend(team.systems.values())
    return recorder


def _case(model: ModelFolder, name: str, batch: Batch) -> BertRow:
    sequences, width = batch.mask.shape
    return BertRow(
        name="", library="", model=model.name, random_weights=model.random, case=name, batch=sequences, width=width,
        tokens=batch.tokens, padding_share=batch.padding_share,
    )  # fmt: skip


def _recorder(settings: Settings) -> Recorder:
    """Before anything runs: the load average that it notes is that of others."""
    told: dict[str, Setting] = {
        "target": settings.target, "model": ",".join(settings.models), "threads": settings.threads, "isa": settings.isa,
        "wait_policy": settings.wait_policy, "minutes": settings.minutes, "cases": list(settings.cases),
    }  # fmt: skip
    return Recorder("bert", told, settings.json_path, settings.target)


# ---- the command ----------------------------------------------------------------------------------------------------


def select_rows(peers: str, patterns: Sequence[str], *, sentences: bool, target: str = "cpu") -> list[RowSpec]:
    """Rows by library and by name.

    Args:
        peers: `all`, `none`, or names of libraries with commas between them.
        patterns: shell wildcards of row names; none: all of those libraries.

    Raises:
        QBertError: an unknown library, or a pattern that fits no row.
    """
    libraries = frozenset(row.library for row in ROWS[target].values())
    asked = libraries if peers == ALL else frozenset(filter(None, peers.split(",")) if peers != "none" else ())
    if asked - libraries:
        known = ", ".join(sorted(libraries))
        raise QBertError(f"peers {', '.join(sorted(asked - libraries))}: allowed are {ALL}, none, or some of {known}")
    rows = rows_of(asked, texts=sentences, target=target)
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise QBertError(f"rows {pattern!r} fits none of {', '.join(row.name for row in rows)}")
    return [row for row in rows if not patterns or any(fnmatchcase(row.name, each) for each in patterns)]


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, text.split(","))) if text else ()


def main(
    target: Annotated[str, typer.Option(help=f"what to measure on: {', '.join(TARGETS)}")] = "cpu",
    peers: Annotated[str, typer.Option(help="all, none, or libraries with commas between them")] = ALL,
    model: Annotated[
        str, typer.Option(help=f"with commas: random weights ({', '.join(SHAPES)}) or models by name")
    ] = "base",
    rows: Annotated[str | None, typer.Option(help="wildcards of rows, with commas")] = None,
    cases: Annotated[str | None, typer.Option(help="BATCHxLENGTH, raggedBATCH and squadBATCH, with commas")] = None,
    sentences: Annotated[bool, typer.Option(help="embed real sentences instead of cases")] = False,
    unsorted: Annotated[bool, typer.Option(help="sentences in batches as they come, not by length")] = False,
    minutes: Annotated[float, typer.Option(help="rounds are chosen to fit, three at least")] = 10.0,
    quick: Annotated[bool, typer.Option(help="few cases and rows, two minutes")] = False,
    threads: Annotated[int | None, typer.Option(help="of every system; all physical cores by default")] = None,
    isa: Annotated[str | None, typer.Option(help=f"limit every system on a CPU to: {', '.join(ISAS)}")] = None,
    wait_policy: Annotated[str, typer.Option(help=f"OMP_WAIT_POLICY: {', '.join(WAIT_POLICIES)}")] = "default",
    prepare_only: Annotated[bool, typer.Option("--prepare", help="convert and calibrate, measure nothing")] = False,
    cache: Annotated[Path | None, typer.Option(help="where conversions are kept")] = None,
    json_path: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Times qbert and its peers on whole encoders."""
    errors = Console(stderr=True)
    device_of(target)
    check_picture(plot)
    patterns = _split(rows) or (_quick_rows(target, peers) if quick else ())
    settings = Settings(
        models=_split(model), target=target, rows=select_rows(peers, patterns, sentences=sentences, target=target),
        cases=_split(cases) or (QUICK_CASES if quick else DEFAULT_CASES)[target], minutes=2.0 if quick else minutes,
        threads=threads or physical_cores(), isa=isa, wait_policy=wait_policy, sentences=sentences, unsorted=unsorted,
        json_path=json_path,
        say=lambda text: errors.print(f"[dim]{text}[/dim]"),
    )  # fmt: skip
    settings.cache = cache or settings.cache
    _check(settings)
    recorder = (prepare if prepare_only else bench_sentences if sentences else bench_cases)(settings)
    _print(recorder, settings)
    if plot is not None:
        from .plots import speedup_bars

        speedup_bars(recorder.of(BertRow), plot)


def _quick_rows(target: str, peers: str) -> tuple[str, ...]:
    """Rows that start within a quick run's two minutes; of each library the one that is fastest as a rule."""
    wanted = [
        name
        for name in QUICK_ROWS[target]
        if peers == ALL or ROWS[target][name].library in (*peers.split(","), "qbert")
    ]
    return tuple(dict.fromkeys((BASELINES[target], *wanted)))


def _check(settings: Settings) -> None:
    if settings.isa is not None and (settings.isa not in ISAS or settings.target != "cpu"):
        raise QBertError(f"isa {settings.isa!r}: allowed on a CPU are {', '.join(ISAS)}")
    if settings.wait_policy not in WAIT_POLICIES:
        raise QBertError(f"wait policy {settings.wait_policy!r}: allowed are {', '.join(WAIT_POLICIES)}")
    if settings.threads < 1 or settings.minutes <= 0:
        raise QBertError(f"threads {settings.threads}, minutes {settings.minutes}: must be positive")
    if not settings.models or len(set(settings.models)) != len(settings.models):
        raise QBertError(f"model {','.join(settings.models)!r}: allowed are names with commas between them, each once")
    if settings.unsorted and not settings.sentences:
        raise QBertError("--unsorted is about --sentences, which is not given")
    for name in settings.cases:
        parse_case(name)


def _print(recorder: Recorder, settings: Settings) -> None:
    console, machine = table_console(), recorder.machine
    limit = f", all limited to {settings.isa}" if settings.isa else ""
    for table in tables(recorder.of(SystemRow), recorder.of(BertRow), machine, limit):
        console.print(table)
    if settings.target == "cpu" and machine.load_average > settings.threads + QUIET_LOAD:
        console.print(f"load average {machine.load_average:.1f}: something else was running; these are no measurements")


if __name__ == "__main__":
    run_command(main)
