"""Executes straight-line PTX on integers: what inline assembly computes, with no GPU. Only the instructions that qbert uses."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

_MASK = 0xFFFF_FFFF


def execute(assembly: str, operands: dict[int, int]) -> dict[int, int]:
    """Registers after the assembly: operand number -> 32 bits.

    Args:
        operands: of the inputs; the others are undefined until they are written.

    Raises:
        KeyError: an instruction that is not known here, or a register that is read before it is written.
    """
    registers = {f"${number}": value & _MASK for number, value in operands.items()}
    for line in re.sub(r"\.reg[^;]*;|[{}]", "", assembly).split(";"):
        if line.strip():
            name, rest = line.split(maxsplit=1)
            target, *sources = (each.strip() for each in rest.split(","))
            registers[target] = _INSTRUCTIONS[name](*(_value(each, registers) for each in sources)) & _MASK
    return {int(name[1:]): value for name, value in registers.items() if name.startswith("$")}


def _value(source: str, registers: dict[str, int]) -> int:
    if source.startswith("0f"):
        return int(source[2:], 16)
    return int(source, 0) if source[0].isdigit() else registers[source]


def _prmt(a: int, b: int, selector: int) -> int:
    table, out = a | b << 32, 0
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = table >> (8 * (nibble & 7)) & 255
        if nibble & 8:  # the byte's sign, eight times
            byte = 255 * (byte >> 7)
        out |= byte << (8 * i)
    return out


def _lop3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def floats_of(register: int, kind: str) -> list[float]:
    """The value of a register of float32, or the two of fp16 or bf16, the lower one first."""
    if kind == "fp32":
        return [float(np.uint32(register).view(np.float32))]
    halves = register & 0xFFFF, register >> 16
    if kind == "fp16":
        return [float(np.uint16(half).view(np.float16)) for half in halves]
    return [float(np.uint32(half << 16).view(np.float32)) for half in halves]


def register_of(values: list[float], kind: str) -> int:
    """Inverse of `floats_of`; the values must be exact in that type."""
    if kind == "fp32":
        register = int(np.float32(values[0]).view(np.uint32))
    elif kind == "fp16":
        register = sum(int(np.float16(value).view(np.uint16)) << (16 * i) for i, value in enumerate(values))
    else:
        register = sum(int(np.float32(value).view(np.uint32)) >> 16 << (16 * i) for i, value in enumerate(values))
    assert floats_of(register, kind) == values, f"{values} are not exact in {kind}"
    return register


def _on_floats(kind: str, function: Callable[..., float]) -> Callable[..., int]:
    def instruction(*registers: int) -> int:
        lanes = zip(*(floats_of(each, kind) for each in registers), strict=True)
        return register_of([function(*lane) for lane in lanes], kind)

    return instruction


_INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "sub.f32": _on_floats("fp32", lambda a, b: a - b),
    "sub.f16x2": _on_floats("fp16", lambda a, b: a - b),
    "fma.rn.f16x2": _on_floats("fp16", lambda a, b, c: a * b + c),
    "fma.rn.bf16x2": _on_floats("bf16", lambda a, b, c: a * b + c),
}
