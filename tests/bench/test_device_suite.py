"""The device suite: it ends in time whatever its steps do, keeps what they wrote, says what passed; all of it in a dry run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import typer

from benchmarks import device_suite, machine, suite_steps
from benchmarks.machine import ROOT, child_environment
from benchmarks.results_schema import (
    AttentionRow,
    BertRow,
    CeilingRow,
    GemmRow,
    ResultsWriter,
    RunRow,
    StepRow,
    TestsRow,
    load_results,
)
from benchmarks.suite_steps import Failed, Options, Skip, Step, Suite, run_suite
from qbert.errors import QBertError

PYTHON = [sys.executable, "-c"]
JUNIT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.a" name="test_good" time="0.5"/>
<testcase classname="tests.a" name="test_bad[1]" time="1.5"><failure message="assert 1 == 2&#10;more">long</failure></testcase>
<testcase classname="tests.b" name="test_broken" time="0"><error message="">x</error></testcase>
<testcase classname="tests.b" name="test_not_here" time="0"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def steps(monkeypatch, *made):
    monkeypatch.setattr(suite_steps, "STEPS", made)


def options(out, seconds=60.0, **more):
    return Options(out, time.monotonic() + seconds, dry_run=True, **more)


def suite_of(tmp_path, seconds=60.0):
    """A suite in which single steps are tried."""
    here = machine.describe("cpu")
    writer = ResultsWriter(tmp_path / "results.json", here)
    return Suite(options(tmp_path, seconds), here, writer)


def found(out):
    return {row.name: row for row in load_results(out / "results.json").of(StepRow)}


def good_tests(suite, seconds):
    suite.add_tests(TestsRow(suite=suite_steps.GPU_TESTS, passed=1))


# ---- time -----------------------------------------------------------------------------------------------------------


def test_shares_are_of_what_is_left(tmp_path, monkeypatch):
    given = {}

    def step(name, minimum, share, most=float("inf")):
        return Step(name, lambda suite, seconds: given.setdefault(name, seconds) and None, minimum, share, most)

    steps(monkeypatch, step("a", 1, 1), step("b", 1, 1, most=5), step("c", 5000, 1), step("d", 1, 1))
    monkeypatch.setattr(suite_steps.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite_steps, "describe", lambda target: machine.describe("cpu"))
    run_suite(Options(tmp_path, time.monotonic() + 10_010.0))
    left = 10_000.0
    assert given["a"] == pytest.approx(left / 4, abs=60)  # what it does not use is the later ones'
    assert given["b"] == 5
    assert given["c"] == pytest.approx(5000, abs=60)  # a step gets its minimum
    assert given["d"] == pytest.approx(left, abs=60)


def test_what_there_is_no_time_for_is_skipped_and_named(tmp_path, monkeypatch):
    steps(monkeypatch, Step("long", lambda *_: time.sleep(0.5), 0, 1), Step("late", good_tests, 1, 1))
    assert not run_suite(options(tmp_path, 3.6))
    late = found(tmp_path)["late"]
    assert late.status == "skipped"
    assert late.reason == "needs 1 s, 0 s are left"


def is_alive(process: int) -> bool:
    """Whether it runs; a dead one that its new parent has not noticed does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_is_stopped_at_its_cap_with_all_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(suite_steps, "_GRACE", 0.2)
    suite = suite_of(tmp_path)
    begin = time.monotonic()
    ended = suite.call(["sh", "-c", "sleep 61 & echo $!; trap '' INT; sleep 62"], 0.3)
    assert ended.status == suite_steps._STOPPED
    assert time.monotonic() - begin < 3
    child, deadline = int(ended.said.split()[0]), time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:  # killed, but whoever inherits it has yet to collect it
        time.sleep(0.01)
    assert not is_alive(child)


@pytest.mark.parametrize("in_background", [False, True])
def test_what_a_stopped_process_writes_at_its_end_is_kept(tmp_path, in_background):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    code = "import time\ntry: print('begun', flush=True), time.sleep(60)\nexcept KeyboardInterrupt: print('what it had so far')"
    try:
        ended = suite_of(tmp_path).call([*PYTHON, code], 2.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.status == suite_steps._STOPPED
    assert ended.said.split("\n")[0] == "begun"
    assert "what it had so far" in ended.said
    assert "what it had so far" in (tmp_path / "suite.log").read_text()


def test_workers_and_time_limits_where_their_plugins_are(monkeypatch):
    monkeypatch.setattr(suite_steps.os, "cpu_count", lambda: 16)
    there = {"xdist", "pytest_timeout"}
    monkeypatch.setattr(suite_steps.importlib.util, "find_spec", lambda name: name if name in there else None)
    options = suite_steps._parallel()
    assert options[:2] == ["-n", "12"]
    assert options[options.index("--timeout") + 1] == "120"
    there.clear()
    assert suite_steps._parallel() == []


# ---- steps that fail ------------------------------------------------------------------------------------------------


def test_a_step_that_fails_costs_itself_alone(tmp_path, monkeypatch):
    def raises(error):
        def run(suite, seconds):
            raise error

        return run

    steps(
        monkeypatch,
        Step("tests", good_tests, 0, 1),
        Step("skip", raises(Skip("nothing to do")), 0, 1),
        Step("fail", raises(Failed("exit status 7")), 0, 1),
        Step("stop", raises(Failed("cap", stopped=True)), 0, 1),
        Step("break", raises(FileNotFoundError("gone")), 0, 1),
    )
    assert run_suite(options(tmp_path))
    rows = found(tmp_path)
    assert {name: row.status for name, row in rows.items()} == {
        "tests": "done", "skip": "skipped", "fail": "failed", "stop": "stopped", "break": "failed",
    }  # fmt: skip
    assert rows["break"].reason == "FileNotFoundError: gone"
    assert rows["tests"].rows == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.index("exit status 7") < summary.index("gpu tests: 1 passed")


def test_a_benchmark_that_refuses_is_skipped_with_its_reason(tmp_path, monkeypatch):
    """Exit code 2 is what benchmarks give for input that they cannot do."""
    code = "import sys; print('error: no such thing here'); sys.exit(int(sys.argv[2] == 'cpu') and 2)"
    monkeypatch.setattr(suite_steps, "child_command", lambda module: [*PYTHON, code])
    steps(monkeypatch, Step("gemm", suite_steps.benchmark("bench_gemm", ()), 0, 1))
    run_suite(options(tmp_path))
    assert found(tmp_path)["gemm"].status == "skipped"
    assert found(tmp_path)["gemm"].reason == "error: no such thing here"


def test_being_terminated_ends_with_a_summary(tmp_path, monkeypatch):
    steps(
        monkeypatch, Step("tests", lambda *_: os.kill(os.getpid(), signal.SIGTERM), 0, 1), Step("b", good_tests, 0, 1)
    )
    before = signal.getsignal(signal.SIGTERM)
    assert not run_suite(options(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is before
    assert not found(tmp_path)
    assert "steps; " in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("rows", "passed"),
    [
        ([], False),
        ([TestsRow(suite="gpu tests", passed=3)], True),
        ([TestsRow(suite="gpu tests", passed=3, complete=False)], False),
        ([TestsRow(suite="gpu tests", passed=3, failed=1)], False),
        ([TestsRow(suite="gpu tests", passed=3), TestsRow(suite="every kernel", failed=1)], False),
        ([TestsRow(suite="gpu tests", passed=3), TestsRow(suite="every kernel", passed=9, complete=False)], True),
        ([TestsRow(suite="every kernel", passed=9)], False),
    ],
)
def test_the_verdict_is_that_of_the_correctness_tests(tmp_path, monkeypatch, rows, passed):
    steps(monkeypatch, Step("tests", lambda suite, seconds: any(map(suite.add_tests, rows)) or None, 0, 1))
    assert run_suite(options(tmp_path)) == passed


def test_verdict_without_tests_being_asked_for(tmp_path, monkeypatch):
    steps(monkeypatch, Step("tests", good_tests, 0, 1), Step("gemm", lambda *_: None, 0, 1))
    assert run_suite(options(tmp_path, only=("gemm",)))
    assert list(found(tmp_path)) == ["gemm"]


# ---- correctness ----------------------------------------------------------------------------------------------------


def test_junit_is_read(tmp_path):
    path = tmp_path / "x.xml"
    path.write_text(JUNIT)
    row = suite_steps.parse_junit(path)
    assert (row.passed, row.failed, row.skipped, row.seconds) == (1, 2, 1, 2.0)
    assert row.failures == ["tests.a.test_bad[1]: assert 1 == 2", "tests.b.test_broken: no message"]
    assert not row.good


def test_gpu_tests_are_found():
    files = suite_steps.gpu_test_files()
    assert "tests/test_timing.py" in files
    assert "tests/test_cli.py" not in files


EVERY_KERNEL = """import sys
print("a_op w8 1x2x3 triton: good")
print("b_op - 1x2x3 triton: {b}")
print("{more}")
sys.exit({status})"""


@pytest.mark.parametrize(
    ("sanitizer", "plain", "row"),
    [
        (("good", "========= ERROR SUMMARY: 0 errors", 0), None, ("every kernel under memcheck", 2, 0)),
        (("good", "========= ERROR SUMMARY: 3 errors", 86), None, ("every kernel under memcheck", 2, 1)),
        (("wrong", "", 1), None, ("every kernel under memcheck", 1, 1)),
        (None, ("good", "", 0), ("every kernel", 2, 0)),
        (None, ("wrong", "", 1), ("every kernel", 1, 1)),
        ("broken", ("good", "", 0), ("every kernel", 2, 0)),
    ],
)
def test_every_kernel_with_and_without_a_sanitizer(tmp_path, monkeypatch, sanitizer, plain, row):
    suite = suite_of(tmp_path)
    suite.options = Options(tmp_path, suite.options.deadline, dry_run=False)

    def code(said):
        return EVERY_KERNEL.format(b=said[0], more=said[1], status=said[2])

    tool = tmp_path / "compute-sanitizer"
    body = "echo Device not supported; exit 1" if sanitizer == "broken" else f'exec "{sys.executable}" -c "$CODE"'
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CODE", code(sanitizer) if isinstance(sanitizer, tuple) else "")
    monkeypatch.setattr(suite_steps.shutil, "which", lambda name: str(tool) if sanitizer else None)
    monkeypatch.setattr(suite_steps, "child_command", lambda module: [*PYTHON, code(plain) if plain else ""])
    said = suite_steps.run_every_kernel(suite, 30.0)
    found = suite.tests[0]
    assert (found.suite, found.passed, found.failed) == row
    if sanitizer == "broken":
        assert "compute-sanitizer: Device not supported" in said


@pytest.mark.parametrize(
    ("said", "failed", "reason"),
    [
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, None),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 0,
         "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings), to be read in suite.log"),
        ("========= ERROR SUMMARY: 3 errors", 1, None),
    ],
)  # fmt: skip
def test_races_are_read_and_errors_counted(tmp_path, monkeypatch, said, failed, reason):
    suite = suite_of(tmp_path)
    suite.options = Options(tmp_path, suite.options.deadline, dry_run=False)
    monkeypatch.setattr(suite_steps.shutil, "which", lambda name: "echo")
    lines = f"\na_op w8 1x2x3 cuda: good\n{said}\n"
    monkeypatch.setattr(suite_steps, "child_command", lambda module: [lines])
    suite_steps.sanitize("racecheck")(suite, 30.0)
    row = suite.tests[0]
    assert (row.suite, row.passed, row.failed, row.reason) == ("every kernel under racecheck", 1, failed, reason)


def test_other_tools_need_a_sanitizer(tmp_path):
    with pytest.raises(Skip, match="no compute-sanitizer here"):
        suite_steps.sanitize("synccheck")(suite_of(tmp_path), 30.0)


# ---- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [True, False])
def test_tuned_tiles_are_put_in_use(tmp_path, monkeypatch, use):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    code = "import pathlib, sys; out = pathlib.Path(sys.argv[-1]); out.mkdir(); (out / 'gpu.json').write_text('{\"a\": 1}')"
    code += "; (out / 'gpu-tiles.json').write_text('rows')"
    monkeypatch.setattr(suite_steps, "TUNED", tuned)
    monkeypatch.setattr(suite_steps, "child_command", lambda module: [*PYTHON, code])
    suite = suite_of(tmp_path)
    suite.options = Options(tmp_path, suite.options.deadline, dry_run=True, use_tiles=use)
    said = suite_steps.tune_tiles(suite, 30.0)
    assert [path.name for path in tuned.iterdir()] == (["gpu.json"] if use else [])
    assert said == f"gpu.json {'in use from here on' if use else 'written, not used'}"


def test_a_table_that_was_cut_off_reaches_no_kernel(tmp_path, monkeypatch):
    code = (
        "import pathlib, sys; out = pathlib.Path(sys.argv[-1]); out.mkdir(); (out / 'gpu.json').write_text('{\"a\": ')"
    )
    monkeypatch.setattr(suite_steps, "TUNED", tmp_path / "tuned")
    monkeypatch.setattr(suite_steps, "child_command", lambda module: [*PYTHON, code])
    steps(monkeypatch, Step("tune", suite_steps.tune_tiles, 0, 1))
    run_suite(options(tmp_path))
    assert found(tmp_path)["tune"].status == "failed"
    assert not (tmp_path / "tuned").exists()


# ---- the command ----------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", text)
        file.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def test_carried_wheels_are_found_here_and_by_children(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    assert device_suite.install_wheels(tmp_path / "nothing") is None
    wheel(tmp_path / "wheels", "a_carried_package", "ANSWER = 42\n")
    site = device_suite.install_wheels(tmp_path / "wheels")
    assert sys.path[0] == str(site)
    code = "import a_carried_package; print(a_carried_package.ANSWER)"
    done = subprocess.run([*PYTHON, code], env=child_environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "42"
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_text("no zip")
    with pytest.raises(typer.BadParameter, match="wheels of"):
        device_suite.install_wheels(tmp_path / "wheels")


def test_the_command_needs_nothing_that_is_carried():
    """pydantic comes as a wheel; before that the module must be there."""
    code = "import sys; sys.modules['pydantic'] = sys.modules['torch'] = None; import benchmarks.device_suite"
    subprocess.run([*PYTHON, code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "must be positive"),
        (["--minutes", "1", "--dry-run", "--only", "gems"], "step 'gems': allowed are environment, build, tests"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    command = [sys.executable, "-m", "benchmarks.device_suite", "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(suite_steps.torch.cuda, "is_available", lambda: False)
    with pytest.raises(QBertError, match="no NVIDIA GPU here; --dry-run"):
        run_suite(Options(tmp_path / "out", time.monotonic() + 60))
    assert not (tmp_path / "out").exists()


def test_results_of_another_commit_are_not_mixed_in(tmp_path, monkeypatch):
    steps(monkeypatch, Step("tests", good_tests, 0, 1))
    monkeypatch.setenv("QBERT_COMMIT", "aaaaaaa")
    assert run_suite(options(tmp_path))
    assert run_suite(options(tmp_path))
    monkeypatch.setenv("QBERT_COMMIT", "bbbbbbb")
    with pytest.raises(QBertError, match="write to another file"):
        run_suite(options(tmp_path))


def test_the_tree_can_be_carried():
    size = suite_steps.tracked_bytes()
    if size is None:
        pytest.skip("no git here")
    assert size < suite_steps.MOST_TREE_BYTES


@pytest.mark.slow
def test_dry_run(tmp_path):
    """Every step, by the command, without a GPU: under a minute on a machine that does nothing else."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.device_suite", "--minutes", "5", "--out", str(out), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    results = load_results(out / "results.json")
    statuses = {row.name: row.status for row in results.of(StepRow)}
    needs_gpu = ("tune", "synccheck", "racecheck")
    assert statuses == {step.name: "skipped" if step.name in needs_gpu else "done" for step in suite_steps.STEPS}
    assert "no NVIDIA GPU" in next(row.reason for row in results.of(StepRow) if row.name == "tune")
    for kind in (GemmRow, AttentionRow, BertRow, CeilingRow):
        rows = results.of(kind)
        assert rows
        if kind is not CeilingRow:
            assert any(row.time for row in rows)
    assert {row.benchmark for row in results.of(RunRow)} == {"suite", "ceilings", "gemm", "attention", "bert"}
    assert all(row.good for row in results.of(TestsRow))
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert len(files) <= suite_steps.MOST_FILES
    for path in files:
        assert len(path.parts) <= 3
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", part) for part in path.parts)
    assert json.loads((out / "environment.txt").read_text().partition("\n\n")[0])["device"]
    assert done.stdout.rstrip().splitlines()[-1].startswith("every kernel: ")
