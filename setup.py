"""Builds the optional extensions; everything else is in pyproject.toml.

They link nothing of torch (their functions take pointers and sizes), so one build serves every torch and a build needs a
compiler only. Where there is none, the package installs without them and `qbert.explain` says what runs instead.
QBERT_BUILD_JOBS says how many files compile at once.

qbert._cpu: QBERT_REQUIRE_EXTENSION=1 turns a failed build into an error. One build serves every CPU: each
csrc/cpu/kernels_<isa>.cpp is compiled for its own instruction set, all other files for the oldest CPU, and the kernels are
chosen at run time. A flag that the compiler does not know is left out, and the file, which asks the compiler's macros, then
compiles to nothing.

qbert._cuda takes minutes and gigabytes to compile (docs/cuda.md): by default it is built only where a GPU, nvcc and CUTLASS's
headers are. QBERT_CUDA=1 builds it without a GPU too and gets the headers from PyPI; QBERT_CUDA=0 leaves it out;
QBERT_REQUIRE_CUDA_EXTENSION=1 is QBERT_CUDA=1 where anything missing is an error.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext, has_flag
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

FLAGS = ["-O3", "-Wall", "-Wextra", "-Wno-psabi"]
# Every instruction set computes the same bits: no fused multiply-add that the source does not ask for.
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512_VNNI = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vnni", "-mfma", "-mf16c"]
AVX512_VNNI += [
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]  # GCC 12's own AVX-512 headers read undefined registers
ISA_FLAGS = {
    "kernels_avx2": AVX2,
    "kernels_avx_vnni": [*AVX2, "-mavxvnni"],
    "kernels_avx512_vnni": AVX512_VNNI,
    "kernels_amx_int8": [*AVX512_VNNI, "-mamx-tile", "-mamx-int8"],
}

# What a file of csrc/cuda is compiled for, by its folder; csrc/cuda/common/device.h says the same to callers. wgmma and TMA
# are features of sm_90a, which has no forward compatibility: no PTX is worth its bytes there. What needs neither gets machine
# code for all 8.x and for Hopper, and PTX for what is newer.
HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]
FROM_AMPERE_ON = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", *HOPPER]
ARCHITECTURES = {"common": FROM_AMPERE_ON, "sm90": HOPPER}
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_LIBRARIES = ["cudart_static", "rt", "dl", "pthread"]
CUTLASS = "nvidia-cutlass==4.2.0.0"
CUTLASS_SHA256 = "f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6"
MIN_NVCC = (12, 3)  # what CUTLASS recommends for wgmma; 13.0 is what was tried


@dataclass(frozen=True)
class CudaToolchain:
    """What qbert._cuda is built with: the compiler, the toolkit's headers and libraries, CUTLASS's headers."""

    nvcc: str
    include: str
    libraries: str
    cutlass: str

    def command(self, source: str, object_file: str) -> list[str]:
        """Compiles a .cu file; system headers are those of which no list is kept and no warning is wanted."""
        flags = [*NVCC_FLAGS, *ARCHITECTURES.get(Path(source).parent.name, HOPPER), "-Icsrc", "-isystem", self.cutlass]
        return [self.nvcc, *flags, "-c", source, "-o", object_file]


class NoCuda(Exception):
    """What is missing to build qbert._cuda."""


def find_nvcc() -> tuple[str, str]:
    """nvcc and the folder of its toolkit, as nvcc itself says it: what is on the PATH may be a link or a script."""
    named = os.environ.get("NVCC")
    nvcc = shutil.which(named or "nvcc") or (None if named else shutil.which("/usr/local/cuda/bin/nvcc"))
    if nvcc is None:
        raise NoCuda(f"there is no {named}" if named else "there is no nvcc on the PATH or in /usr/local/cuda/bin")
    asked = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", asked.stderr, re.MULTILINE)
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", said)
    if top is None or version is None:
        raise NoCuda(f"{nvcc} does not say where its toolkit is: {(asked.stderr or said).strip()[:200]}")
    if tuple(map(int, version.groups())) < MIN_NVCC:
        raise NoCuda(
            f"{nvcc} is of CUDA {'.'.join(version.groups())}; allowed: {'.'.join(map(str, MIN_NVCC))} or newer"
        )
    return nvcc, os.path.realpath(top.group(1).strip())


def find_in_toolkit(home: str, file: str) -> str:
    """The folder of a file: where it lies differs between NVIDIA's installers and packages."""
    found = sorted(Path(home).glob(f"**/{file}"))
    if not found:
        raise NoCuda(f"{home} has no {file}")
    return str(found[0].parent)


def find_cutlass(fetch: bool) -> str:
    """CUTLASS's headers: QBERT_CUTLASS names a folder, or the PyPI package is installed, or is fetched into build/."""
    named = os.environ.get("QBERT_CUTLASS")
    package = importlib.util.find_spec("cutlass_library")
    installed = [Path(package.origin).parent / "source/include"] if package and package.origin else []
    fetched = Path("build") / CUTLASS.replace("==", "-")
    for folder in [Path(named)] if named else [*installed, fetched]:
        if (folder / "cutlass/cutlass.h").exists():
            return str(folder.resolve())
    if named or not fetch:
        where = f"in QBERT_CUTLASS={named}" if named else "installed"
        raise NoCuda(
            f"CUTLASS's headers are not {where}; `pip install --no-deps {CUTLASS}`, or QBERT_CUDA=1 fetches them"
        )
    fetch_cutlass(fetched)
    return str(fetched.resolve())


def fetch_cutlass(folder: Path) -> None:
    """Downloads the pinned wheel and unpacks its headers; its dependencies, which are for Python, stay away."""
    with tempfile.TemporaryDirectory() as work:
        pinned = Path(work) / "pinned.txt"
        pinned.write_text(f"{CUTLASS} --hash=sha256:{CUTLASS_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        got = subprocess.run(
            [*pip, "--dest", work, "--require-hashes", "-r", str(pinned)], capture_output=True, text=True
        )
        if got.returncode:
            raise NoCuda(f"CUTLASS's headers could not be fetched: {got.stderr.strip()[-300:]}")
        inside, unpacked = "cutlass_library/source/include/", Path(work) / "unpacked"
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            wheel.extractall(unpacked, [name for name in wheel.namelist() if name.startswith(inside)])
        partial = folder.with_suffix(f".{os.getpid()}")  # whole or not at all
        shutil.copytree(unpacked / inside, partial)
        partial.rename(folder)


def gpu_here() -> bool:
    """Whether NVIDIA's driver sees a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def cuda_toolchain() -> CudaToolchain | None:
    """None where qbert._cuda is not wanted: where nobody asks for it, a machine without a GPU should not compile for minutes.

    Raises:
        NoCuda: it is wanted, and something that it is built with is missing.
    """
    wanted = os.environ.get("QBERT_CUDA", "")
    asked = wanted == "1" or os.environ.get("QBERT_REQUIRE_CUDA_EXTENSION") == "1"
    if wanted == "0" or not (asked or gpu_here()):
        return None
    nvcc, home = find_nvcc()
    headers, libraries = (find_in_toolkit(home, file) for file in ("cuda_runtime_api.h", "libcudart_static.a"))
    return CudaToolchain(nvcc, headers, libraries, find_cutlass(fetch=asked))


def dependencies(object_file: str) -> list[Path]:
    """What the compiler read to make an object file, system headers left out, as it wrote down itself (-MMD)."""
    rule = Path(object_file + ".d").read_text().replace("\\\n", " ")
    return [Path(name) for name in rule.partition(": ")[2].split()]


def needs_recompile(object_file: str, source: str) -> bool:
    """Whether an object file is older than anything that it was made from, this file included."""
    try:
        newest = max(path.stat().st_mtime for path in [Path(source), Path(__file__), *dependencies(object_file)])
    except OSError:  # the list of dependencies or one of them is gone
        return True
    return Path(object_file).stat().st_mtime <= newest


class BuildExt(build_ext):
    """Adds a file's own flags, gives .cu files to nvcc, and keeps track of what each object file was made from."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Editable installs would compile in a temporary folder, everything each time.
        self.build_temp = os.path.join("build", f"objects-{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        x86 = platform.machine() in ("x86_64", "AMD64")
        wanted = dict.fromkeys(flag for flags in ISA_FLAGS.values() for flag in flags) if x86 else {}
        known = {flag for flag in wanted if has_flag(self.compiler, flag)}
        compile_plain = self.compiler._compile

        def compile_file(obj, src, ext, cc_args, extra_postargs, pp_opts):
            made_from = ["-MMD", "-MF", obj + ".d"]
            if ext == ".cu":
                self.compiler.spawn([*CUDA.command(src, obj), *made_from])
                return
            isa = [flag for flag in ISA_FLAGS.get(Path(src).stem, []) if flag in known]
            compile_plain(obj, src, ext, cc_args, [*extra_postargs, *isa, *made_from], pp_opts)

        self.compiler._compile = compile_file
        self.compiler.src_extensions = [*self.compiler.src_extensions, ".cu"]
        super().build_extensions()


class BdistWheel(bdist_wheel):
    """A wheel without an extension is for any machine, and says so: pip keeps what it builds, and under this machine's tag it
    would go on installing it as if it were whole when there is a compiler."""

    def get_tag(self) -> tuple[str, str, str]:
        package = Path(self.bdist_dir) / "qbert"
        if package.is_dir() and not any(path.suffix in (".so", ".pyd") for path in package.glob("_c*")):
            return "py3", "none", "any"
        return super().get_tag()


def extension() -> Pybind11Extension:
    """qbert._cpu."""
    cpu = Pybind11Extension(
        "qbert._cpu",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=["setup.py", *sorted(str(path) for path in (*Path("csrc").glob("*.h"), *Path("csrc/cpu").glob("*.h")))],
        include_dirs=["csrc"],
        libraries=["dl", "pthread"] if sys.platform == "linux" else [],
        cxx_std=17,
        extra_compile_args=FLAGS,
    )
    cpu.optional = os.environ.get("QBERT_REQUIRE_EXTENSION", "0") != "1"
    return cpu


def cuda_extension(toolchain: CudaToolchain) -> Pybind11Extension:
    """qbert._cuda. CUDA's runtime is linked statically and finds the driver when it is first asked: it imports anywhere."""
    cuda = Pybind11Extension(
        "qbert._cuda",
        sorted(str(path) for path in Path("csrc/cuda").glob("*/*.c*") if path.suffix in (".cpp", ".cu")),
        depends=[
            "setup.py",
            *sorted(str(path) for path in (*Path("csrc").glob("*.h"), *Path("csrc/cuda").glob("*/*.*h"))),
        ],
        include_dirs=["csrc", toolchain.include],
        library_dirs=[toolchain.libraries],
        libraries=CUDA_LIBRARIES,
        cxx_std=17,
        extra_compile_args=FLAGS,
    )
    cuda.optional = os.environ.get("QBERT_REQUIRE_CUDA_EXTENSION", "0") != "1"
    return cuda


if __name__ == "__main__":  # tests read the flags
    extensions = [extension()]
    try:
        CUDA = cuda_toolchain()
    except NoCuda as missing:
        if os.environ.get("QBERT_REQUIRE_CUDA_EXTENSION") == "1":
            raise SystemExit(f"qbert._cuda cannot be built: {missing}") from None
        print(f"qbert._cuda is not built: {missing}", file=sys.stderr)
        CUDA = None
    if CUDA is not None:
        extensions.append(cuda_extension(CUDA))
    ParallelCompile("QBERT_BUILD_JOBS", needs_recompile=needs_recompile).install()
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel})
