"""Builds and runs the C++ tests of csrc/cpu under the compiler's sanitizers: `python tests/native/build.py address thread`.

A variant is compiled once into build/native-<variant>; after that only what has changed is. The programs go through all
instruction sets of this CPU by themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 77  # exit code of a program that cannot run here


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compile the tests, and what to run of them.

    Attributes:
        flags: for all files.
        environments: the program runs in each of them.
        filter: only tests whose names hold this run.
        kernels: the instruction sets that matter; the others' files compile to nothing, which saves most of the time.
    """

    flags: tuple[str, ...]
    environments: tuple[dict[str, str], ...]
    filter: str = ""
    kernels: tuple[str, ...] = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8")


COMMON = ("-g1", "-O1", "-fno-omit-frame-pointer")
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", *COMMON)
EMULATE_AVX_VNNI = "-DQBERT_EMULATE_AVX_VNNI"
OWN, OPENMP = {"QBERT_THREADS": "own"}, {"QBERT_THREADS": "openmp"}
VARIANTS = {
    "address": Variant(ADDRESS, (OWN, OPENMP)),
    # libgomp is not built for ThreadSanitizer, which would report its barriers: our own pool only
    "thread": Variant(("-fsanitize=thread", *COMMON), (OWN,), "thread", kernels=()),
    # what no CPU here may have, beside plain C++, on CPUs with AVX-512 VNNI
    "emulated": Variant(
        (*ADDRESS, "-DQBERT_EMULATE_AMX", EMULATE_AVX_VNNI), (OWN,), "kernels", kernels=("avx_vnni", "amx_int8")
    ),
}


def compiler() -> str | None:
    """The C++ compiler: what CXX names, or the system's; None if there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


@functools.cache
def _setup() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="qbert_setup")


def sources() -> list[Path]:
    """Everything but the Python module, whose functions only unpack arguments."""
    native = [path for path in (ROOT / "csrc/cpu").glob("*.cpp") if not path.name.startswith(("module", "bind_"))]
    return sorted([*native, *Path(__file__).parent.glob("*.cpp")])


@functools.cache
def _is_known(flag: str) -> bool:
    command = [compiler() or "", flag, "-x", "c++", "-E", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _flags_of(source: Path, variant: Variant) -> list[str]:
    common = [flag for flag in _setup()["FLAGS"] if not flag.startswith("-O")]
    isa = source.stem.removeprefix("kernels_")
    wanted = _setup()["ISA_FLAGS"].get(source.stem, []) if isa in variant.kernels else []
    isa_flags = [flag for flag in wanted if _is_known(flag)]
    return ["-std=c++17", f"-I{ROOT / 'csrc'}", *common, *isa_flags, *variant.flags]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _compile(source: Path, folder: Path, variant: Variant) -> Path:
    obj = folder / f"{source.parent.name}-{source.stem}.o"
    older = obj.exists() and obj.stat().st_mtime <= Path(__file__).stat().st_mtime
    if obj.exists() and not older and not _setup()["needs_recompile"](str(obj), str(source)):
        return obj
    cxx, flags = compiler() or "", [*_flags_of(source, variant), "-MMD", "-MF", f"{obj}.d", "-MT", str(obj)]
    if source.stem == "kernels_avx_vnni" and EMULATE_AVX_VNNI in flags:
        # AVX-VNNI's instruction in the encoding of AVX-512 VNNI: the same computation, on CPUs that have only the latter.
        assembly = obj.with_suffix(".s")
        _run([cxx, "-S", str(source), "-o", str(assembly), *flags])
        assembly.write_text(assembly.read_text().replace("{vex} vpdpbusd", "{evex} vpdpbusd"))
        _run([cxx, "-c", str(assembly), "-o", str(obj)])
    else:
        _run([cxx, "-c", str(source), "-o", str(obj), *flags])
    return obj


def build(name: str) -> Path:
    """The test program of a variant; RuntimeError with the compiler's words if it cannot be made."""
    variant = VARIANTS[name]
    folder = ROOT / "build" / f"native-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, folder, variant), sources()))
    program = folder / "qbert_native_tests"
    _run([compiler() or "", *variant.flags, *map(str, objects), "-ldl", "-lpthread", "-o", str(program)])
    return program


def run(name: str, program: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """One run of a variant's program; its output holds a line for each test, and what a sanitizer found."""
    done = subprocess.run(
        [program, VARIANTS[name].filter],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    if "ThreadSanitizer: unexpected memory mapping" in done.stdout:  # older than this kernel's way of placing memory
        done.returncode = SKIPPED
    return done


def main(names: list[str]) -> int:
    """Builds and runs the variants, all without names; 0 if all is well."""
    if compiler() is None:
        print("no C++ compiler: the native tests are not run", file=sys.stderr)
        return 1
    failed = 0
    for name in names or list(VARIANTS):
        print(f"== {name}: compiling", flush=True)
        try:
            program = build(name)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        for environment in VARIANTS[name].environments:
            print(f"== {name} {environment}", flush=True)
            done = run(name, program, environment)
            print(done.stdout, flush=True)
            failed += done.returncode not in (0, SKIPPED)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
