"""Results files: every row comes back as it was written, whatever kills the writer, and what does not fit is named."""

import itertools
import json
import math
import os
import signal
import time

import pytest

from benchmarks.machine import Gpu, Machine
from benchmarks.results_schema import (
    RESULTS,
    AccuracyRow,
    AttentionRow,
    BertRow,
    CeilingRow,
    GemmRow,
    QuantizeRow,
    ResultsWriter,
    RunRow,
    StepRow,
    SystemRow,
    TestsRow,
    TileRow,
    Work,
    load_results,
    results_path,
)
from qbert.clocks import GpuState
from qbert.errors import QBertError
from qbert.timing import Sample

MACHINE = Machine(
    device="A Processor, 2 threads", flags=["avx2"], isa="avx2", cores=2, last_level_cache=0, memory=0, kernel="6",
    load_average=0.0, versions={"torch": "2"}, commit="abc1234+", date="2026-11-22T10:00:00+00:00",
)  # fmt: skip
TIME = Sample.of([1.0, 2.0, 4.0], 3, "clock", before=GpuState(sm_mhz=1980, throttling=("power cap",)), after=None)
ROWS = [
    RunRow(benchmark="gemm", settings={"minutes": 1.5, "cases": ["8x128"], "quick": True}),
    GemmRow(name="qbert w8a8", library="qbert", regime="cold", t=1, n=2, k=3, scheme="w8a8", time=TIME, speedup=1.5,
            baseline="torch bf16", work=Work(operations=12, precision="int8", bytes=20)),
    GemmRow(name="torchao", library="torchao", regime="warm", t=1, n=2, k=3, reason="not installed"),
    AttentionRow(name="sdpa", library="torch", batch=1, heads=12, head_dim=64, length=128, tokens=100, ragged=True,
                 padding="masked"),
    SystemRow(name="torch-fp32", library="torch", model="base", configuration="eager", notes=["a", "b"]),
    BertRow(name="torch-fp32", library="torch", model="base", random_weights=True, case="8x128", batch=8, width=128,
            tokens=1024, padding_share=0.0, cosine_min=math.inf),
    QuantizeRow(model="minilm", scheme="w8a8", seconds=1.0),
    AccuracyRow(model="minilm", task="trec", name="w8a8", library="qbert", drop=-0.01, drop_low=-0.02, drop_high=0.0),
    CeilingRow(device="cuda", quantity="copy", per_second=3e12, time=TIME),
    TestsRow(suite="gpu", passed=3, failed=1, failures=["test_x: 1 != 2"]),
    TileRow(operation="w8a8_linear", t=1, n=2, k=3, tile={"road": "tma", "warps": 8}, chosen=True),
    StepRow(name="gemm", status="skipped", reason="no time"),
]  # fmt: skip


def without_rounds(row):
    return type(row).model_validate(row.model_dump())


def test_rows_of_every_kind_come_back(tmp_path):
    writer = ResultsWriter(tmp_path / "new" / "r.json", MACHINE)
    for row in ROWS:
        writer.add(row)
    found = load_results(writer.path)
    assert found.machine == MACHINE
    assert found.rows == [without_rounds(row) for row in ROWS]
    assert not found.torn
    assert [row.name for row in found.of(GemmRow)] == ["qbert w8a8", "torchao"]
    assert len(writer.path.read_text().splitlines()) == len(ROWS) + 2  # a row is a line


def test_the_file_is_json_after_every_row(tmp_path):
    writer = ResultsWriter(tmp_path / "r.json", MACHINE)
    assert json.loads(writer.path.read_text())["rows"] == []
    for count, row in enumerate(ROWS, 1):
        writer.add(row)
        assert len(json.loads(writer.path.read_text())["rows"]) == count


def test_no_number_is_lost(tmp_path):
    """NaN and Inf are findings: JSON has no word for them, so they are strings in the file."""
    writer = ResultsWriter(tmp_path / "r.json", MACHINE)
    writer.add(ROWS[5].model_copy(update={"cosine_mean": math.nan}))
    found = load_results(writer.path).of(BertRow)[0]
    assert math.isnan(found.cosine_mean)
    assert found.cosine_min == math.inf


def test_several_processes_append_in_turn(tmp_path):
    first, second = (ResultsWriter(tmp_path / "r.json", MACHINE) for _ in range(2))
    first.add(ROWS[0])
    second.add(ROWS[1])
    first.add(ROWS[2])
    assert len(load_results(first.path).rows) == 3


def test_another_machine_or_commit_gets_another_file(tmp_path):
    path = tmp_path / "r.json"
    ResultsWriter(path, MACHINE).add(ROWS[0])
    ResultsWriter(path, MACHINE.model_copy(update={"load_average": 9.0, "device": "A Processor, 1 threads"}))
    for change in ({"commit": "fff0000"}, {"device": "B, 2 threads"}):
        with pytest.raises(QBertError, match="write to another file"):
            ResultsWriter(path, MACHINE.model_copy(update=change))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_named_and_refused(tmp_path, version):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"schema": version, "machine": {}, "rows": []}))
    with pytest.raises(QBertError, match=r"r\.json: (no schema version|schema version .*); this qbert reads version 1"):
        load_results(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"benchmark": "bert"}', "no schema version"),
        ('{"schema": 1, "machine": {}, "rows": []}', "machine: device"),
        ('{"schema": 1, "rows": [], "machine": {}, "more": 1}', "found schema, rows, machine, more"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(QBertError, match=message):
        load_results(path)
    with pytest.raises(QBertError, match="cannot be read"):
        load_results(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "gemms"}, "row 2: value"),
        ({"kind": "gemm", "name": "x", "library": "x", "regime": "warm", "t": "many", "n": 1, "k": 1}, "row 2: gemm.t"),
        ({"kind": "step", "name": "x", "status": "done", "colour": 1}, "row 2: step.colour"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, row, message):
    path = tmp_path / "r.json"
    ResultsWriter(path, MACHINE).add(ROWS[0])
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "rows": [*data["rows"], row]}))
    with pytest.raises(QBertError, match=message):
        load_results(path)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_torn_last_row_is_left_out_and_appending_goes_on(tmp_path, rows):
    """No kill of a process does this, only a machine that loses power."""
    path = tmp_path / "r.json"
    writer = ResultsWriter(path, MACHINE)
    for row in ROWS[: rows + 1]:
        writer.add(row)
    whole = path.read_bytes()
    begin = len(whole) - len(b"\n]}\n") - len(ROWS[rows].model_dump_json(exclude_none=True)) + 1
    for cut in range(begin, len(whole) - 4):
        path.write_bytes(whole[:cut])
        found = load_results(path)
        assert found.torn
        assert found.rows == [without_rounds(row) for row in ROWS[:rows]]
    ResultsWriter(path, MACHINE).add(ROWS[3])
    assert load_results(path).rows == [without_rounds(row) for row in [*ROWS[:rows], ROWS[3]]]
    assert not load_results(path).torn


def write_for_ever(path, acknowledged):
    """In a process of its own: rows of all sizes, and the number of each when it is on the disk."""
    writer = ResultsWriter(path, MACHINE)
    for number in itertools.count():
        writer.add(RunRow(benchmark=f"{number}", settings={"padding": "x" * (number % 9000)}))
        os.write(acknowledged, f"{number}\n".encode())


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_kill_at_any_moment_loses_at_most_one_row(tmp_path):
    path = tmp_path / "r.json"
    ResultsWriter(path, MACHINE)
    before = 0
    for delay in (0.0, 0.001, 0.003, 0.007, 0.01, 0.017, 0.03, 0.05):
        reading, writing = os.pipe()
        if not (child := os.fork()):  # a fresh interpreter would import for seconds
            try:
                write_for_ever(path, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading) as said:
            said.readline()  # it writes
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            numbers = [0, *map(int, said.read().split())]
        os.waitpid(child, 0)
        found = load_results(path)
        new = [row.benchmark for row in found.rows[before:]]
        assert new == [str(number) for number in range(len(new))]
        assert numbers[-1] + 1 <= len(new) <= numbers[-1] + 2
        before = len(found.rows)


def test_a_path_is_new_and_says_device_date_and_commit(tmp_path):
    first = results_path(MACHINE, tmp_path)
    assert first == tmp_path / "a-processor-avx2" / "2026-11-22-abc1234-dirty.json"
    ResultsWriter(first, MACHINE)
    assert results_path(MACHINE, tmp_path).name == "2026-11-22-abc1234-dirty-2.json"
    gpu = Gpu(name="NVIDIA H100 80GB HBM3", capability="9.0", multiprocessors=132, memory=1, l2_cache=1,
              shared_memory_per_block=1)  # fmt: skip
    path = results_path(MACHINE.model_copy(update={"gpu": gpu, "commit": None}), tmp_path)
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "2026-11-22-no-commit.json"


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.name)
def test_what_is_committed_can_be_read(path):
    assert load_results(path).rows
