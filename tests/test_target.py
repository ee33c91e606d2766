"""What this machine is, and that a saturating int8 product is found out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import qbert
from qbert import target
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.ops import call
from qbert.target import ISAS, Target, cpu_target, cuda_target, target_of
from qbert.testing import random_problem, schemes_of

INTEGER_SCHEMES = [name for name in schemes_of("linear") if SCHEMES[name].activation is not None]


def _int_mm_is_really_exact() -> bool:
    """Many products instead of one: odd sizes, one row, extreme and random values, against int64."""
    generator = torch.Generator().manual_seed(0)
    for m, n, k in [(1, 1, 2), (1, 64, 64), (3, 17, 1023), (16, 8, 64), (17, 100, 768), (32, 32, 96), (33, 3, 2304)]:
        for low in (127, 100, -127):
            a, b = (torch.randint(low, 128, (rows, k), generator=generator).to(torch.int8) for rows in (m, n))
            exact = a.numpy().astype("int64") @ b.numpy().astype("int64").T
            if not (torch._int_mm(a, b.t()).numpy() == exact).all():
                return False
    return True


def _digests() -> dict[str, str]:
    """Of every integer operation's result on one problem of extreme magnitudes."""
    digests = {}
    for scheme in INTEGER_SCHEMES:
        for int8_out in (False, True):
            result = call(random_problem("linear", 17, 40, 1152, seed=11, scheme=scheme, bias=True, int8_out=int8_out))
            digests[f"{scheme} {int8_out}"] = hashlib.sha256(result.contiguous().numpy().tobytes()).hexdigest()
    return digests


def _has_vnni() -> bool:
    info = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and info.is_file() and ("avx512_vnni" in info.read_text())


@functools.cache
def _under_avx2() -> dict[str, Any]:
    """What a CPU without VNNI would say: oneDNN is told to use AVX2 only, in a process of its own."""
    code = (
        "import json, test_target as t; from qbert.target import cpu_target; "
        "print(json.dumps([cpu_target().int_mm_exact, t._int_mm_is_really_exact(), t._digests()]))"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    verdict, exact, digests = json.loads(done.stdout.splitlines()[-1])
    return {"verdict": verdict, "exact": exact, "digests": digests}


def test_verdict_here_is_the_truth() -> None:
    assert cpu_target().int_mm_exact == _int_mm_is_really_exact()


needs_vnni = pytest.mark.skipif(not _has_vnni(), reason="needs an x86 CPU with AVX-512 VNNI, to switch it off")


@needs_vnni
def test_saturation_is_found_out() -> None:
    """oneDNN's AVX2 kernel adds pairs of products in saturating 16-bit integers."""
    found = _under_avx2()
    assert found["verdict"] == found["exact"]
    if found["exact"]:
        pytest.skip("this torch does not saturate under ONEDNN_MAX_CPU_ISA=AVX2")


@needs_vnni
def test_results_are_the_same_bits_on_a_cpu_that_saturates() -> None:
    assert _under_avx2()["digests"] == _digests()


@pytest.mark.parametrize("wrong", [128, 127 * 127 - 1, 0], ids=["saturated", "off-by-one", "zero"])
def test_probe_sees_any_wrong_sum(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        exact = (a.to(torch.float64) @ b.to(torch.float64)).to(torch.int32)
        exact[-1, -1] = wrong * a.shape[1]
        return exact

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert target._int_mm_is_exact() is False


def test_cpu_target_is_read_once_and_plain() -> None:
    here = cpu_target()
    assert here is cpu_target()
    assert here.device == "cpu"
    assert here.isa in ISAS
    assert (here.sm, here.sm_count, here.shared_memory) == (0, 0, 0)
    assert here.native == (target.native_cpu() is not None)
    assert hash(here) == hash(dataclasses.replace(here))
    with pytest.raises(dataclasses.FrozenInstanceError):
        here.isa = "amx_int8"  # type: ignore[misc]


def test_without_the_extension_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "native_cpu", lambda: None)
    bare = cpu_target.__wrapped__()
    assert (bare.isa, bare.native) == ("generic", False)


def test_extension_says_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "native_cpu", lambda: types.SimpleNamespace(isa=lambda: "amx_int8"))
    found = cpu_target.__wrapped__()
    assert (found.isa, found.native) == ("amx_int8", True)


def test_a_missing_extension_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qbert._cpu", None)  # what an import of a module that is not there meets
    monkeypatch.delattr("qbert._cpu", raising=False)
    assert target.native_cpu() is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_target_of_devices_without_a_gpu(device: str) -> None:
    assert target_of(torch.device(device)) is cpu_target()


@pytest.mark.parametrize("optin", [True, False], ids=["opt-in", "older-torch"])
def test_cuda_target_is_read_from_the_device(optin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"major": 9, "minor": 0, "multi_processor_count": 132, "shared_memory_per_block": 49_152}
    fields |= {"shared_memory_per_block_optin": 232_448} if optin else {}
    asked: list[int] = []

    def properties(index: int) -> types.SimpleNamespace:
        asked.append(index)
        return types.SimpleNamespace(**fields)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr("qbert.target.cuda_missing", lambda: None if optin else "no nvcc")
    monkeypatch.setenv("QBERT_KERNEL", "cuda" if optin else "")
    cuda_target.cache_clear()
    try:
        found = target_of(torch.device("cuda", 1))
        shared = 232_448 if optin else 49_152
        expected = Target("cuda", "", 90, 132, shared, native=optin, prefer="cuda" if optin else "")
        assert found == dataclasses.replace(expected, native_missing="" if optin else "no nvcc")
        assert target_of(torch.device("cuda", 1)) is found
        assert asked == [1]
    finally:
        cuda_target.cache_clear()


def test_kernels_that_do_not_exist_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QBERT_KERNEL", "cudnn")
    cuda_target.cache_clear()
    with pytest.raises(QBertError, match="QBERT_KERNEL is 'cudnn'; allowed: triton, cuda, or not set"):
        cuda_target(0)


@pytest.mark.parametrize("prefer", ["", "cuda"])
def test_a_missing_gpu_extension_is_said_where_it_is_asked_for(
    prefer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block=49_152)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setitem(sys.modules, "qbert._cuda", None)
    monkeypatch.setenv("QBERT_KERNEL", prefer)
    cuda_target.cache_clear()
    try:
        found = cuda_target(0)
        assert (found.native, found.native_missing) == (False, target.cuda_missing())
        assert "QBERT_CUDA=1" in found.native_missing
        assert ("QBERT_KERNEL is cuda, but qbert was installed without its CUDA kernels" in caplog.text) == bool(prefer)
    finally:
        cuda_target.cache_clear()


def test_extensions_say_what_is_there_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qbert._cuda", types.ModuleType("_cuda"))
    assert target.extensions()["qbert._cuda"] == "built"
    monkeypatch.setitem(sys.modules, "qbert._cuda", None)
    assert target.extensions()["qbert._cuda"] == target.cuda_missing()
    monkeypatch.setenv("QBERT_CPU_ISA", "torch")
    assert (
        target.extensions()["qbert._cpu"] == "missing; torch's kernels run: QBERT_CPU_ISA=torch does without qbert._cpu"
    )


def test_a_missing_cpu_extension_is_said_once_in_the_log_and_in_explain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("QBERT_CPU_ISA", raising=False)
    monkeypatch.setitem(sys.modules, "qbert._cpu", None)
    monkeypatch.delattr("qbert._cpu", raising=False)
    cpu_target.cache_clear()
    try:
        model = qbert.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 64)), "w8a8+none")
        (note,) = qbert.explain(model).notes
        assert note == f"torch's kernels alone: {target.cpu_missing()}"
        assert "get one (g++ or clang++) and install again" in note
        model(torch.ones(1, 64))
        assert caplog.text.count("torch's kernels run, several times slower: qbert was installed without") == 1
    finally:
        cpu_target.cache_clear()


def test_integer_products_are_asked_about_wherever_tensors_are_made_by_default():
    """Loading builds a model on the meta device, and may be the first to ask."""
    with torch.device("meta"):
        elsewhere = target._int_mm_is_exact()
    assert elsewhere == target._int_mm_is_exact()
