"""Builds the optional extension; everything else is in pyproject.toml.

The extension links nothing of torch (its functions take pointers and sizes), so one build serves every torch and a build needs
a compiler only. Where there is none, the package installs without it and `qbert.explain` says what runs instead.
QBERT_REQUIRE_EXTENSION=1 turns a failed build into an error; QBERT_BUILD_JOBS says how many files compile at once.

One build serves every CPU too: each csrc/cpu/kernels_<isa>.cpp is compiled for its own instruction set, all other files for the
oldest CPU, and the kernels are chosen at run time. A flag that the compiler does not know is left out, and the file, which asks
the compiler's macros, then compiles to nothing.
"""

import os
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext, has_flag
from setuptools import setup

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
    """Adds the flags of a file's own instruction set, and keeps track of what each object file was made from."""

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
            isa = [flag for flag in ISA_FLAGS.get(Path(src).stem, []) if flag in known]
            compile_plain(obj, src, ext, cc_args, [*extra_postargs, *isa, "-MMD", "-MF", obj + ".d"], pp_opts)

        self.compiler._compile = compile_file
        super().build_extensions()


def extension() -> Pybind11Extension:
    """qbert._cpu."""
    cpu = Pybind11Extension(
        "qbert._cpu",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=["setup.py", *sorted(str(path) for path in Path("csrc/cpu").glob("*.h"))],
        include_dirs=["csrc"],
        libraries=["dl", "pthread"] if sys.platform == "linux" else [],
        cxx_std=17,
        extra_compile_args=FLAGS,
    )
    cpu.optional = os.environ.get("QBERT_REQUIRE_EXTENSION", "0") != "1"
    return cpu


if __name__ == "__main__":  # tests/native/build.py reads the flags
    ParallelCompile("QBERT_BUILD_JOBS", needs_recompile=needs_recompile).install()
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExt})
