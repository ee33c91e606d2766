"""Builds the optional extension; everything else is in pyproject.toml.

The extension links nothing of torch (its functions take pointers and sizes), so one build serves every torch and a build needs
a compiler only. Where there is none, the package installs without it and `qbert.explain` says what runs instead.
QBERT_REQUIRE_EXTENSION=1 turns a failed build into an error.
"""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("QBERT_BUILD_JOBS", default=0).install()

cpu = Pybind11Extension(
    "qbert._cpu",
    sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
    depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
)
cpu.optional = os.environ.get("QBERT_REQUIRE_EXTENSION", "0") != "1"

setup(ext_modules=[cpu], cmdclass={"build_ext": build_ext})
