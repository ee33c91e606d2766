"""Prints what nvcc makes of the compiled kernels for an H100: the figures in docs/cuda.md. No GPU is needed, and none is used.

QBERT_CUDA=1 python tests/cuda/machine_code.py [STEM ...]       all files of csrc/cuda, or those; CUTLASS's take minutes
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # what tests of other folders share

import builds
import sass

SHOWN = ("IGMMA", "HGMMA", "UTMALDG", "UBLKCP", "UTMASTG", "PRMT", "LDS", "LDG", "STG", "REDUX", "STL", "LDL")


def readable(name: str) -> str:
    """A mangled name as `function<its template arguments>`, without namespaces."""
    said = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    said = re.sub(r"\(anonymous namespace\)::|qbert::cuda::|sm90::", "", said)
    said = re.sub(r"\(Code\)(\d)", lambda code: ("int4", "dict4", "dict3", "int8")[int(code.group(1))], said)
    said = re.sub(r"\(LowbitTileIndex\)(\d)", r"tile \1", said)
    return re.sub(r"^void |\([^()]*\)$", "", said)


def counted(instructions: dict[str, int]) -> str:
    return ", ".join(f"{instructions[each]} {each}" for each in SHOWN if instructions.get(each))


def show(kernel: sass.Kernel) -> None:
    """Registers and instructions; of the loop of products its own, and how many instructions it has."""
    whole = counted({each: kernel.count(each) for each in SHOWN})
    line = f"  {readable(kernel.name)}: {kernel.registers} registers, {kernel.stack} bytes of stack; {whole}"
    for product in ("IGMMA", "HGMMA"):
        if kernel.count(product) and not (product == "HGMMA" and kernel.count("IGMMA")):
            loop = kernel.loop(product)
            line += f"; the loop of products: {loop.total()} instructions, {counted(loop)}"
    print(line, flush=True)


def main(stems: Sequence[str]) -> None:
    sources = {source.stem: source for source in sorted((builds.ROOT / "csrc/cuda").glob("*/*.cu"))}
    if unknown := set(stems) - set(sources):
        sys.exit(f"there is no {', '.join(sorted(unknown))}; allowed: {', '.join(sources)}")
    for stem in stems or sources:
        obj, _ = builds.compile_for_sm90(sources[stem])
        print(f"{stem}: {', '.join(sorted(sass.contents(obj)))}")
        for kernel in sass.kernels_of(obj):
            show(kernel)


if __name__ == "__main__":
    main(sys.argv[1:])
