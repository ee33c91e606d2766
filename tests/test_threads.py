"""The threads of the native kernels: on torch's team where there is one, on a pool of their own elsewhere.

What depends on the environment or ends a process runs in a process of its own, which loads the extension alone: with torch it
finds torch's OpenMP runtime, without it none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from qbert.target import native_cpu

extension = native_cpu()
if extension is None:
    pytest.skip("qbert._cpu is not built here", allow_module_level=True)

PRELUDE = f"""
import importlib.util, os, sys, threading, time
spec = importlib.util.spec_from_file_location("qbert._cpu", {extension.__file__!r})
_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cpu)

def check(tasks, threads):
    found = _cpu._parallel_sum(tasks, threads)
    assert found == tasks * (tasks - 1) // 2, (tasks, threads, found)
"""
EVERY_TASK_RUNS_ONCE = """
for tasks in (0, 1, 2, 7, 1000):
    for threads in (-1, 0, 1, 2, 3, 8):
        check(tasks, threads)
"""
MANY_CALLERS_ARE_SERVED = """
def work(n):
    for i in range(300):
        check(n + i, 2)
    served.append(n)

served = []
callers = [threading.Thread(target=work, args=(n,)) for n in range(5)]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
assert len(served) == 5, served
"""
A_FORKED_CHILD_COMPUTES = """
check(1000, 2)
pid = os.fork()
if pid == 0:
    assert _cpu.thread_backend() == "own pool", _cpu.thread_backend()
    for _ in range(200):
        check(1000, 3)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
check(1000, 2)
"""
needs_openmp = pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has no OpenMP")


def run(code: str, backend: str = "", with_torch: bool = False, **more: str) -> subprocess.CompletedProcess[str]:
    prelude = ("import torch\n" if with_torch else "") + PRELUDE
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "QBERT_THREADS": backend, **more}
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def succeeds(code: str, backend: str = "", with_torch: bool = False, **more: str) -> None:
    done = run(code, backend, with_torch, **more)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "code", [EVERY_TASK_RUNS_ONCE, MANY_CALLERS_ARE_SERVED, A_FORKED_CHILD_COMPUTES], ids=["tasks", "callers", "fork"]
)
@pytest.mark.parametrize("backend", ["", "own"], ids=["default", "own"])
def test_own_pool_without_torch(code: str, backend: str) -> None:
    succeeds("assert _cpu.thread_backend() == 'own pool'\n" + code, backend)


@needs_openmp
def test_torchs_team_is_used_where_there_is_one() -> None:
    """All in one process, the fork last: libgomp's team does not survive it, and on that team the child would wait for ever."""
    succeeds(
        "assert _cpu.thread_backend().startswith('OpenMP (') and '/' not in _cpu.thread_backend(), _cpu.thread_backend()\n"
        "torch.randn(400, 400) @ torch.randn(400, 400)"
        + EVERY_TASK_RUNS_ONCE
        + MANY_CALLERS_ARE_SERVED
        + A_FORKED_CHILD_COMPUTES,
        with_torch=True,
    )


@needs_openmp
def test_own_pool_beside_torchs_team() -> None:
    succeeds(
        "assert _cpu.thread_backend() == 'own pool'\n"
        "for _ in range(20): torch.randn(400, 400) @ torch.randn(400, 400); check(1000, 2)" + MANY_CALLERS_ARE_SERVED,
        "own",
        with_torch=True,
    )


def test_only_known_backends_are_taken() -> None:
    for call in ("_cpu.thread_backend()", "_cpu._parallel_sum(10, 2)"):
        assert "ValueError: QBERT_THREADS is 'tbb'; allowed: own, openmp" in run(call, "tbb").stderr
        assert "ValueError: QBERT_THREADS is 'openmp', but no OpenMP runtime is loaded" in run(call, "openmp").stderr


@pytest.mark.parametrize("rest", [0.0, 0.05], ids=["spinning", "asleep"])
def test_a_process_ends_while_helpers_wait(rest: float) -> None:
    succeeds(f"check(1000, 4); time.sleep({rest})", "own")
    succeeds(f"check(1000, 4); time.sleep({rest}); sys.exit()", "own")


def test_the_interpreter_runs_on_meanwhile() -> None:
    """A region does not hold the interpreter's lock."""
    ticks: list[int] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(1)

    ticker = threading.Thread(target=tick)
    ticker.start()
    before = len(ticks)
    for _ in range(20):
        extension._parallel_sum(200_000, 2)
    stop.set()
    ticker.join()
    assert len(ticks) > before


@needs_openmp
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_functions_of_two_runtimes_are_not_mixed(tmp_path: Path) -> None:
    """A library in front answers for one of the three functions only: none of it may be used with another's region."""
    (tmp_path / "decoy.cpp").write_text('extern "C" int omp_in_parallel() { return 1; }\n')
    decoy = tmp_path / "libdecoy.so"
    subprocess.run(["c++", "-shared", "-fPIC", str(tmp_path / "decoy.cpp"), "-o", str(decoy)], check=True)
    code = "check(1000, 2); assert 'decoy' not in _cpu.thread_backend(), _cpu.thread_backend()"
    succeeds(code, with_torch=True, LD_PRELOAD=str(decoy))
