"""How qbert._cuda is built: where it is left out and why; what the compiler makes of its kernels, read from machine code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import builds
import pytest
import sass

CUDA = builds.ROOT / "csrc/cuda"
SOURCES = sorted(CUDA.glob("*/*.cu"))
PATHS = {path.stem: path for path in SOURCES}
LINEARS = [path for path in SOURCES if re.fullmatch(r"w8a8_\d+x\d+", path.stem)]  # on CUTLASS: they compile for minutes
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


# ---- what is compiled -----------------------------------------------------------------------------------------------


def toolchain_missing() -> str:
    """Why kernels cannot be compiled here; empty if they can. Nothing is fetched from the network."""
    built = builds.setup()
    try:
        built["find_nvcc"]()
        built["find_cutlass"](fetch=False)
    except built["NoCuda"] as reason:
        return str(reason)
    return "" if sass.cuobjdump() else "there is no cuobjdump"


@pytest.fixture
def compiled(monkeypatch):
    """Of a source file: its object file, and what the compiler said."""
    if reason := toolchain_missing():
        pytest.skip(reason)
    monkeypatch.setenv("QBERT_CUDA", "1")
    monkeypatch.chdir(builds.ROOT)
    return builds.compile_for_sm90


def test_sources_and_tiles_agree():
    """A tile in tiles.h is a file that makes its kernels; no two files make the same object."""
    listed = re.search(r"enum TileIndex \{(.*?)\}", (CUDA / "sm90/tiles.h").read_text()).group(1)
    assert {f"w8a8_{name}" for name in re.findall(r"\bk(\d+x\d+)\b", listed)} == {path.stem for path in LINEARS}
    objects = [path.stem for path in (*SOURCES, *CUDA.glob("*/*.cpp"))]
    assert len(objects) == len(set(objects))


def test_what_all_gpus_share_needs_nothing_of_hopper():
    for path in (CUDA / "common").iterdir():
        assert '"cuda/sm90/' not in path.read_text(), path


def test_architectures_are_those_of_files(setup):
    """Every folder has its architectures; what device.h tells callers is the same."""
    assert set(setup["ARCHITECTURES"]) == {path.parent.name for path in SOURCES}
    device = (CUDA / "common/device.h").read_text()
    oldest, hopper = re.search(r"kOldestCapability = (\d+), kHopper = (\d+)", device).groups()
    assert f"code=sm_{hopper}a" in setup["HOPPER"][0]
    assert f"code=[sm_{oldest},compute_{oldest}]" in setup["FROM_AMPERE_ON"][0]


@pytest.mark.slow
@pytest.mark.compile
def test_the_module_links_and_imports_without_a_driver(compiled):
    """All of csrc/cuda is there, and nothing of the driver is needed before a device is."""
    module = builds.linked_module([compiled(source)[0] for source in SOURCES])
    script = f"import sys; sys.path.insert(0, {str(module.parent)!r}); import _cuda; print(_cuda.device_problem())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "LD_LIBRARY_PATH": ""}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("no CUDA device can be used: cudaError")


# ---- machine code ---------------------------------------------------------------------------------------------------


def assert_no_problems(kernels, said, **promises):
    found = {kernel.name: sass.problems(kernel, said, **promises) for kernel in kernels}
    assert found == {kernel.name: [] for kernel in kernels}


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("source", LINEARS, ids=lambda path: path.stem)
def test_machine_code_of_linears(source, compiled):
    """Every kernel multiplies by IGMMA, copies by TMA both ways, and waits for earlier grids before its first copy."""
    obj, said = compiled(source)
    kernels = sass.kernels_of(obj)
    assert len(kernels) == RESULTS
    # 384 threads of at most 168 registers; setmaxnreg hands those of the copying warps to the others.
    needs = ("IGMMA", "UTMALDG.3D", "UTMALDG.3D.MULTICAST", "UTMASTG", "ACQBULK", "PREEXIT")
    assert_no_problems(kernels, said, threads=384, needs=needs)
    for kernel in kernels:
        assert kernel.count("IGMMA") >= 8
        assert kernel.count("UTMALDG") == 2
        assert kernel.sass.index("ACQBULK") < kernel.sass.index("UTMALDG")
    assert sum(kernel.count("STSM") > 0 for kernel in kernels) == 1  # 16-bit results


@dataclass(frozen=True)
class Promise:
    """What the machine code of every kernel of a hand-written file is held to.

    Attributes:
        kernels: how many there are.
        threads: of a block at most; `blocks`: how many a multiprocessor must have room for.
        needs: instructions.
        a_from_registers: whether products take weights from registers, expanded there.
        permutations: PRMT for each product in the loop of products, or None where codes are not looked up by it. A thread has
            16 weights of a product of int8 (32 columns), 8 of one of floats (16 columns).
        stack: bytes of local memory that its largest tile may have, to use outside of the loop of products.
        slow: left to the slow tests, for the next file has the same kernels for other codes.
    """

    kernels: int
    threads: int
    needs: tuple[str, ...]
    a_from_registers: bool = True
    permutations: int | None = None
    blocks: int = 1
    stack: int = 0
    slow: bool = False


_STREAMED = ("UTMALDG", "UBLKCP", "ACQBULK", "PREEXIT")  # tokens by boxes, weights by bytes, overlapping its neighbours
_MANY, _FEW, _FLOAT = ("IGMMA", "UTMALDG.2D.MULTICAST", *_STREAMED), ("IGMMA", *_STREAMED), ("HGMMA", *_STREAMED)
_SMALL = ("IGMMA", "UTMALDG", "ACQBULK", "PREEXIT", "UCGABAR_ARV", "UCGABAR_WAIT")  # and blocks of a cluster that meet
HAND_WRITTEN = {
    "w8a8_small": Promise(3, 160, _SMALL, a_from_registers=False, blocks=2),
    "layer_add_norm": Promise(4, 288, (*_SMALL, "REDUX"), a_from_registers=False, blocks=2),
    "lowbit_many_dict3": Promise(9, 384, _MANY, permutations=4, stack=16),
    "lowbit_many_dict4": Promise(9, 384, _MANY, permutations=12, slow=True),
    "lowbit_many_int4": Promise(9, 384, _MANY, slow=True),
    "lowbit_few_dict3": Promise(4, 544, _FEW, permutations=4),
    "lowbit_few_dict4": Promise(4, 544, _FEW, permutations=12, slow=True),
    "lowbit_few_int4": Promise(4, 544, _FEW, slow=True),
    "weight_only_dict3": Promise(6, 544, _FLOAT, permutations=8),
    "weight_only_dict4": Promise(6, 544, _FLOAT, slow=True),
    "weight_only_int4": Promise(6, 544, _FLOAT, slow=True),
    "weight_only_int8": Promise(6, 544, _FLOAT, slow=True),
    "weight_only_expand": Promise(4, 128, (), a_from_registers=False, slow=True),
    "lowbit_many": Promise(1, 128, ("ACQBULK", "PREEXIT"), a_from_registers=False, slow=True),
}


def test_every_file_is_held_to_something():
    assert {*HAND_WRITTEN, *(path.stem for path in LINEARS), "add_layer_norm_quantize"} == {
        path.stem for path in SOURCES
    }


@pytest.mark.compile
@pytest.mark.parametrize(
    "stem", [pytest.param(stem, marks=pytest.mark.slow) if each.slow else stem for stem, each in HAND_WRITTEN.items()]
)
def test_machine_code_of_hand_written_kernels(stem, compiled):
    promise = HAND_WRITTEN[stem]
    obj, said = compiled(PATHS[stem])
    kernels = sass.kernels_of(obj)
    assert len(kernels) == promise.kernels
    assert_no_problems(
        kernels, said, threads=promise.threads, blocks=promise.blocks, needs=promise.needs,
        a_from_registers=promise.a_from_registers, stack=promise.stack,
    )  # fmt: skip
    assert sum(kernel.stack > 0 for kernel in kernels) <= RESULTS  # those of one tile
    if promise.permutations is not None:
        for kernel in kernels:
            loop = kernel.loop(promise.needs[0])
            products = loop[promise.needs[0]]
            assert loop["PRMT"] // products == promise.permutations, kernel.name


@pytest.mark.compile
def test_machine_code_of_rows(compiled):
    """Loads and stores of 16 bytes, codes of 8; and so few registers that a multiprocessor holds several blocks."""
    obj, said = compiled(PATHS["add_layer_norm_quantize"])
    assert sass.contents(obj) == {"sm_80", "sm_90a", "compute_80"}
    for architecture in ("sm_80", "sm_90a"):
        kernels = sass.kernels_of(obj, architecture)
        assert len(kernels) == 4 * 2 * 2  # widths, sizes of y and of the residual
        assert all(kernel.count("ACQBULK") == (architecture == "sm_90a") for kernel in kernels)
        for kernel in kernels:
            steps = int(re.search(r"kernelILi(\d)E", kernel.name).group(1))
            y_bytes, residual_bytes = map(int, re.search(r"kernelILi\dELi(\d)ELi(\d)E", kernel.name).groups())
            assert sass.problems(kernel, said, threads=128, blocks=5 if steps <= 4 else 3) == []
            assert len(re.findall(r"\bLDG\.E\.128", kernel.sass)) >= steps * (y_bytes + residual_bytes) // 2
            assert len(re.findall(r"\bSTG\.E\.128", kernel.sass)) == steps * residual_bytes // 2
            assert len(re.findall(r"\bSTG\.E\.64", kernel.sass)) == steps
            assert kernel.count("REDUX") >= 1  # the largest magnitude in one instruction


FAULTS = ("none", "serialized", "a_from_shared", "no_tma", "no_prmt", "no_overlap", "in_local_memory")


@pytest.mark.compile
def test_bad_kernels_are_caught(compiled):
    """The net itself: each fault of wrong_kernels.cu is found, and nothing in the kernel without one."""
    obj, said = compiled(Path(__file__).with_name("wrong_kernels.cu"))
    kernels = {FAULTS[int(re.search(r"FaultE(\d)E", kernel.name).group(1))]: kernel for kernel in sass.kernels_of(obj)}
    promises = {"needs": ("IGMMA", "UTMALDG", "PRMT", "ACQBULK", "PREEXIT"), "a_from_registers": True}
    found = {fault: sass.problems(kernel, said, threads=128, **promises) for fault, kernel in kernels.items()}
    stack = kernels["in_local_memory"].stack
    assert found == {
        "none": [],
        "serialized": ["products wait for each other"],
        "a_from_shared": ["products take A from shared memory", "no PRMT"],
        "no_tma": ["no UTMALDG"],
        "no_prmt": ["no PRMT"],
        "no_overlap": ["no ACQBULK", "no PREEXIT"],
        "in_local_memory": [f"{stack} bytes of stack", "local memory traffic (STL or LDL)"],
    }
    good = kernels["none"]
    assert sass.problems(good, said, threads=512, blocks=2) == [f"{good.registers} registers x 512 threads x 2 blocks"]
    assert sass.problems(good, said, threads=128, needs=("HGMMA",)) == ["no HGMMA"]
