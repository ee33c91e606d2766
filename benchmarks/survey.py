"""The survey's table, measured again: every row that this project has a method for, on one model, the same tasks, one machine.

    python -m benchmarks.survey --json FILE                      every method: size, scores, milliseconds
    python -m benchmarks.survey --system GOBO --json FILE        one of them; rows are appended
    python -m benchmarks.survey --untimed --json FILE            without milliseconds, where the machine is not idle
    python -m benchmarks.survey --timed-only --json FILE         milliseconds alone
    python -m benchmarks.survey --report docs/survey.md          the page, from what is stored

A method compresses a fresh copy of the model, on texts of none of the tasks and without labels, and is scored beside the
original: paired changes in points with 95% intervals. The papers' own figures are of BERT-base, of models fine-tuned for each
task, and most of their methods train; sizes compare, changes in kind.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

from qbert.compress import Compression, compress
from qbert.compress.report import stored_bytes
from qbert.convert import quantize_
from qbert.errors import QBertError
from qbert.evaluate import Baseline, EvalResult, load_fp32, load_tokenizer, prepare_baseline, score
from qbert.timing import Rules, Sample, measure, ratio, reason_of
from qbert.workflow import compression_texts
from qbert.zoo import resolve_model

from . import options
from .published import BERT_BASE, REPORTED, SOURCE, TABLE, Published
from .recorder import Recorder, run_command
from .results_schema import RESULTS, Results, SurveyRow, SurveyScore, load_results

MODEL, TASKS = "minilm", ("trec", "sms", "amazon", "lee")
TEXTS, COUNT = "rt,movie", 1024
SURVEYS = RESULTS.parent / "surveys"  # <device>/<date>-<commit>.json; docs/benchmarks.md is of RESULTS alone
_SECONDS = 4.0  # of rounds for a model and the original
BATCH, SEQ = 8, 128


@dataclass(frozen=True)
class Method:
    """What this project does for a row.

    Attributes:
        how: in words, with what is left out of the paper's method.
        recipe: fields of `qbert.Compression`; where that says "quantize", the encoder is calibrated and fused.
        then: what `quantize_` takes after it, for weights alone, which do not run fused.
    """

    how: str
    recipe: dict[str, Any] = field(default_factory=dict)
    then: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All of it, for the results."""
        return self.recipe if self.then is None else {**self.recipe, "then": self.then}


# System of `published.TABLE` -> what comes nearest here. No method trains.
METHODS: dict[str, Method] = {
    "Q-BERT": Method("4-bit groups, 8-bit activations and embeddings; no Hessian, no fine-tuning", {"quantize": "w4a8+w8"}),
    "GOBO": Method("3-bit dictionaries, 4-bit embeddings, exact outliers: the same method", then="gobo3+gobo4"),
    "Lin et al. 2020": Method("a third of the layers taken out by texts; no training", {"layers": 4}),
    "schuBERT": Method(
        "heads and neurons to 60% of the multiply-adds, the rest refitted; no training", {"prune": {"macs": 0.6}}
    ),
    "DistilBERT": Method("half of the layers taken out; no distillation", {"layers": 3}),
    "Zhao et al. 2019": Method("its vocabulary of 4,928 words alone; no smaller layers, no distillation", {"vocabulary": 4928}),
    "Noach and Goldberg 2020": Method(
        "feed-forward and attention output to rank 128, by what they make of texts; no distillation", {"rank": 128}
    ),
    "DynaBERT": Method(
        "depth and width: 5 layers, heads and neurons to 70%; no distillation", {"layers": 5, "prune": {"macs": 0.7}}
    ),
    "DistilBERT with GOBO": Method(
        "half of the layers, then 4-bit dictionaries everywhere; no distillation", {"layers": 3}, "gobo4+gobo4"
    ),
    "MobileBERT, 8 bits": Method("8 bits everywhere, fused, static scales; of this model", {"quantize": "w8a8+w8"}),
    "EdgeBERT": Method(
        "compound: 16,384 words, 5 layers, heads and neurons to 80%, 8 bits; no exits, no training",
        {"vocabulary": 16384, "layers": 5, "prune": {"macs": 0.8}, "quantize": "w8a8+w8"},
    ),
}  # fmt: skip
# Rows without a method that are here otherwise.
ELSEWHERE = {
    "MiniLM": "the model of all rows is one, distilled by its authors",
    "ALBERT": "ALBERT models run quantized and fused; none is made here",
}
NOT_HERE = "not here"


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Lab:
    """What all rows share, each made when it is first asked for."""

    model_name: str
    tasks: Sequence[str]
    scored: bool = True
    timed: bool = True
    _parts: dict[str, Any] = field(default_factory=dict)

    @property
    def original(self) -> Any:
        """The float model."""
        return self._once("model", lambda: load_fp32(resolve_model(self.model_name)))

    @property
    def tokenizer(self) -> Any:
        """Its own."""
        return self._once("tokenizer", lambda: load_tokenizer(resolve_model(self.model_name)))

    @property
    def baselines(self) -> list[Baseline]:
        """Float scores."""
        make = lambda: [prepare_baseline(self.original, self.tokenizer, task) for task in self.tasks]
        found: list[Baseline] = self._once("baselines", make)
        return found

    @property
    def texts(self) -> list[str]:
        """What methods look at: of none of the tasks."""
        found: list[str] = self._once("texts", lambda: compression_texts(TEXTS)[:COUNT])
        return found

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._parts:
            self._parts[name] = make()
        return self._parts[name]


class Made(NamedTuple):
    """A smaller model, and what cuts texts for it."""

    model: Any
    tokenizer: Any


def run(lab: Lab, system: str) -> SurveyRow:
    """One row: figures, or the reason why there are none."""
    method, begin = METHODS[system], time.perf_counter()
    row = SurveyRow(
        system=system, model=lab.model_name, method=method.how, recipe=method.settings, batch=BATCH, seq=SEQ
    )
    try:
        made = make(lab, method)
        row.seconds = time.perf_counter() - begin
        row.stored_bytes = stored_bytes(made.model)
        row.share_of_float32 = row.stored_bytes / stored_bytes(lab.original)
        if lab.scored:
            row.scores = [_score(score(made.model, made.tokenizer, each)) for each in lab.baselines]
        if lab.timed:
            row.time, row.float_time = _times(made.model, lab.original)
            row.speedup = ratio(row.float_time, row.time)
    except QBertError as error:
        row.reason = reason_of(error)
    return row


def make(lab: Lab, method: Method) -> Made:
    """A model by a method, and its tokenizer; the original stays as it is."""
    made = Made(copy.deepcopy(lab.original), lab.tokenizer)
    if method.recipe:
        recipe = Compression(**method.recipe)
        made = Made(*compress(lab.original, recipe, texts=lab.texts, tokenizer=lab.tokenizer, measure=False)[:2])
    if method.then is not None:
        quantize_(made.model, method.then)
    return made


def _score(result: EvalResult) -> SurveyScore:
    change = result.comparison
    assert change is not None
    return SurveyScore(
        task=result.task, metric=result.metric, n=result.n, float_score=change.baseline_score, score=result.score,
        change=-change.drop, low=-change.drop_interval[1], high=-change.drop_interval[0],
    )  # fmt: skip


def _times(made: Any, original: Any) -> tuple[Sample, Sample]:
    """Of the finished model and the original in turns, on tokens that both know."""
    words = min(int(made.config.vocab_size), int(original.config.vocab_size))
    ids = torch.randint(0, words, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        runs = {"made": lambda: made(input_ids=ids), "float32": lambda: original(input_ids=ids)}
        samples = measure(runs, "cpu", Rules(_SECONDS))
    if samples.failures:
        raise QBertError(f"not timed: {samples.failures}")
    return samples["made"], samples["float32"]


# ---- the page -------------------------------------------------------------------------------------------------------


def stored(folder: Path = SURVEYS) -> list[Results]:
    """All files of rows."""
    return [load_results(path) for path in sorted(folder.glob("*/*.json"))]


def merged(files: Iterable[Results]) -> dict[tuple[str, str], SurveyRow]:
    """(machine, system) -> the newest scores and the newest times of it, which two runs may have made."""
    found: dict[tuple[str, str], SurveyRow] = {}
    for file in sorted(files, key=lambda each: each.machine.date):
        for row in file.of(SurveyRow):
            key = (_machine(file), row.system)
            before = found.get(key)
            if before is not None and before.recipe == row.recipe:
                kept: dict[str, Any] = {} if row.scores else {"scores": before.scores}
                kept |= (
                    {}
                    if row.time
                    else {"time": before.time, "float_time": before.float_time, "speedup": before.speedup}
                )
                row = row.model_copy(update=kept)
            found[key] = row
    return found


def _machine(file: Results) -> str:
    """Whatever threads it ran on: scores do not depend on them, and times are of one run each."""
    return f"{file.machine.processor} ({file.machine.isa})"


def page(files: Sequence[Results]) -> str:
    """The page, in Markdown: only what the files and the published table say.

    Raises:
        QBertError: nothing is stored.
    """
    rows = merged(files)
    if not rows:
        raise QBertError("no row of the survey is stored; allowed: after `python -m benchmarks.survey --json FILE`")
    return "\n".join(
        [
            _HEAD,
            *(line for device in dict.fromkeys(device for device, _ in rows) for line in _device(device, rows, files)),
            "",
        ]
    )


_HEAD = f"""# The survey's table, measured again

Made by `python -m benchmarks.survey --report docs/survey.md` from stored results; to change a figure, measure it again
(`python -m benchmarks.survey --json FILE`). The rows are those of {SOURCE}.

**Published**: size with embeddings, times as fast as BERT-base (MNLI, QQP, SST-2, SQuAD: {" / ".join(map(str, BERT_BASE))}),
and the mean change over the tasks that each paper reports, of models that were fine-tuned for each task and, but for GOBO,
trained with the method.

**Here**: what of it this project has, on one model ({MODEL}: all-MiniLM-L6-v2, 22M parameters, half of them embeddings),
without any training and without labels, on {COUNT} texts of none of the tasks ({TEXTS}). Sizes are of the whole model against
its own float32; changes are paired with it, in points with 95% intervals; classifiers are probes that were fitted on the
original's embeddings and stay as they are. Sizes compare row by row, changes in kind only."""


def _device(device: str, rows: dict[tuple[str, str], SurveyRow], files: Sequence[Results]) -> Iterator[str]:
    own = {system: row for (where, system), row in rows.items() if where == device}
    tasks = list(dict.fromkeys(each.task for row in own.values() for each in row.scores))
    head = [
        "kind",
        "system",
        "size %",
        "GPU",
        "CPU",
        "MNLI / QQP / SST-2 / SQuAD",
        "change",
        "here",
        "size %",
        "ms",
        "faster",
        *tasks,
    ]
    yield f"\n## {device}\n"
    yield f"| {' | '.join(head)} |\n|{'---|' * len(head)}"
    for entry in TABLE:
        cells = [*_published(entry), *_here(entry.system, own.get(entry.system), tasks)]
        yield f"| {' | '.join(cells)} |"
    made = [file for file in files if _machine(file) == device]
    runs = sorted(
        {f"{file.machine.date[:10]}, {file.machine.threads} threads, commit {file.machine.commit}" for file in made}
    )
    yield f"\nMilliseconds of a forward of {BATCH} x {SEQ} tokens; faster: than float32 in turns with it; -: not measured."
    yield f"Runs: {'; '.join(runs)}."
    for row in own.values():
        if row.reason:
            yield f"\n{row.system}: {row.reason}"


def _published(entry: Published) -> list[str]:
    reported = REPORTED[entry.system]
    times = ["-" if each is None else f"{each:g}x" for each in (reported.gpu, reported.cpu)]
    scores = " / ".join("-" if each is None else f"{each}" for each in reported.scores)
    return [entry.kind, entry.system, f"{entry.share:.1f}", *times, scores, f"{entry.change:+.2f}"]


def _here(system: str, row: SurveyRow | None, tasks: Sequence[str]) -> list[str]:
    if row is None:
        why = METHODS[system].how + "; not measured yet" if system in METHODS else ELSEWHERE.get(system, NOT_HERE)
        return [why, *[""] * (3 + len(tasks))]
    share = "-" if row.share_of_float32 is None else f"{100 * row.share_of_float32:.1f}"
    milliseconds = "-" if row.time is None else f"{1e3 * row.time.median:.1f}"
    faster = "-" if row.speedup is None else f"{row.speedup:.2f}x"
    by_task = {each.task: f"{each.change:+.1f} [{each.low:+.1f}, {each.high:+.1f}]" for each in row.scores}
    return [row.method, share, milliseconds, faster, *(by_task.get(task, "-") for task in tasks)]


# ---- the command ----------------------------------------------------------------------------------------------------


def main(
    system: Annotated[
        list[str] | None, typer.Option("--system", help="rows by name; may be repeated; all by default")
    ] = None,
    model: Annotated[str, typer.Option(help="local folder, hub id or alias of a float model")] = MODEL,
    task: Annotated[list[str] | None, typer.Option("--task", help="may be repeated")] = None,
    untimed: Annotated[bool, typer.Option("--untimed", help="no milliseconds")] = False,
    timed_only: Annotated[bool, typer.Option("--timed-only", help="no scores")] = False,
    json_path: options.JsonFile = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="write the page from stored results, measure nothing")
    ] = None,
) -> None:
    """Measures rows of the survey's table, or writes the page."""
    if report is not None:
        report.write_text(page(stored()), encoding="utf-8")
        return
    chosen = system or list(METHODS)
    for name in chosen:
        if name not in METHODS:
            raise QBertError(f"system {name!r}; allowed: {', '.join(METHODS)}")
    lab = Lab(model, task or TASKS, scored=not timed_only, timed=not untimed)
    settings: dict[str, Any] = {
        "model": model,
        "tasks": list(lab.tasks),
        "systems": chosen,
        "texts": TEXTS,
        "count": COUNT,
    }
    recorder, console = Recorder("survey", settings, json_path), Console(stderr=True)
    for name in chosen:
        console.print(name)
        recorder.add(run(lab, name))
        console.print(
            recorder.of(SurveyRow)[-1].model_dump(exclude={"time", "float_time", "recipe"}, exclude_none=True)
        )


if __name__ == "__main__":
    run_command(main)
