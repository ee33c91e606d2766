"""What the device suite does, step by step; `device_suite` is the command.

A step is a process of its own with a cap on its time, so that whatever breaks, hangs or takes the GPU's context with it costs
that step alone. Benchmarks append their rows to the one results file as they go; what was written before a stop stays.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from qbert.errors import QBertError
from qbert.tiles import TUNED

from .bounds import Bounds
from .machine import COMMIT_VARIABLE, ROOT, Machine, child_command, child_environment, describe
from .recorder import device_name
from .results_schema import (
    AttentionRow,
    BertRow,
    CeilingRow,
    GemmRow,
    ResultsWriter,
    RunRow,
    StepRow,
    TestsRow,
    load_results,
    results_path,
)

RESULTS, LOG, SUMMARY, ENVIRONMENT = "results.json", "suite.log", "summary.txt", "environment.txt"
JUNIT, REPORT, TILES = "gpu-tests.xml", "report.html", "tiles"
MOST_FILES = 8
MOST_TREE_BYTES = 64 << 20  # of what is carried to the machine
RESERVE = 10.0  # seconds at the end: a stopped step's grace, the summary
_GRACE = 5.0  # seconds that an interrupted process gets to write what it has
_MARGIN = 0.15  # of a step's time, left to start and to end
_REFUSED = 2  # exit code of a benchmark that says why it cannot run here
_STOPPED = -1
_MOST_TEST_WORKERS, _TEST_SECONDS = 12, 120
_TESTS_GRACE = 15.0  # pytest waits for its workers before it writes anything
_WIDTH = 140
GPU_TESTS, _TESTS = "gpu tests", "tests"
_SANITIZER_ERRORS, _HAZARDS = (
    re.compile(r"ERROR SUMMARY: [1-9]\d* error"),
    re.compile(r"RACECHECK SUMMARY: [1-9]\d* hazard.*"),
)


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        out: folder for all files.
        deadline: on `time.monotonic`.
        dry_run: tiny problems on the CPU.
        only: names of steps; none: all.
        use_tiles: whether the tuned table is put where qbert reads it.
        site: carried packages, if there are any.
    """

    out: Path
    deadline: float
    dry_run: bool = False
    only: tuple[str, ...] = ()
    use_tiles: bool = True
    site: Path | None = None

    @property
    def target(self) -> str:
        """What is measured."""
        return "cpu" if self.dry_run else "cuda"


class Skip(Exception):
    """A step that has nothing to do here. The message is its reason."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        run: does it in so many seconds; says what there is to say, raises `Skip`, or `Failed`.
        minimum: seconds without which it is not begun.
        share: of the time that is left, in proportion to its own and the later steps' shares.
        most: seconds that it never needs more than.
    """

    name: str
    run: Callable[[Suite, float], str | None]
    minimum: float
    share: float
    most: float = float("inf")


class Failed(Exception):
    """A step that did not come to its end. `stopped`: by its cap."""

    def __init__(self, reason: str, *, stopped: bool = False) -> None:
        super().__init__(reason)
        self.stopped = stopped


@dataclass(frozen=True)
class Ended:
    """A process that was run: exit status (`_STOPPED` if it was stopped by its cap), what it said, and the last line."""

    status: int
    said: str

    @property
    def last(self) -> str:
        """Without the frame of a table or a box around it."""
        lines = [line.strip(" \t│|") for line in self.said.splitlines()]
        return next((line[:300] for line in reversed(lines) if re.search(r"\w", line)), f"exit status {self.status}")


@dataclass
class Suite:
    """One run."""

    options: Options
    machine: Machine
    writer: ResultsWriter
    steps: list[StepRow] = field(default_factory=list)
    tests: list[TestsRow] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Folder of all files."""
        return self.options.out

    def left(self) -> float:
        """Seconds for steps."""
        return self.options.deadline - RESERVE * (0.3 if self.options.dry_run else 1.0) - time.monotonic()

    def add_tests(self, row: TestsRow) -> None:
        """Keeps the verdict of a run of tests."""
        self.tests.append(row)
        self.writer.add(row)

    def call(self, command: Sequence[str], seconds: float, grace: float | None = None, **environment: str) -> Ended:
        """Runs a process until it ends or its time does; what it says goes to the log.

        Its group is interrupted first, so that it can write what it has, and killed a little later: after `grace` seconds.
        """
        with open(self.out / LOG, "a+b") as log:
            log.write(f"\n$ {' '.join(command)}    [at most {seconds:.0f} s]\n".encode())
            log.flush()
            begin = log.tell()
            with _interruptible():
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, process_group=0,
                    env={**self._environment(), **environment},
                )  # fmt: skip
            status = _wait(process, seconds, _GRACE if grace is None else grace)
            log.seek(begin)
            return Ended(status, log.read().decode(errors="replace"))

    def _environment(self) -> dict[str, str]:
        """Of children; all rows are of the commit that this run began with, also when tuned tiles have changed the tree."""
        found = {**child_environment(), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if self.machine.commit:
            found[COMMIT_VARIABLE] = self.machine.commit
        return found | ({"OMP_NUM_THREADS": "1"} if self.options.dry_run else {})


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within the block children are started that can be interrupted, also by a shell's background job.

    Such a job ignores SIGINT, and what a process ignores its children ignore.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _wait(process: subprocess.Popen[bytes], seconds: float, grace: float) -> int:
    """Its exit status, or `_STOPPED`; its group is gone afterwards, whatever happens to this process."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return _STOPPED
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


# ---- all of it ------------------------------------------------------------------------------------------------------


def run_suite(options: Options) -> bool:
    """Runs all steps; whether the correctness tests ran and passed.

    Raises:
        QBertError: no GPU here, an unknown step, or results of another machine or commit in the folder.
    """
    unknown = [name for name in options.only if name not in {step.name for step in STEPS}]
    if unknown:
        raise QBertError(f"step {unknown[0]!r}: allowed are {', '.join(step.name for step in STEPS)}")
    if not options.dry_run and not torch.cuda.is_available():
        raise QBertError("no NVIDIA GPU here; --dry-run tries every step out without one")
    options.out.mkdir(parents=True, exist_ok=True)
    machine = describe(options.target)
    suite = Suite(options, machine, ResultsWriter(options.out / RESULTS, machine))
    seconds = options.deadline - time.monotonic()
    suite.writer.add(RunRow(benchmark="suite", settings={"seconds": round(seconds), "dry_run": options.dry_run}))
    with _terminated_as_interrupted(), contextlib.suppress(KeyboardInterrupt):
        _run_steps(suite)
    _summarize(suite)
    return _passed(suite)


def _passed(suite: Suite) -> bool:
    """Whether no result was wrong, and the tests, if they were asked for, ran to their end."""
    wanted = not suite.options.only or _TESTS in suite.options.only
    ran = any(row.suite == GPU_TESTS and row.good for row in suite.tests)
    return (ran or not wanted) and not any(row.failed for row in suite.tests)


def _run_steps(suite: Suite) -> None:
    chosen = [step for step in STEPS if not suite.options.only or step.name in suite.options.only]
    for index, step in enumerate(chosen):
        shares = sum(each.share for each in chosen[index:])
        part = 1.0 if suite.options.dry_run else step.share / shares  # tiny steps may take what they need
        seconds = min(suite.left(), step.most, max(step.minimum, suite.left() * part))
        row = _run_step(suite, step, seconds)
        suite.steps.append(row)
        suite.writer.add(row)
        print(f"{row.name}: {row.status} in {row.seconds:.1f} s{f': {row.reason}' if row.reason else ''}", flush=True)


def _run_step(suite: Suite, step: Step, seconds: float) -> StepRow:
    minimum = min(step.minimum, 1.0) if suite.options.dry_run else step.minimum
    if seconds < minimum:
        reason = f"needs {minimum:.0f} s, {max(0.0, suite.left()):.0f} s are left"
        return StepRow(name=step.name, status="skipped", reason=reason)
    rows, begin = _count_rows(suite), time.monotonic()
    row = StepRow(name=step.name, status="done")
    try:
        row.reason = step.run(suite, seconds)
    except Skip as reason:
        row.status, row.reason = "skipped", str(reason)
    except Failed as reason:
        row.status, row.reason = "stopped" if reason.stopped else "failed", str(reason)
    except (OSError, ValueError, xml.ParseError) as error:
        row.status, row.reason = "failed", f"{type(error).__name__}: {error}"
    row.seconds, row.rows = time.monotonic() - begin, _count_rows(suite) - rows
    return row


def _count_rows(suite: Suite) -> int:
    with open(suite.writer.path, "rb") as file:
        return sum(1 for _ in file) - 2


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Within it a request to terminate ends the running step's processes, too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- preparation ----------------------------------------------------------------------------------------------------


def record_environment(suite: Suite, seconds: float) -> str:
    """Driver, clocks, compiler, packages and settings as they are, as text; nothing is changed."""
    commands = (
        ["nvidia-smi"], ["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE,TEMPERATURE"], ["nvcc", "--version"],
        ["uname", "-a"], ["lscpu"], [sys.executable, "-m", "pip", "list", "--disable-pip-version-check"],
    )  # fmt: skip
    variables = {
        name: value for name, value in sorted(os.environ.items()) if re.match("CUDA|OMP|MKL|QBERT|TORCH|TRITON", name)
    }
    parts = [suite.machine.model_dump_json(indent=1), f"variables: {variables}", tree_size()]
    for command in commands:
        parts.append(f"$ {' '.join(command)}\n{_answer(command, seconds / 2)}")
    (suite.out / ENVIRONMENT).write_text("\n\n".join(parts) + "\n")
    site = suite.options.site
    carried = ", ".join(sorted(path.stem for path in site.glob("*.dist-info"))) if site else "nothing"
    commit = suite.machine.commit or "not known"
    return f"{device_name(suite.machine)}, commit {commit}; {tree_size()}; carried packages: {carried}"


def _answer(command: Sequence[str], seconds: float) -> str:
    if shutil.which(command[0]) is None:
        return "not here"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no answer in {seconds:.0f} s"
    return (done.stdout + done.stderr).strip()


def tree_size() -> str:
    """How large what git knows of is, against what may be carried."""
    size = tracked_bytes()
    if size is None:
        return "tracked files: not known, no git here"
    return f"tracked files: {size / 2**20:.1f} of {MOST_TREE_BYTES >> 20} MiB"


def tracked_bytes() -> int | None:
    """Bytes of all files that git tracks or would, or None where there is no repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    except (OSError, subprocess.CalledProcessError):
        return None
    files = {ROOT / os.fsdecode(name) for name in names if name}
    return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())


def build_extensions(suite: Suite, seconds: float) -> str | None:
    """Compiles what csrc/ has, in place: `qbert._cuda` too, where nvcc is here and CUTLASS's headers are or were carried.

    Without it Triton and torch run, which `explain` says.
    """
    if not (ROOT / "setup.py").is_file() or not (ROOT / "csrc").is_dir():
        raise Skip("no sources in this installation")
    wanted = ["--version"] if suite.options.dry_run else ["build_ext", "--inplace"]
    jobs = str(os.cpu_count() or 1)
    ended = suite.call([sys.executable, "setup.py", *wanted], seconds, QBERT_BUILD_JOBS=jobs)
    _raise_unless_done(ended, seconds)
    built = sorted(path.name for path in (ROOT / "qbert").glob("*.so"))
    left_out = re.findall(r"^qbert\._cuda is not built: .*$", ended.said, re.MULTILINE)
    return "; ".join([", ".join(built) or "nothing was built", f"{jobs} jobs", *left_out])


# ---- correctness ----------------------------------------------------------------------------------------------------


def run_gpu_tests(suite: Suite, seconds: float) -> str | None:
    """pytest over the files that have tests for a GPU; interrupted at its cap, it still says what it found until then."""
    files = gpu_test_files()
    if not files:
        raise Skip("no tests in this installation")
    files = [name for name in files if name.endswith(_TINY_TESTS)] if suite.options.dry_run else files
    junit = suite.out / JUNIT
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider", "--maxfail=50"]
    environment = {}
    if not suite.options.dry_run:
        command += _parallel()
        environment["OMP_NUM_THREADS"] = "1"  # of each worker, for the references that CPUs compute
    ended = suite.call([*command, f"--junitxml={junit}", *files], seconds, _TESTS_GRACE, **environment)
    row = parse_junit(junit) if junit.is_file() else TestsRow(suite=GPU_TESTS, reason=ended.last)
    row.complete = ended.status in (0, 1)
    suite.add_tests(row)
    if not row.complete:
        raise Failed(f"stopped at its cap of {seconds:.0f} s" if ended.status == _STOPPED else ended.last,
                     stopped=ended.status == _STOPPED)  # fmt: skip
    return f"{row.passed} passed, {row.failed} failed, {row.skipped} skipped"


def _parallel() -> list[str]:
    """Options of pytest where its plugins are there: compiling kernels and references keep CPUs busy, not the GPU."""
    workers = min(_MOST_TEST_WORKERS, (os.cpu_count() or 1) * 3 // 4)
    options = []
    if importlib.util.find_spec("xdist") is not None and workers > 1:
        options += ["-n", str(workers), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is not None:  # a kernel that never ends costs one test
        options += ["--timeout", str(_TEST_SECONDS), "--timeout-method", "thread"]
    return options


def gpu_test_files() -> list[str]:
    """Test files that mention the marker; others are not even imported there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def parse_junit(path: Path) -> TestsRow:
    """The verdict in a JUnit file."""
    row = TestsRow(suite=GPU_TESTS)
    for case in xml.parse(path).getroot().iter("testcase"):
        problem = next((case.find(tag) for tag in ("failure", "error") if case.find(tag) is not None), None)
        row.seconds += float(case.get("time", 0))
        if problem is not None:
            row.failed += 1
            first = (problem.get("message") or "").strip().splitlines() or ["no message"]
            row.failures.append(f"{case.get('classname')}.{case.get('name')}: {first[0][:200]}")
        elif case.find("skipped") is not None:
            row.skipped += 1
        else:
            row.passed += 1
    return row


def run_every_kernel(suite: Suite, seconds: float) -> str | None:
    """Every operator once under compute-sanitizer's memcheck, or, where there is none that works, just so."""
    end = time.monotonic() + seconds
    try:
        # From a pool all neighbours belong to the same allocation, and nothing would be out of bounds.
        return _sanitized(suite, "memcheck", seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    except Skip as reason:
        ended = suite.call(_every_kernel_command(suite), end - time.monotonic())
        return f"{_every_kernel(suite, 'every kernel', ended)}; {reason}"


def sanitize(tool: str) -> Callable[[Suite, float], str | None]:
    """A step that runs every operator once under another of compute-sanitizer's tools."""
    return lambda suite, seconds: _sanitized(suite, tool, seconds)


def _sanitized(suite: Suite, tool: str, seconds: float, **environment: str) -> str:
    """Raises `Skip` where there is no compute-sanitizer, or none that works."""
    sanitizer = None if suite.options.dry_run else shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise Skip("no compute-sanitizer here")
    options = ["--tool", tool]
    if tool != "racecheck":  # whose hazards are read, not counted
        options += ["--error-exitcode", "86"]
    if tool == "memcheck":  # accesses count, not what CUDA's libraries ask in vain
        options += ["--report-api-errors", "no"]
    ended = suite.call([sanitizer, *options, *_every_kernel_command(suite)], seconds, None, **environment)
    if not verdicts(ended.said) and ended.status != _STOPPED:
        raise Skip(f"compute-sanitizer: {ended.last}")
    return _every_kernel(suite, f"every kernel under {tool}", ended)


def _every_kernel_command(suite: Suite) -> list[str]:
    return [*child_command("every_kernel"), "--target", suite.options.target]


def verdicts(said: str) -> list[str]:
    """The lines in which `every_kernel` says what it found."""
    return [line for line in said.splitlines() if re.match(r"\w+ \S+ \d+x\d+x\d+ \w+: ", line)]


def _every_kernel(suite: Suite, name: str, ended: Ended) -> str:
    """Its row, and the row in words."""
    lines = verdicts(ended.said)
    wrong = [line for line in lines if not line.endswith(": good")]
    good = len(lines) - len(wrong)
    if errors := _SANITIZER_ERRORS.search(ended.said):
        wrong.append(f"{errors.group(0)}, see {LOG}")
    if ended.status > 0 and not wrong:
        wrong.append(ended.last)
    complete = ended.status != _STOPPED
    row = TestsRow(suite=name, passed=good, failed=len(wrong), failures=wrong, complete=complete)
    if hazards := _HAZARDS.search(
        ended.said
    ):  # it does not see that a barrier orders a copy and the threads that wait for it
        row.reason = f"{hazards.group(0)}, to be read in {LOG}"
    suite.add_tests(row)
    if not complete:
        raise Failed(f"{name}: stopped at its cap after {good} good ones", stopped=True)
    return f"{name}: {good} good, {len(wrong)} not{f'; {row.reason}' if row.reason else ''}"


# ---- measuring ------------------------------------------------------------------------------------------------------


def tune_tiles(suite: Suite, seconds: float) -> str | None:
    """Fastest tiles for the most valuable problems; from then on they are what is measured."""
    folder = suite.out / TILES
    ended = suite.call([*child_command("tune"), "--minutes", _minutes(seconds), "--out", str(folder)], seconds)
    tables = [path for path in folder.glob("*.json") if not path.stem.endswith("-tiles")] if folder.is_dir() else []
    _raise_unless_done(ended, seconds, kept=bool(tables))
    if not suite.options.use_tiles:
        return f"{', '.join(path.name for path in tables)} written, not used"
    for path in tables:
        json.loads(path.read_text())  # a table that was cut off must not reach a kernel
        shutil.copyfile(path, TUNED / path.name)
    return f"{', '.join(path.name for path in tables)} in use from here on"


def benchmark(
    module: str, quick: Sequence[str], timed: bool = True, brief: Sequence[str] = ()
) -> Callable[[Suite, float], str | None]:
    """A step that runs a benchmark.

    Args:
        module: of this package; quick: its arguments in a dry run.
        timed: whether it takes --minutes.
        brief: arguments for which more problems fit into minutes.
    """

    def run(suite: Suite, seconds: float) -> str | None:
        command = [*child_command(module), "--target", suite.options.target, "--json", str(suite.writer.path)]
        if suite.options.dry_run:
            command += quick
        else:
            command += [*brief, *(["--minutes", _minutes(seconds)] if timed else [])]
        _raise_unless_done(suite.call(command, seconds), seconds)
        return None

    return run


def make_report(suite: Suite, seconds: float) -> str | None:
    """A page of what is there."""
    files = [str(path) for path in (suite.writer.path, *sorted((suite.out / TILES).glob("*-tiles.json")))]
    ended = suite.call([*child_command("report"), *files, "-o", str(suite.out / REPORT)], seconds)
    _raise_unless_done(ended, seconds)
    return REPORT


def _minutes(seconds: float) -> str:
    return f"{seconds * (1 - _MARGIN) / 60:.3f}"


def _raise_unless_done(ended: Ended, seconds: float, *, kept: bool = False) -> None:
    """`kept`: what it wrote before it was stopped can be used."""
    if ended.status == _STOPPED:
        if not kept:
            raise Failed(f"stopped at its cap of {seconds:.0f} s", stopped=True)
    elif ended.status == _REFUSED:
        raise Skip(ended.last)
    elif ended.status:
        raise Failed(ended.last)


_TINY_TESTS = "test_timing.py"
_TINY_CEILINGS = ("--size", "128", "--copy-mib", "4", "--seconds", "0.01", "--threads", "1")
_TINY_GEMM = ("--model", "base", "--tokens", "1", "--only", "w8a8", "--seconds", "0.01", "--threads", "1")
_TINY_ATTENTION = ("--model", "minilm", "--length", "64", "--seconds", "0.01", "--threads", "1")
_TINY_BERT = (
    "--model",
    "tiny",
    "--rows",
    "torch-fp32,qbert-w8a8",
    "--cases",
    "1x16",
    "--minutes",
    "0.05",
    "--threads",
    "1",
)
_BRIEF_GEMM = ("--seconds", "0.1")
# Without what Inductor compiles for each shape anew, half a minute and more, while all others wait.
_BRIEF_BERT = (
    "--rows",
    "torch-bf16,torch-bf16-graph,torch-bf16-unpadded,qbert-w8a8,qbert-*-graph,qbert-*-graph-triton,qbert-*-graph-cuda*",
)
STEPS = (
    Step("environment", record_environment, minimum=10, share=0.5, most=30),
    Step("build", build_extensions, minimum=20, share=9, most=300),
    Step(_TESTS, run_gpu_tests, minimum=30, share=4),
    Step("every-kernel", run_every_kernel, minimum=30, share=1, most=90),
    Step("tune", tune_tiles, minimum=60, share=5),
    Step("ceilings", benchmark("ceilings", _TINY_CEILINGS, timed=False), minimum=10, share=0.3, most=40),
    Step("gemm", benchmark("bench_gemm", _TINY_GEMM, brief=_BRIEF_GEMM), minimum=30, share=5),
    Step("attention", benchmark("bench_attention", _TINY_ATTENTION), minimum=20, share=2),
    Step("bert", benchmark("bench_bert", _TINY_BERT, brief=_BRIEF_BERT), minimum=60, share=6),
    # Late, because they are slow, and because results that are right under memcheck have answered most of what they ask.
    Step("synccheck", sanitize("synccheck"), minimum=30, share=0.7, most=90),
    Step("racecheck", sanitize("racecheck"), minimum=30, share=0.7, most=90),
    Step("report", make_report, minimum=10, share=0.5, most=60),
)


# ---- the end --------------------------------------------------------------------------------------------------------


def _summarize(suite: Suite) -> None:
    """The last thing that is said, and in a file: figures, steps, tests."""
    with open(suite.out / SUMMARY, "w") as file:
        for console in (Console(file=file, width=_WIDTH), Console(width=_WIDTH)):
            for table in (_figures(suite), _steps_table(suite)):
                console.print(table)
            keep = results_path(suite.machine, "benchmarks/results")
            console.print(f"to keep the results: cp {suite.writer.path} {keep}", highlight=False, soft_wrap=True)
            for row in suite.tests:
                verdict = "good" if row.good else row.reason or ("failed" if row.complete else "stopped before its end")
                console.print(
                    f"{row.suite}: {row.passed} passed, {row.failed} failed, {row.skipped} skipped: {verdict}"
                )
                for failure in row.failures[:20]:
                    console.print(f"  {failure}", markup=False, highlight=False, soft_wrap=True)


def _steps_table(suite: Suite) -> Table:
    table = Table(title=f"steps; {device_name(suite.machine)}; results in {suite.writer.path}", title_justify="left")
    for header in ("step", "status", "seconds", "rows", ""):
        table.add_column(header, justify="right" if header in ("seconds", "rows") else "left")
    for row in suite.steps:
        table.add_row(row.name, row.status, f"{row.seconds:.1f}", str(row.rows), row.reason or "")
    return table


def _figures(suite: Suite) -> Table:
    """One line for each candidate of each benchmark: how it stands to the baseline and to its bound, over all problems."""
    results = load_results(suite.writer.path)
    bounds = Bounds.of(results.of(CeilingRow))
    table = Table(title="medians over all problems, with the least and the most", title_justify="left")
    for header in ("benchmark", "candidate", "problems", "failed", "times the baseline", "of the bound"):
        table.add_column(header, justify="left" if header in ("benchmark", "candidate") else "right")
    kinds: Mapping[str, Sequence[GemmRow | AttentionRow | BertRow]] = {
        "gemm": results.of(GemmRow), "attention": results.of(AttentionRow), "bert": results.of(BertRow),
    }  # fmt: skip
    for kind, rows in kinds.items():
        for name in dict.fromkeys(row.name for row in rows):
            of = [row for row in rows if row.name == name]
            shares = [bounds.share(row.work, row.time.median) for row in of if row.work and row.time]
            table.add_row(
                kind, name, str(len(of)), str(sum(row.time is None for row in of)),
                _range([row.speedup for row in of if row.speedup], ".2f"), _range([s for s in shares if s], ".0%"),
            )  # fmt: skip
    return table


def _range(values: Sequence[float], pattern: str) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):{pattern}} ({min(values):{pattern}} ... {max(values):{pattern}})"
