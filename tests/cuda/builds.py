"""Builds of csrc/cuda for tests: the host side without CUDA, and the kernels for an H100 that is not here. Kept in build/."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
HOST_SOURCES = ("module.cpp", "bind_w8a8.cpp", "bind_rows.cpp", "checks.cpp", "rows.cpp", "tiles.cpp", "w8a8.cpp")


def setup() -> dict[str, Any]:
    """What setup.py defines."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="qbert_setup")


def host_compiler() -> str | None:
    """The C++ compiler, where Python's headers are there too."""
    has_headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return shutil.which(os.environ.get("CXX", "c++")) if has_headers else None


def host_module() -> ModuleType:
    """`_cuda` as a C++ compiler alone builds it: bindings, checks and the choice of tiles, no device."""
    sources = [*(ROOT / "csrc/cuda" / name for name in HOST_SOURCES), Path(__file__).with_name("no_device.cpp")]
    out = BUILD / "cuda-host" / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    read = [*sources, *(ROOT / "csrc/cuda").glob("*.h"), Path(__file__)]
    _build_shared(out, sources, read, ["-I", pybind11.get_include(), "-I", sysconfig.get_path("include")])
    spec = importlib.util.spec_from_file_location("_cuda", out)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels_on_cpu() -> ctypes.CDLL:
    """The row kernels' own source, with threads as the lanes of a warp; it reads CUDA's headers for their number types."""
    here = Path(__file__).parent
    out, sources = BUILD / "cuda-host/kernels_on_cpu.so", [here / "kernels_on_cpu.cpp"]
    read = [*sources, here / "warp.h", *(ROOT / "csrc/cuda").glob("*.*h"), Path(__file__)]
    ignored = ["-Wno-attributes", "-Wno-unknown-pragmas"]  # __global__, #pragma unroll
    _build_shared(out, sources, read, ["-I", str(here), "-isystem", str(cuda_headers()), *ignored, "-lpthread"])
    return ctypes.CDLL(str(out))


def cuda_headers() -> str | None:
    """The folder of CUDA's headers, where there is a toolkit."""
    built = setup()
    try:
        return built["find_in_toolkit"](built["find_nvcc"]()[1], "cuda_runtime_api.h")
    except built["NoCuda"]:
        return None


def _build_shared(out: Path, sources: list[Path], read: list[Path], flags: list[str]) -> None:
    """A shared library, compiled where something that it reads is newer."""
    if out.exists() and out.stat().st_mtime > max(path.stat().st_mtime for path in read):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_suffix(f".{os.getpid()}")  # workers of one test run may build at the same time
    command = [
        str(host_compiler()),
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-ffp-contract=off",
        "-fvisibility=hidden",
    ]
    command += ["-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc"), *map(str, sources), *flags, "-o", str(fresh)]
    subprocess.run(command, check=True)
    fresh.replace(out)


@dataclass(frozen=True)
class Kernel:
    """A kernel in an object file: its name, machine code, and resources of a thread."""

    name: str
    sass: str
    registers: int
    stack: int

    def count(self, instruction: str) -> int:
        """How often a SASS instruction stands in the code (its whole name, or up to a dot)."""
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.sass))


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


def cuobjdump() -> Path | None:
    """NVIDIA's tool, from the toolkit or from Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    packaged = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    found = shutil.which("cuobjdump")
    return Path(found) if found else packaged if packaged and packaged.exists() else None


def kernels_of(obj: Path) -> list[Kernel]:
    """The kernels in an object file, in the order of their names."""
    read = lambda flag: (
        subprocess.run([str(cuobjdump()), flag, str(obj)], capture_output=True, text=True, check=True).stdout
    )
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", read("-sass"), re.DOTALL))
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", read("-res-usage"))
    return sorted(
        (Kernel(name, bodies[name], int(registers), int(stack)) for name, registers, stack in usage),
        key=lambda each: each.name,
    )
