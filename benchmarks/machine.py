"""What a benchmark ran on: processor, caches, versions, commit, date. Plain data for the JSON beside every table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from qbert.analyze.targets import device_description
from qbert.target import cpu_target

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch", "transformers", "torchao", "onnx", "onnxruntime", "openvino", "nncf", "bitsandbytes", "sentence-transformers",
)  # fmt: skip
# The flags that decide which kernels a library has; the whole line of /proc/cpuinfo says little more.
_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_vbmi", "avx512vbmi",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
_MIB, _KIB = 2**20, 2**10
_NO_CACHE_KNOWN = 32 * _MIB


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
        commit: of the working tree, with "+" where it differs; None outside of git.
        date: UTC, ISO 8601.
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


def describe() -> Machine:
    """This machine, now."""
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
    )


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
    """Short hash of HEAD, with a plus sign where the working tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def physical_cores() -> int:
    """Physical cores that this process may run on: two hardware threads of one core count once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, len(siblings))


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first core, or None if the system does not say."""
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = _read(index / "size")
        unit = {"K": _KIB, "M": _MIB}.get(text[-1:]) if text else None
        if text and unit:
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=None)


def bytes_beyond_caches() -> int:
    """Twice the last level cache: what is read in turn from that much memory comes out of memory every time."""
    return 2 * (last_level_cache() or _NO_CACHE_KNOWN)


def memory_bytes(field: str) -> int:
    """A field of /proc/meminfo in bytes, such as MemTotal or MemAvailable; 0 where there is none."""
    for line in _read("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * _KIB
    return 0


def _cpu_flags() -> list[str]:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            has = set(line.split())
            return [flag for flag in _FLAGS if flag in has]
    return []


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
