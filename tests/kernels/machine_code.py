"""Prints what Triton makes of the main kernels for sm_90: the figures in docs/gpu.md. No GPU is needed, and none is used.

python tests/kernels/machine_code.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # what tests of other folders share

import test_attention_kernel as attention
import test_int8_gemm as int8
import test_lowbit_gemm as lowbit
import test_row_kernels as rows
import triton
from inner_loop import inner_loop
from sm90 import Built

from qbert.tiles import TileConfig

ISSUE_SLOTS = 4  # instructions that a multiprocessor issues in a cycle
SHOWN = ("IGMMA", "HGMMA", "UTMALDG", "PRMT", "LDG.E.128", "STG.E.128", "STL", "LDL")


def show(name: str, built: Built, more: str = "") -> None:
    counts = ", ".join(f"{built.count(each)} {each}" for each in SHOWN if built.count(each))
    print(f"{name}: {built.registers} registers, {built.shared} bytes of shared memory, {counts}{more}", flush=True)


def issue_cycles(built: Built) -> str:
    """Of a k step: what all warps of a program issue, on a multiprocessor that has it alone."""
    loop = inner_loop(built.sass, "IGMMA")
    return f"; a step: {loop.total() * built.warps / ISSUE_SLOTS:.0f} issue cycles, {loop['PRMT']} PRMT a warp"


def main() -> None:
    print(f"triton {triton.__version__}, compiled for sm_90, not run")
    for tile in (TileConfig("tma", 128, 256, 128, 8, 4), TileConfig("tma", 128, 128, 128, 4, 3)):
        show(
            f"w8a8 {tile.block_t} x {tile.block_n} x {tile.block_k}, bf16, GELU", int8.build(tile, "bf16", bias="bf16")
        )
    for bits in (3, 4):
        built = lowbit._build("gobo_linear", lowbit.LARGE["gobo_linear"], "bf16", bits=bits)
        show(f"gobo{bits}a8 128 x 128 x 128, bf16, GELU", built, issue_cycles(built))
    for group in (128, 64, 32):
        built = lowbit._build("w4a8_linear", lowbit.LARGE["w4a8_linear"], "bf16", group_size=group)
        show(f"w4a8-g{group} 128 x 128 x 128, bf16, GELU", built, issue_cycles(built))
    for tile, per_token in attention.TILES:
        scales = "a token's" if per_token else "static"
        name = f"attention {tile.block_t} x {tile.block_n}, heads of {tile.block_k}, {scales} scales, int8"
        show(name, attention.compiled(tile, tile.block_k, "i8", per_token))
    for name, distances in {"a window": attention.WINDOW, "biases": attention.BIAS, "both": attention.BOTH}.items():
        for per_token in (False, True):
            scales = "a token's" if per_token else "static"
            built = attention.compiled(attention.NARROW[0], 64, "i8", per_token, distances)
            show(f"attention with {name}, 64 x 64, heads of 64, {scales} scales, int8", built)
    show("round_heads, 12 heads of 64, rotary, bf16", attention.compiled_rounding("bf16", 12, 64, True, True))
    for k in (768, 1024):
        show(f"add_layer_norm_quantize, {k} columns, bf16", rows.compiled_norm("bf16", "bf16", k))


if __name__ == "__main__":
    main()
