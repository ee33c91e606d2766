"""A static model of the W8A8 GEMM on an H100, which chose the rows of kernels/tuned/nvidia_h100.json that nobody measured.

Cycles of the busiest multiprocessor: `m` tiles of `steps` k steps. The figures are those of the architecture, but for two that
are judged from what compilers emit and from what others measured, and that a measurement should replace:

    STALL     of a k step: Triton waits for each int32 product before it issues the next (it keeps two float32 ones in
              flight), so matrix units idle from the last product to the next: four barriers and a copy's issue. Another
              resident program hides it, and hides the epilogue.
    L2_BYTES  that reach shared memory in a cycle: conch's kernel (128 x 64 tiles, 1007 TOPS) takes 49 on each multiprocessor.

It is not fitted to any measurement of these kernels, for there is none. For n = k = 4096 it chooses the blocks that gemlite's
tuned h100.json has for its own kernel (a test says so).
"""

from __future__ import annotations

import math

from qbert.ops.triton.int8 import programs, shared_bytes
from qbert.target import Target
from qbert.tiles import TileConfig

H100 = Target("cuda", "", sm=90, sm_count=132, shared_memory=232_448)
WGMMA, MMA_SYNC = 4096, 1400  # int8 multiply-adds a cycle; mma.sync at half of wgmma's rate, less what ldmatrix takes
STALL, L2_BYTES, LATENCY = 200, 48.0, 1000
EPILOGUE, EPILOGUE_LATENCY = 12 / 128, 600  # cycles a result at 12 instructions; scales to load, a result to store
START = 1500  # until the first copies are there

CANDIDATES = (
    TileConfig("tma", 128, 256, 128, 8, 4), TileConfig("tma", 128, 128, 128, 4, 3), TileConfig("tma", 64, 128, 128, 4, 4),
    TileConfig("tma", 128, 64, 128, 4, 4), TileConfig("tma", 64, 64, 256, 4, 3),
    *(TileConfig("few", bt, bn, 256, 4, stages) for bn in (16, 32) for bt, stages in ((16, 8), (32, 6), (64, 5))),
)  # fmt: skip


def cycles(tile: TileConfig, t: int, n: int, k: int, out_bytes: int = 2) -> float:
    """What the model says of a tile for t tokens, n output and k input channels."""
    tiles = math.ceil(t / tile.block_t) * math.ceil(n / tile.block_n)
    m, steps = math.ceil(tiles / H100.sm_count), math.ceil(k / tile.block_k)
    resident = _resident(tile, out_bytes)
    wgmma = tile.road == "tma" or tile.block_n >= 64
    math_step = tile.block_t * tile.block_n * tile.block_k / (WGMMA if wgmma else MMA_SYNC)
    step_bytes = (tile.block_t + tile.block_n) * tile.block_k
    rate = min(L2_BYTES, resident * min(steps, tile.stages - 1) * step_bytes / LATENCY)
    copy_step = step_bytes / rate
    issue = tile.block_t * tile.block_n * EPILOGUE
    chain = steps * max(math_step + STALL, copy_step) + issue + EPILOGUE_LATENCY
    if resident == 1:
        return START + m * chain
    return START + max(m * steps * math_step, m * steps * copy_step, m * issue, math.ceil(m / resident) * chain)


def _resident(tile: TileConfig, out_bytes: int) -> int:
    """Programs of a full grid that share a multiprocessor."""
    if tile.road == "tma":
        return programs(tile, 2**20, 2**12, out_bytes, H100) // H100.sm_count
    return min(8, (H100.shared_memory + 1024) // (shared_bytes(tile, out_bytes) + 1024))


def best(t: int, n: int, k: int) -> TileConfig:
    """The candidate of the fewest cycles; of two that are close, the first, whose tile is larger."""
    fewest = min(cycles(tile, t, n, k) for tile in CANDIDATES)
    return next(tile for tile in CANDIDATES if cycles(tile, t, n, k) <= 1.03 * fewest)
