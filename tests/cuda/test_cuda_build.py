"""How qbert._cuda is built: where it is left out and why; what the compiler makes of its kernels, read from machine code."""

from __future__ import annotations

import re
from pathlib import Path

import builds
import pytest

CUDA = builds.ROOT / "csrc/cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
LINEARS = sorted(CUDA.glob("w8a8_*.cu"))
RESULTS = 3  # kernels of a tile: results of 4, 2 and 1 bytes


@pytest.fixture
def setup(monkeypatch):
    """What setup.py defines, on a machine where nothing is asked for by the environment."""
    for name in ("QBERT_CUDA", "QBERT_REQUIRE_CUDA_EXTENSION", "QBERT_CUTLASS", "NVCC"):
        monkeypatch.delenv(name, raising=False)
    return builds.setup()


def patch(monkeypatch, setup, **functions):
    """Replaces functions of setup.py: its globals are those of any of its functions."""
    for name, function in functions.items():
        monkeypatch.setitem(setup["cuda_toolchain"].__globals__, name, function)


def test_left_out_where_nobody_asks_for_it(setup, monkeypatch):
    patch(monkeypatch, setup, gpu_here=lambda: False)
    assert setup["cuda_toolchain"]() is None
    monkeypatch.setenv("QBERT_CUDA", "0")
    patch(monkeypatch, setup, gpu_here=lambda: True)
    assert setup["cuda_toolchain"]() is None


def test_without_a_compiler_says_where_it_looked(setup, monkeypatch, tmp_path):
    patch(monkeypatch, setup, gpu_here=lambda: True)
    patch(monkeypatch, setup, shutil=type("none", (), {"which": staticmethod(lambda name: None)}))
    with pytest.raises(setup["NoCuda"], match="no nvcc on the PATH"):
        setup["cuda_toolchain"]()
    monkeypatch.setenv("NVCC", "/opt/other/nvcc")
    with pytest.raises(setup["NoCuda"], match="there is no /opt/other/nvcc"):
        setup["cuda_toolchain"]()


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("release 11.8, V11.8.89", "is of CUDA 11.8; allowed: 12.3 or newer"),
        ("clang", "does not say where its toolkit is"),
    ],
)
def test_another_compiler_is_named(setup, monkeypatch, tmp_path, version, reason):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "#$ TOP={tmp_path}" >&2\necho "{version}"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    with pytest.raises(setup["NoCuda"], match=reason):
        setup["find_nvcc"]()


def test_headers_are_fetched_only_where_that_is_asked_for(setup, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fetched = []
    patch(monkeypatch, setup, fetch_cutlass=fetched.append)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        setup["NoCuda"], match="CUTLASS's headers are not installed; `pip install --no-deps nvidia-cutlass"
    ):
        setup["find_cutlass"](fetch=False)
    assert fetched == []
    setup["find_cutlass"](fetch=True)
    assert fetched == [Path("build/nvidia-cutlass-4.2.0.0")]


def test_headers_in_a_named_folder(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("QBERT_CUTLASS", str(tmp_path))
    with pytest.raises(setup["NoCuda"], match="CUTLASS's headers are not in QBERT_CUTLASS="):
        setup["find_cutlass"](fetch=True)
    (tmp_path / "cutlass").mkdir()
    (tmp_path / "cutlass/cutlass.h").touch()
    assert setup["find_cutlass"](fetch=False) == str(tmp_path)


# ---- machine code ---------------------------------------------------------------------------------------------------


def toolchain_missing() -> str:
    """Why kernels cannot be compiled here; empty if they can. Nothing is fetched from the network."""
    built = builds.setup()
    try:
        built["find_nvcc"]()
        built["find_cutlass"](fetch=False)
    except built["NoCuda"] as reason:
        return str(reason)
    return "" if builds.cuobjdump() else "there is no cuobjdump"


def compiled(source, monkeypatch):
    """The kernels of a source file, and what the compiler said; every kernel keeps everything in registers."""
    monkeypatch.setenv("QBERT_CUDA", "1")
    if toolchain_missing():
        pytest.skip(toolchain_missing())
    monkeypatch.chdir(builds.ROOT)
    obj, said = builds.compile_for_sm90(source)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    kernels = builds.kernels_of(obj)
    assert spills == [("0", "0", "0")] * len(kernels)
    for kernel in kernels:
        assert kernel.stack == 0
        assert kernel.count("STL") + kernel.count("LDL") == 0
    return kernels, said


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("source", LINEARS, ids=lambda path: path.stem)
def test_machine_code_of_linears(source, monkeypatch):
    """Every kernel multiplies by IGMMA, and copies by TMA both ways."""
    kernels, said = compiled(source, monkeypatch)
    assert "C7510" not in said, "ptxas made the matrix instructions wait for each other"
    assert len(kernels) == RESULTS
    for kernel in kernels:
        assert kernel.registers <= 168  # 384 threads; setmaxnreg hands those of the copying warps to the others
        assert kernel.count("IGMMA") >= 8
        assert kernel.count("IMMA") == 0
        assert kernel.count("UTMALDG") == 2
        assert kernel.count("UTMASTG") >= 1
    assert sum(kernel.count("STSM") > 0 for kernel in kernels) == 1  # 16-bit results


@pytest.mark.compile
def test_machine_code_of_rows(monkeypatch):
    """Loads and stores of 16 bytes, codes of 8; and so few registers that a multiprocessor holds several blocks."""
    kernels, _ = compiled(CUDA / "add_layer_norm_quantize.cu", monkeypatch)
    assert len(kernels) == 4 * 2 * 2  # widths, sizes of y and of the residual
    for kernel in kernels:
        steps = int(re.search(r"kernelILi(\d)E", kernel.name).group(1))
        y_bytes, residual_bytes = map(int, re.search(r"kernelILi\dELi(\d)ELi(\d)E", kernel.name).groups())
        assert kernel.registers <= (80 if steps <= 4 else 168)
        assert len(re.findall(r"\bLDG\.E\.128", kernel.sass)) >= steps * (y_bytes + residual_bytes) // 2
        assert len(re.findall(r"\bSTG\.E\.128", kernel.sass)) == steps * residual_bytes // 2
        assert len(re.findall(r"\bSTG\.E\.64", kernel.sass)) == steps
        assert kernel.count("REDUX") >= 1  # the largest magnitude in one instruction


def test_sources_and_tiles_agree():
    """A tile in tiles.h is a file that makes its kernels; no two files make the same object."""
    listed = re.search(r"enum TileIndex \{(.*?), kTileCount", (CUDA / "tiles.h").read_text())
    assert {f"w8a8_{name.strip()[1:]}" for name in listed.group(1).split(",")} == {path.stem for path in LINEARS}
    objects = [path.stem for path in (*SOURCES, *CUDA.glob("*.cpp"))]
    assert len(objects) == len(set(objects))
