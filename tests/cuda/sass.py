"""Reads what nvcc made of a kernel: machine code and resources, from an object file; and says what is wrong with it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inner_loop import inner_loop

REGISTER_FILE = 65_536  # 32-bit registers of a multiprocessor
REGISTER_GRANULE = 8  # registers of a thread are handed out in eights
HOPPER = "sm_90a"
# ptxas on products whose registers are touched too early or are too many: it makes all products of the kernel wait for each
# other (C7510, C7512, C7520), or some of them (C7517). An arrive that it adds (C7519) costs nothing.
_SERIALIZED = re.compile(r"\(C75\d\d\).*(?:serialized|warpgroup\.wait is injected).*function '(\w+)'")
# What multiplies on matrix units without a warpgroup, at half of Hopper's rate and less, beside what should.
_OLD_PRODUCTS = {"IGMMA": "IMMA", "HGMMA": "HMMA"}


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

    def loop(self, instruction: str) -> Counter[str]:
        """How often each instruction stands in the innermost loop that one is in, by their names up to a dot."""
        return inner_loop(self.sass, instruction)

    @property
    def products_from_shared(self) -> int:
        """Products of warpgroups whose A operand lies in shared memory: a descriptor, and no register, follows the sums."""
        return len(re.findall(r"\b[IH]GMMA\S* R\d+, gdesc", self.sass))


def cuobjdump() -> Path | None:
    """NVIDIA's tool, from the toolkit or from Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    packaged = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    found = shutil.which("cuobjdump")
    return Path(found) if found else packaged if packaged and packaged.exists() else None


def _read(*arguments: str) -> str:
    return subprocess.run([str(cuobjdump()), *arguments], capture_output=True, text=True, check=True).stdout


def kernels_of(obj: Path, architecture: str = HOPPER) -> list[Kernel]:
    """The kernels of an architecture in an object file, in the order of their names."""
    read = lambda what: _read(what, "-arch", architecture, str(obj))
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", read("-sass"), re.DOTALL))
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", read("-res-usage"))
    return sorted(
        (Kernel(name, bodies[name], int(registers), int(stack)) for name, registers, stack in usage),
        key=lambda each: each.name,
    )


def contents(obj: Path) -> set[str]:
    """What an object file carries: "sm_90a" machine code, "compute_80" PTX."""
    machine_code = re.findall(r"\.(sm_\w+)\.cubin", _read("-lelf", str(obj)))
    ptx = re.findall(r"\.sm_(\w+)\.ptx", _read("-lptx", str(obj)))
    return {*machine_code, *(f"compute_{each}" for each in ptx)}


def problems(
    kernel: Kernel,
    said: str,
    *,
    threads: int,
    blocks: int = 1,
    needs: Sequence[str] = (),
    a_from_registers: bool = False,
    stack: int = 0,
) -> list[str]:
    """What is wrong with a kernel; nothing, if the list is empty.

    Args:
        said: by the compiler of its file.
        threads: of a block, and `blocks`: how many must fit on a multiprocessor at once.
        needs: instructions that must be there.
        a_from_registers: whether products must take their A operand from registers.
        stack: bytes of local memory that it may have, to use outside of its loop of products.
    """
    local = kernel.loop(needs[0]) if stack else Counter(STL=kernel.count("STL"), LDL=kernel.count("LDL"))
    granted = -(-kernel.registers // REGISTER_GRANULE) * REGISTER_GRANULE
    old = [_OLD_PRODUCTS[each] for each in needs if each in _OLD_PRODUCTS]
    wrong = {
        f"{kernel.stack} bytes of stack": kernel.stack > stack,
        "local memory traffic (STL or LDL)": local["STL"] + local["LDL"] > 0,
        f"{granted} registers x {threads} threads x {blocks} blocks": granted * threads * blocks > REGISTER_FILE,
        "products wait for each other": kernel.name in _SERIALIZED.findall(said),
        "products take A from shared memory": a_from_registers and kernel.products_from_shared > 0,
        **{f"no {each}": kernel.count(each) == 0 for each in needs},
        **{f"products without a warpgroup ({each})": kernel.count(each) > 0 for each in old},
    }
    return [what for what, found in wrong.items() if found]
