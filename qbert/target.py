"""What this machine is: read once, plain data, so that choosing a kernel can be tested for machines that are not here."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbert.errors import MissingDependency, QBertError

log = logging.getLogger(__name__)
# Instruction sets that the native extension has kernels for, best first (csrc/cpu/isa.h).
ISAS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "generic")

_MIB, _KIB = 2**20, 2**10
_NO_CACHE_KNOWN = 32 * _MIB


@dataclass(frozen=True)
class Target:
    """Where an operation would run.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        isa: the best integer instruction set of a CPU: one of `ISAS`.
        sm: compute capability of a CUDA device as major * 10 + minor (90 for H100), else 0.
        sm_count: number of its multiprocessors, else 0.
        shared_memory: bytes of shared memory that one thread block can use, else 0.
        native: whether the compiled extension for this device is there.
        native_missing: why not, of a CUDA device.
        prefer: ``"triton"`` or ``"cuda"`` where QBERT_KERNEL says which GPU kernels run, else empty: the tables decide.
        int_mm_exact: whether torch's int8 matrix product gives exact int32 sums there (see `_int_mm_is_exact`).
    """

    device: str = "cpu"
    isa: str = "generic"
    sm: int = 0
    sm_count: int = 0
    shared_memory: int = 0
    native: bool = False
    int_mm_exact: bool = True
    prefer: str = ""
    native_missing: str = ""


def native_cpu() -> Any | None:
    """The compiled extension `qbert._cpu`, or None where it was not built, or where QBERT_CPU_ISA=torch does without it."""
    if os.environ.get("QBERT_CPU_ISA") == "torch":
        return None
    try:
        from qbert import _cpu
    except ImportError:
        return None
    return _cpu


def cpu_missing() -> str | None:
    """Why there is no `qbert._cpu` here; None where there is one."""
    if os.environ.get("QBERT_CPU_ISA") == "torch":
        return "QBERT_CPU_ISA=torch does without qbert._cpu"
    try:
        importlib.import_module("qbert._cpu")
    except ModuleNotFoundError:
        return (
            "qbert was installed without its CPU kernels (qbert._cpu), for want of a C++ compiler; to build them: get one (g++ "
            "or clang++) and install again, with pip's --no-cache-dir"
        )
    except ImportError as error:
        return f"qbert._cpu does not load: {error}"
    return None


def load_cuda() -> Any:
    """The compiled extension `qbert._cuda`.

    Raises:
        MissingDependency: it was not built, or does not load; the message says which.
    """
    try:
        return importlib.import_module("qbert._cuda")
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "qbert was installed without its CUDA kernels (qbert._cuda); to build them: CUDA's nvcc, QBERT_CUDA=1, and "
            "install again (docs/cuda.md)"
        ) from error
    except ImportError as error:
        raise MissingDependency(f"qbert._cuda does not load: {error}") from error


def cuda_missing() -> str | None:
    """Why there is no `qbert._cuda` here; None where there is one."""
    try:
        load_cuda()
    except MissingDependency as error:
        return str(error)
    return None


def extensions() -> dict[str, str]:
    """What this installation was built with: extension -> what it runs on, or why it is not there. Asks no GPU."""
    extension = native_cpu()
    cpu = f"missing; torch's kernels run: {cpu_missing()}" if extension is None else extension.isa()
    return {"qbert._cpu": cpu, "qbert._cuda": cuda_missing() or "built"}


@functools.cache
def cpu_target() -> Target:
    """This machine's CPU. Without the extension the instruction set is not asked for: nothing here could use it. That it is
    missing is said in the log, once."""
    extension = native_cpu()
    if extension is None and os.environ.get("QBERT_CPU_ISA") != "torch":
        log.warning("torch's kernels run, several times slower: %s", cpu_missing())
    isa = extension.isa() if extension is not None else "generic"
    return Target("cpu", isa, native=extension is not None, int_mm_exact=_int_mm_is_exact())


def _int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` adds up extreme products exactly.

    Its oneDNN kernel for CPUs without VNNI adds pairs of products in saturating 16-bit integers (vpmaddubsw), which turns
    768 * 127 * 127 into 768 * 128 without a word. Asking for one product that saturates is cheaper and surer than cpuid.
    """
    import torch

    k = 64
    row = torch.full(
        (32, k), 127, dtype=torch.int8, device="cpu"
    )  # whoever asks first may do so where meta is the default
    return bool((torch._int_mm(row, row.t()) == k * 127 * 127).all())


@functools.cache
def cuda_target(index: int = 0) -> Target:
    """CUDA device `index`.

    Raises:
        QBertError: QBERT_KERNEL names no kernels.
    """
    import torch

    prefer = os.environ.get("QBERT_KERNEL", "")
    if prefer not in ("", "triton", "cuda"):
        raise QBertError(f"QBERT_KERNEL is {prefer!r}; allowed: triton, cuda, or not set")
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    sm, count = properties.major * 10 + properties.minor, properties.multi_processor_count
    missing = cuda_missing() or ""
    if prefer == "cuda" and missing:
        log.warning("QBERT_KERNEL is cuda, but %s; Triton's kernels run", missing)
    return Target("cuda", "", sm, count, shared, native=not missing, prefer=prefer, native_missing=missing)


def target_of(device: Any) -> Target:
    """The target behind a torch device; ``meta`` tensors have no data and count as the CPU."""
    if device.type == "cuda":
        return cuda_target(device.index or 0)
    return cpu_target()


def physical_cores() -> int:
    """Physical cores that this process may run on: two hardware threads of one core count once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {
        read_text(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed
    }
    return max(1, len(siblings))


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first core, or None if the system does not say."""
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        text = read_text(index / "size")
        unit = {"K": _KIB, "M": _MIB}.get(text[-1:]) if text else None
        if text and unit:
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=None)


def bytes_beyond_caches() -> int:
    """Twice the last level cache: what is read in turn from that much memory comes out of memory every time."""
    return 2 * (last_level_cache() or _NO_CACHE_KNOWN)


def read_text(path: str | Path) -> str:
    """What a file of the system says, without space around it; empty where it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
