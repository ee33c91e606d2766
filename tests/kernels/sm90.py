"""Compiles Triton kernels for an H100 that is not here, and reads what came out: PTX, SASS, resources, warnings."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_LIMIT = 227 * 1024  # bytes that one block can use
REGISTER_FILE = 65_536  # 32-bit registers of a multiprocessor
REGISTER_GRANULE = 8  # registers of a thread are handed out in eights
MAX_REGISTERS = 255  # of a thread
# What Triton says when an int8 operand is not K-major: it transposes it in registers and stops copying it ahead.
WRONG_ORDER = "Forcing a different order"


@dataclass(frozen=True)
class Constant:
    """An argument that a kernel is compiled for: a `tl.constexpr`, or an integer that is 1, which Triton compiles as one."""

    value: Any


ONE = Constant(1)


@dataclass(frozen=True)
class Built:
    """A kernel compiled for sm_90.

    Attributes:
        ptx, sass: the code.
        registers: of a thread.
        shared: bytes of a block.
        stack: bytes of a thread: more than none is local memory.
        warps: of a block.
        messages: what the compiler wrote to standard error.
    """

    ptx: str
    sass: str
    registers: int
    shared: int
    stack: int
    warps: int
    messages: str

    def count(self, instruction: str) -> int:
        """How often a SASS instruction stands in the code (its whole name, or up to a dot)."""
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.sass))

    @property
    def wgmma_a_from_registers(self) -> bool:
        """Whether every wgmma takes its A operand from registers: two lists of registers stand before B's descriptor."""
        found = re.findall(r"wgmma\.mma_async\S+\s*\{[^}]*\},\s*(\{?)", self.ptx)
        return bool(found) and all(found)


def build(
    kernel: Any, arguments: Mapping[str, Any], *, warps: int = 4, stages: int = 3, unaligned: tuple[str, ...] = (),
    **options: Any,
) -> Built:  # fmt: skip
    """The kernel compiled for an H100.

    Args:
        kernel: the `triton.jit` function.
        arguments: name -> Triton's type (``"*i8"``, ``"i32"``, ``"tensordesc<i8[128, 128]>"``), a tuple of them, or a
            `Constant`, in the function's order. None is no type but the argument itself.
        unaligned: arguments, or fields of tuples, that are not multiples of 16; by default pointers and integers are.
        options: of `triton.compile`.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False, **options}
    with _compiled_afresh(), _standard_error() as heard:
        built = triton.compile(source(kernel, arguments, unaligned), target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        read = lambda flag: subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
        sass, usage = read("-sass"), read("-res-usage")
    figure = lambda name: int(re.search(rf"{name}:(\d+)", usage).group(1))
    return Built(built.asm["ptx"], sass, figure("REG"), built.metadata.shared, figure("STACK"), warps, "".join(heard))


def problems(
    built: Built, *, wgmma: bool = False, tma: bool = False, a_from_registers: bool = False, blocks_per_sm: int = 1
) -> list[str]:
    """What is wrong with a compiled kernel; nothing, if the list is empty.

    Args:
        wgmma: whether int8 products on Hopper's matrix units were promised (IGMMA).
        tma: whether copies by descriptor were promised (UTMALDG).
        a_from_registers: whether wgmma's A operand must come from registers.
        blocks_per_sm: how many blocks must fit on a multiprocessor at once.
    """
    granted = -(-built.registers // REGISTER_GRANULE) * REGISTER_GRANULE
    checks = {
        "local memory traffic (STL or LDL)": built.count("STL") + built.count("LDL") > 0,
        f"{built.stack} bytes of stack": built.stack > 0,
        f"{built.shared} bytes of shared memory for {blocks_per_sm} blocks": built.shared * blocks_per_sm
        > SHARED_LIMIT,
        f"{built.registers} registers a thread": built.registers > MAX_REGISTERS,
        f"{granted} registers x {built.warps * 32} threads x {blocks_per_sm} blocks": granted
        * built.warps
        * 32
        * blocks_per_sm
        > REGISTER_FILE,
        f"warning: {WRONG_ORDER}": WRONG_ORDER in built.messages,
        "no IGMMA": wgmma and built.count("IGMMA") == 0,
        "int8 products by mma.sync (IMMA)": wgmma and built.count("IMMA") > 0,
        "no wgmma of int8 in the PTX": wgmma and not re.search(r"wgmma\.mma_async\S*\.s32\.[su]8\.[su]8", built.ptx),
        "wgmma's A operand comes from shared memory": a_from_registers and not built.wgmma_a_from_registers,
        "no UTMALDG": tma and built.count("UTMALDG") == 0,
    }
    return [what for what, wrong in checks.items() if wrong]


def source(kernel: Any, arguments: Mapping[str, Any], unaligned: tuple[str, ...] = ()) -> Any:
    """What `triton.compile` takes; arguments as of `build`."""
    from triton.compiler import ASTSource

    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}

    def visit(name: str, value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            names = getattr(value, "_fields", [name] * len(value))
            parts = [visit(field, part, (*path, i)) for i, (field, part) in enumerate(zip(names, value, strict=True))]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if value is None or isinstance(value, Constant):
            constants[path] = None if value is None else value.value
            return "constexpr"
        if name not in unaligned and (value.startswith("*") or value in ("i32", "i64")):
            aligned[path] = [["tt.divisibility", 16]]
        return value

    signature = {name: visit(name, value, (index,)) for index, (name, value) in enumerate(arguments.items())}
    return ASTSource(kernel, signature, constants, aligned)


@contextmanager
def _compiled_afresh() -> Iterator[None]:
    """Warnings are off by default, and a kernel from Triton's cache has none."""
    wanted = {"MLIR_ENABLE_DIAGNOSTICS": "warnings", "TRITON_ALWAYS_COMPILE": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _standard_error() -> Iterator[list[str]]:
    """Everything that is written to file descriptor 2, by C++ too, as text once the block has ended."""
    heard: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield heard
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            heard.append(file.read().decode(errors="replace"))
