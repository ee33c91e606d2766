"""What a benchmark ran on: processor, caches, versions, commit, date. Plain data for the JSON beside every table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from qbert.analyze.targets import device_description
from qbert.clocks import query_smi
from qbert.target import cpu_target, last_level_cache, physical_cores, read_text

ROOT = Path(__file__).resolve().parents[1]  # of a clone; elsewhere the folder of the package
_PACKAGE = __package__ or "benchmarks"  # "benchmarks" from a clone, "qbert.benchmarks" from an installed qbert
_IMPORT_ROOT = Path(__file__).absolute().parents[_PACKAGE.count(".") + 1]
LIBRARIES = (
    "torch", "triton", "transformers", "torchao", "onnx", "onnxruntime", "openvino", "nncf", "bitsandbytes", "gemlite",
    "optimum-quanto", "flash-attn", "sentence-transformers",
)  # fmt: skip
COMMIT_VARIABLE = "QBERT_COMMIT"  # says which commit this is where the tree came without its history
# What ties threads to cores, in the words of the OpenMP libraries.
_PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_WAIT_POLICY")
# The flags that decide which kernels a library has; the whole line of /proc/cpuinfo says little more.
_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_vbmi", "avx512vbmi",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
_KIB = 2**10


class Gpu(BaseModel):
    """A CUDA device; clocks and power limit as they are set, never changed by us. None: the driver did not say."""

    model_config = ConfigDict(extra="forbid")

    name: str
    capability: str
    multiprocessors: int
    memory: int
    l2_cache: int
    shared_memory_per_block: int
    max_sm_mhz: float | None = None
    max_memory_mhz: float | None = None
    power_limit_watts: float | None = None
    driver: str | None = None
    cuda: str | None = None


class Machine(BaseModel):
    """Where and when.

    Attributes:
        device: name of the processor, and torch's threads.
        flags: the instruction sets of `_FLAGS` that it has.
        isa: what qbert runs on here.
        cores: physical ones that this process may use.
        last_level_cache: bytes, 0 if unknown.
        memory: bytes.
        load_average: of the minute before: above 0.5 something else was running.
        versions: distribution -> version; what is not installed is left out.
        commit: of the working tree, with "+" where it differs; None where nothing says.
        date: UTC, ISO 8601.
        threads: torch's; pinning: the variables that tie them to cores, empty: none is set.
        gpu: the one that is measured; None on a CPU.
    """

    model_config = ConfigDict(extra="forbid")

    device: str
    flags: list[str]
    isa: str
    cores: int
    last_level_cache: int
    memory: int
    kernel: str
    load_average: float
    versions: dict[str, str]
    commit: str | None
    date: str
    threads: int | None = None
    pinning: dict[str, str] = {}
    gpu: Gpu | None = None

    @property
    def processor(self) -> str:
        """Its name alone."""
        return self.device.rpartition(",")[0] or self.device

    @property
    def identity(self) -> tuple[str, str, str]:
        """What two runs must share to stand in one file: processor, GPU, commit."""
        return self.processor, self.gpu.name if self.gpu else "no GPU", self.commit or "no commit"

    @property
    def slug(self) -> str:
        """The device as a folder's name: letters, digits and hyphens."""
        text = self.gpu.name if self.gpu else f"{self.processor} {self.isa}"
        return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe(device: torch.device | str = "cpu") -> Machine:
    """This machine, now, and the GPU if that is what will be measured."""
    device = torch.device(device)
    return Machine(
        device=device_description(torch.device("cpu")),
        flags=_cpu_flags(),
        isa=cpu_target().isa,
        cores=physical_cores(),
        last_level_cache=last_level_cache() or 0,
        memory=memory_bytes("MemTotal"),
        kernel=platform.release(),
        load_average=os.getloadavg()[0],
        versions=versions(LIBRARIES),
        commit=commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        threads=torch.get_num_threads(),
        pinning={name: os.environ[name] for name in _PINNING if name in os.environ},
        gpu=describe_gpu(device) if device.type == "cuda" else None,
    )


def describe_gpu(device: torch.device) -> Gpu:
    """What torch and `nvidia-smi` say of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    fields = "clocks.max.sm,clocks.max.mem,power.limit,driver_version"
    sm, memory, watts, driver = query_smi(f"GPU-{properties.uuid}", fields) or (None,) * 4
    return Gpu(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory=properties.total_memory,
        l2_cache=properties.L2_cache_size,
        shared_memory_per_block=getattr(properties, "shared_memory_per_block_optin", 0),
        max_sm_mhz=_number(sm),
        max_memory_mhz=_number(memory),
        power_limit_watts=_number(watts),
        driver=driver,
        cuda=torch.version.cuda,
    )


def _number(text: str | None) -> float | None:
    """A figure, or None for what the program writes where it has none."""
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def child_command(module: str) -> list[str]:
    """How this package runs one of its modules in a process of its own; -P: whatever else lies where it is started."""
    return [sys.executable, "-P", "-m", f"{_PACKAGE}.{module}"]


def child_environment() -> dict[str, str]:
    """This process's environment; a package that is not installed is on the path."""
    installed = Path(sysconfig.get_path("purelib")) == _IMPORT_ROOT
    folders = ("" if installed else str(_IMPORT_ROOT), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of what is installed, Python's among them."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """What QBERT_COMMIT says, else the short hash of HEAD, with a plus sign where the working tree (results aside) differs."""
    if said := os.environ.get(COMMIT_VARIABLE):
        return said

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT:  # not of a repository that holds an environment
            changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
            return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    return None


def memory_bytes(field: str) -> int:
    """A field of /proc/meminfo in bytes, such as MemTotal or MemAvailable; 0 where there is none."""
    for line in read_text("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * _KIB
    return 0


def _cpu_flags() -> list[str]:
    for line in read_text("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            has = set(line.split())
            return [flag for flag in _FLAGS if flag in has]
    return []
