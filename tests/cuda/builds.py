"""Builds of csrc/cuda for tests: on an emulated H100, and for one that is not here. Kept in build/."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import runpy
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
EMULATOR = Path(__file__).with_name("emulator")
_REPLACED = ("device.cpp", "grid.cpp", "tensor_map.cpp")  # by the emulator
_EMULATED = ["-DQBERT_EMULATED", "-I", str(ROOT / "csrc"), "-I", str(EMULATOR.parent)]
_EMULATED += ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
_KERNELS = ["-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-class-memaccess"]


def setup() -> dict[str, Any]:
    """What setup.py defines."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="qbert_setup")


def host_compiler() -> str | None:
    """The C++ compiler, where Python's headers are there too."""
    has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return shutil.which(os.environ.get("CXX", "c++")) if has_headers else None


def emulator_missing() -> str:
    """Why kernels cannot be emulated here; empty if they can. CUDA's headers are needed for their number types."""
    if host_compiler() is None:
        return "needs a C++ compiler and Python's headers"
    return "" if cuda_headers() else "needs the headers of a CUDA toolkit"


@functools.cache
def cuda_headers() -> str | None:
    """The folder of CUDA's headers, where there is a toolkit."""
    built = setup()
    try:
        return built["find_in_toolkit"](built["find_nvcc"]()[1], "cuda_runtime_api.h")
    except built["NoCuda"]:
        return None


def emulated_module(seed: int = 0, multiprocessors: int = 3) -> ModuleType:
    """`qbert._cuda` on an emulated H100: pointers are those of CPU tensors, launches return when the grid has ended.

    All of csrc/cuda but CUTLASS's kernels, which fail by name. Compiles what is not up to date.

    Args:
        seed: the order in which threads, copies and products take turns; `module.emulate(seed=...)` changes it.
        multiprocessors: of the device; 0: there is no device.
    """
    cuda = ROOT / "csrc/cuda"
    sources = [path for path in sorted(cuda.glob("*/*.cpp")) if path.name not in _REPLACED]
    sources += [path for path in sorted(cuda.glob("*/*.cu")) if "w8a8_gemm.cuh" not in path.read_text()]
    module = _built_module("_cuda", (*sources, *_emulator()))
    module.emulate(seed=seed, multiprocessors=multiprocessors)
    return module


def emulator_kernels() -> ModuleType:
    """The small kernels of tests/cuda/emulator that test the emulator itself."""
    return _built_module("_emulator_kernels", (*sorted(EMULATOR.glob("*.cu")), *_emulator()))


def _emulator() -> list[Path]:
    return sorted(EMULATOR.glob("*.cpp"))


@functools.cache
def _built_module(name: str, sources: tuple[Path, ...]) -> ModuleType:
    """A pybind11 module of these sources, loaded; each of them is compiled where something that it reads is newer."""
    folder = BUILD / "cuda-emulated"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    with (folder / "lock").open("w") as lock:  # workers of one test run build one after the other
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(int(os.environ.get("QBERT_BUILD_JOBS", "2"))) as jobs:
            objects = list(jobs.map(lambda source: _emulated_object(source, folder), sources))
        listed, manifest = "\n".join(map(str, objects)), out.with_suffix(".objects")
        linked = manifest.exists() and out.exists() and manifest.read_text() == listed
        if not linked or out.stat().st_mtime <= max(path.stat().st_mtime for path in objects):
            fresh = out.with_suffix(".fresh")  # whoever has loaded the old one keeps it
            _run([str(host_compiler()), "-shared", *map(str, objects), "-o", str(fresh)])
            fresh.replace(out)
            manifest.write_text(listed)
    spec = importlib.util.spec_from_file_location(name, out)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _emulated_object(source: Path, folder: Path) -> Path:
    """The object file of a source; .cu files are C++ after emulator/cuda.h, as nvcc reads its own header before them."""
    obj = folder / f"{source.parent.name}-{source.name}.o"
    flags = [*_EMULATED, "-O2" if source.suffix == ".cu" or source.parent == EMULATOR else "-O1"]
    if source.suffix == ".cu":
        flags += [*_KERNELS, "-x", "c++", "-include", str(EMULATOR / "cuda.h")]
    for path in (pybind11.get_include(), sysconfig.get_path("include"), str(cuda_headers())):
        flags += ["-isystem", path]
    flags += ["-MMD", "-MF", f"{obj}.d"]
    command = [str(host_compiler()), "-std=c++17", *flags, "-c", str(source), "-o", f"{obj}.fresh"]
    if _stale(obj, command):
        _run(command)
        Path(f"{obj}.fresh").replace(obj)
        obj.with_suffix(".command").write_text("\n".join(command))
    return obj


def _stale(obj: Path, command: list[str]) -> bool:
    """Whether an object file is missing, of another command, or older than something that the compiler read for it."""
    said = obj.with_suffix(".command")
    if not obj.exists() or not said.exists() or said.read_text() != "\n".join(command):
        return True
    read = setup()["dependencies"](str(obj))
    return any(not path.exists() or path.stat().st_mtime >= obj.stat().st_mtime for path in read)


def _run(command: list[str]) -> None:
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, " ".join(command) + "\n" + said.stderr[:6000]


def compile_for_sm90(source: Path) -> tuple[Path, str]:
    """The object file of a .cu file and what nvcc and ptxas said; compiled anew only where something it reads is newer."""
    built = setup()
    toolchain = built["cuda_toolchain"]()
    folder = BUILD / "cuda-sm90a"
    folder.mkdir(parents=True, exist_ok=True)
    obj = folder / source.with_suffix(".o").name
    log = obj.with_suffix(".log")
    if not log.exists() or not obj.exists() or built["needs_recompile"](str(obj), str(source)):
        log.unlink(missing_ok=True)
        command = [*toolchain.command(str(source), str(obj)), "-Xptxas=-v", "-MMD", "-MF", f"{obj}.d"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr[-4000:]
        log.write_text(said.stdout + said.stderr)
    return obj, log.read_text()


def linked_module(objects: list[Path]) -> Path:
    """`qbert._cuda` of these kernels' object files and of all C++ sources, linked as setup.py links it."""
    toolchain = setup()["cuda_toolchain"]()
    out = BUILD / "cuda-sm90a" / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    flags = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-I", str(ROOT / "csrc")]
    for path in (toolchain.include, pybind11.get_include(), sysconfig.get_path("include")):
        flags += ["-isystem", path]
    sources = sorted((ROOT / "csrc/cuda").glob("*/*.cpp"))
    libraries = ["-L", toolchain.libraries, *(f"-l{name}" for name in setup()["CUDA_LIBRARIES"])]
    _run([str(host_compiler()), *flags, *map(str, sources), *map(str, objects), *libraries, "-o", str(out)])
    return out
