"""The C++ tests of csrc/cpu (tests/native), under the compiler's sanitizers; and that a build takes along what it must."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

from qbert.target import native_cpu

ROOT = Path(__file__).resolve().parents[1]
NATIVE = runpy.run_path(str(ROOT / "tests" / "native" / "build.py"), run_name="build")
SETUP: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
HAS_COMPILER = NATIVE["compiler"]() is not None


def _compiles(flags: tuple[str, ...], tmp_path: Path) -> bool:
    """Whether the compiler has what `flags` ask for, its run-time library included."""
    source = tmp_path / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [NATIVE["compiler"](), *flags, str(source), "-o", str(tmp_path / "probe")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.parametrize("variant", list(NATIVE["VARIANTS"]))
def test_native_tests_pass(variant: str, tmp_path: Path) -> None:
    if not _compiles(NATIVE["VARIANTS"][variant].flags, tmp_path):
        pytest.skip(f"the compiler cannot build with {' '.join(NATIVE['VARIANTS'][variant].flags)}")
    program = NATIVE["build"](variant)
    for environment in NATIVE["VARIANTS"][variant].environments:
        done = NATIVE["run"](variant, program, environment)
        if done.returncode == NATIVE["SKIPPED"]:
            pytest.skip(done.stdout)
        assert done.returncode == 0, f"{environment}\n{done.stdout[-6000:]}"


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.skipif(
    not (Path(sysconfig.get_path("include")) / "Python.h").is_file(), reason="needs the headers of this Python"
)
def test_the_extension_is_built_where_it_can_be() -> None:
    """Else every test of the native kernels would be skipped without anybody noticing: run `make native`."""
    assert native_cpu() is not None


def test_every_kernel_file_has_the_flags_of_its_instruction_set() -> None:
    files = {path.stem for path in (ROOT / "csrc/cpu").glob("kernels_*.cpp")}
    assert files == {*SETUP["ISA_FLAGS"], "kernels_generic"}
    for name, flags in SETUP["ISA_FLAGS"].items():
        assert len(flags) == len(set(flags)), name


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_kernel_files_share_no_code_with_others() -> None:
    """Of a function in several object files the linker keeps one, which could be the copy that only newer CPUs can run."""
    objects = sorted((ROOT / "build").glob(f"objects-*-{sys.implementation.cache_tag}/csrc/cpu/kernels_*.o"))
    if not objects:
        pytest.skip("no object files here: the extension was not built in this tree")
    for obj in objects:
        listed = subprocess.run(["nm", "--defined-only", str(obj)], capture_output=True, text=True, check=True).stdout
        symbols = [line.split()[-2:] for line in listed.splitlines()]
        # The compiler's own pointer to the run-time function for exceptions is data.
        shared = [name for kind, name in symbols if kind in "WVu" and not name.startswith("DW.ref.")]
        assert not shared, f"{obj.name}: {shared}"


def _relative(folder: str) -> list[Path]:
    return [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")]


def test_every_package_is_installed() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT) for path in (ROOT / "qbert").rglob("*.py")}
    # Symbolic links, which rglob does not follow.
    found |= {Path("qbert/kernels"), *(Path("qbert") / path.parent for path in _relative("benchmarks"))}
    assert sorted(declared) == sorted(".".join(path.parts) for path in found)


def test_what_has_changed_is_compiled_again(tmp_path: Path) -> None:
    source, header, obj = (tmp_path / name for name in ("a.cpp", "a.h", "a.o"))
    for path in (source, header, obj):
        path.touch()
    needs_recompile = SETUP["needs_recompile"]
    assert needs_recompile(str(obj), str(source)), "without a list of what it was made from"
    Path(f"{obj}.d").write_text(f"{obj}: {source} \\\n {header}\n")
    old, setup_time = 0, (ROOT / "setup.py").stat().st_mtime
    for path in (source, header):
        os.utime(path, (old, old))
    os.utime(obj, (setup_time + 10, setup_time + 10))
    assert not needs_recompile(str(obj), str(source))
    os.utime(header, (setup_time + 20, setup_time + 20))
    assert needs_recompile(str(obj), str(source))
    header.unlink()
    assert needs_recompile(str(obj), str(source))
