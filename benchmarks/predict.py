"""What a GPU that is not here could do at best with each problem, beside the tile chosen for it: computed, not measured.

    python -m benchmarks.predict --target h100                       every scheme at BERT-base's shapes
    python -m benchmarks.predict --target h100 --tokens 4096 --scheme w8a8 --model large
    python -m benchmarks.predict --target h100 --over-w8a8            how far packed weights can be ahead of W8A8 at best

A tile keeps one multiprocessor's matrix unit busy for a known number of cycles, and tiles come in waves of as many as there are
multiprocessors: the last wave is rarely full, and the edges of a matrix rarely fill their tiles. The floor is the longer of the
waves' time and the time for the bytes that must move; no kernel is faster, and none reaches it. Tiles and waves are those of
`qbert.cost`, which models whole encoders, any formats, and energy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qbert import devices
from qbert.analyze.targets import TARGETS, RooflineTarget
from qbert.cost.tiling import Matrices, array_operations, tiles_of
from qbert.errors import QBertError
from qbert.formats import Role, Scheme, get_scheme
from qbert.ops.table import select_layout
from qbert.target import Target
from qbert.tiles import MIN_SM, TileConfig, select_tile, tile_key
from qbert.weight.layout import qdata_shape

from .problems import INTEGER_SCHEMES, LINEAR_SCHEMES, LINEARS, WEIGHT_ONLY_TOKENS

TOKENS = (1, 16, 64, 128, 512, 1024, 4096, 16384)
_BF16_BYTES = 2
GPUS: dict[str, Target] = {name: Target(**gpu.limits) for name, gpu in devices.GPUS.items() if gpu.sm >= MIN_SM}


@dataclass(frozen=True)
class Prediction:
    """The floor of one product.

    Attributes:
        scheme, t, n, k: the problem; it leaves bfloat16.
        tile: what would be chosen for it.
        tiles, waves: of the whole product.
        busy: share of the waves' arithmetic that the product needs: 1 where all waves and tiles are full.
        math_s: seconds of the waves.
        bytes_s: seconds for each byte to move once.
        bf16_s: floor of the same product in bfloat16, perfectly spread.
    """

    scheme: str
    t: int
    n: int
    k: int
    tile: TileConfig
    tiles: int
    waves: int
    busy: float
    math_s: float
    bytes_s: float
    bf16_s: float

    @property
    def floor_s(self) -> float:
        """Seconds below which no kernel with this tile can be."""
        return max(self.math_s, self.bytes_s)

    @property
    def bound(self) -> str:
        """What the floor consists of."""
        return "arithmetic" if self.math_s >= self.bytes_s else "bytes"

    @property
    def tops(self) -> float:
        """10^12 operations a second at the floor; a multiply-add is two."""
        return 2e-12 * self.t * self.n * self.k / self.floor_s


def predict(scheme: Scheme, t: int, n: int, k: int, gpu: str) -> Prediction:
    """The floor of a product of t tokens.

    Args:
        gpu: a key of `GPUS`.

    Raises:
        QBertError: an unknown GPU.
    """
    if gpu not in GPUS:
        raise QBertError(f"unknown target {gpu!r}; allowed: {', '.join(GPUS)}")
    target, rates = GPUS[gpu], TARGETS[gpu]
    tile = select_tile(tile_key(scheme), t, n, k, target)
    problem, block = Matrices(t, n, k, 1.0, 1.0, _BF16_BYTES), (tile.block_t, tile.block_n, tile.block_k)
    tiles = tiles_of(problem, block, tile.split_k)
    # One multiprocessor's share of the peak, for the whole blocks of input channels that one of split_k programs takes.
    operations = array_operations(problem, block, target.sm_count, "output", tile.split_k)
    peak = rates.peak("int8" if scheme.activation else "bf16")
    return Prediction(
        scheme=scheme.name, t=t, n=n, k=k, tile=tile, tiles=tiles, waves=math.ceil(tiles / target.sm_count),
        busy=problem.operations / operations,
        math_s=operations / peak,
        bytes_s=_bytes(scheme, t, n, k, target) / rates.bandwidth,
        bf16_s=_bf16_floor(t, n, k, rates),
    )  # fmt: skip


def _bytes(scheme: Scheme, t: int, n: int, k: int, target: Target) -> float:
    """Each operand once: codes as they lie in memory and their scales, activations, a bfloat16 result."""
    weight = math.prod(qdata_shape(select_layout(scheme, Role.LINEAR, target), scheme.weight, n, k))
    if scheme.group_size:
        weight += n * k // scheme.group_size * (1 if scheme.activation else 2)
    elif not scheme.has_dictionary:
        weight += 4 * n
    activations = t * k + 4 * t if scheme.activation else _BF16_BYTES * t * k
    return weight + activations + _BF16_BYTES * t * n


def _bf16_floor(t: int, n: int, k: int, rates: RooflineTarget) -> float:
    moved = _BF16_BYTES * (n * k + t * k + t * n)
    return max(2.0 * t * n * k / rates.peak("bf16"), moved / rates.bandwidth)


def predictions(
    gpu: str, *, schemes: Iterable[str] = LINEAR_SCHEMES, tokens: Iterable[int] = TOKENS,
    shapes: Sequence[tuple[int, int]] = LINEARS["base"],
) -> list[Prediction]:  # fmt: skip
    """Floors of every scheme at every shape and number of tokens; weight-only ones up to `WEIGHT_ONLY_TOKENS`.

    Raises:
        QBertError: an unknown scheme or GPU.
    """
    chosen = [get_scheme(name, Role.LINEAR) for name in schemes]
    return [
        predict(scheme, t, n, k, gpu)
        for n, k in shapes
        for t in tokens
        for scheme in chosen
        if scheme.activation or t <= WEIGHT_ONLY_TOKENS
    ]


def table(rows: Sequence[Prediction], gpu: str) -> Table:
    """Floors beside the tiles."""
    rates = TARGETS[gpu]
    drawn = Table(
        title=f"Floors on {rates.description}, computed, not measured ({rates.source}; result in bfloat16)",
        title_justify="left",
    )
    for header in ("n x k", "tokens", "scheme", "tile t x n x k", "road", "tiles", "waves", "busy", "floor us", "bound by",
                   "TOPS", "over bf16's floor"):  # fmt: skip
        drawn.add_column(header, justify="left" if header in ("scheme", "road", "bound by") else "right")
    for row in rows:
        tile = row.tile
        drawn.add_row(
            f"{row.n} x {row.k}", str(row.t), row.scheme, f"{tile.block_t} x {tile.block_n} x {tile.block_k}",
            tile.road + (f", k / {tile.split_k}" if tile.split_k > 1 else ""), str(row.tiles), str(row.waves),
            f"{row.busy:.0%}", f"{row.floor_s * 1e6:.2f}", row.bound, f"{row.tops:.0f}", f"{row.bf16_s / row.floor_s:.2f}",
        )  # fmt: skip
    return drawn


# For `over_w8a8`: more tokens than bound most of its columns, and a matrix of 16 MB, of which a model has many.
OVER_W8A8_TOKENS, OVER_W8A8_SHAPE = (16, 64, 96, 128, 144, 192, 256, 384, 512), (4096, 4096)


def bound(scheme: Scheme, t: int, n: int, k: int, gpu: str) -> float:
    """Seconds below which no kernel can be, whatever its tile: every byte moves once, every product is computed.

    Weights come out of memory, in the layout of the compiled kernels, which store 3-bit codes in 3 bits.
    """
    target, rates = replace(GPUS[gpu], native=True, prefer="cuda"), TARGETS[gpu]
    operations = 2.0 * t * n * k / rates.peak("int8" if scheme.activation else "bf16")
    return max(operations, _bytes(scheme, t, n, k, target) / rates.bandwidth)


def over_w8a8(gpu: str) -> Table:
    """Bounds of packed weights with int8 activations beside that of W8A8, which computes the same products."""
    n, k = OVER_W8A8_SHAPE
    w8a8, *packed = (get_scheme(name, Role.LINEAR) for name in INTEGER_SCHEMES)
    drawn = Table(
        title=f"{n} x {k} out of memory, {TARGETS[gpu].description}: bounds, computed, not measured",
        title_justify="left",
    )
    for header in ("tokens", "w8a8 us", "share of the int8 units", *(f"{scheme.name} over w8a8" for scheme in packed)):
        drawn.add_column(header, justify="right")
    for t in OVER_W8A8_TOKENS:
        whole = bound(w8a8, t, n, k, gpu)
        share = 2.0 * t * n * k / TARGETS[gpu].peak("int8") / whole
        ratios = [f"{whole / bound(scheme, t, n, k, gpu):.2f}" for scheme in packed]
        drawn.add_row(str(t), f"{whole * 1e6:.2f}", f"{share:.0%}", *ratios)
    return drawn


def main(
    target: Annotated[str, typer.Option("--target", help=", ".join(GPUS))] = "h100",
    scheme: Annotated[list[str] | None, typer.Option("--scheme", help="linear scheme; may be repeated")] = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", help="may be repeated")] = None,
    model: Annotated[str, typer.Option("--model", help="base or large")] = "base",
    ratios: Annotated[bool, typer.Option("--over-w8a8", help="bounds of packed weights beside that of W8A8")] = False,
) -> None:
    """Print the floors of one GPU."""
    if model not in LINEARS:
        raise typer.BadParameter(f"{model!r}; allowed: {', '.join(LINEARS)}")
    if ratios and target in GPUS:
        Console(width=170).print(over_w8a8(target))
        return
    chosen = scheme or LINEAR_SCHEMES
    try:
        rows = predictions(target, schemes=chosen, tokens=tokens or TOKENS, shapes=LINEARS[model])
    except QBertError as error:
        raise typer.BadParameter(str(error)) from error
    Console(width=170).print(table(rows, target))


if __name__ == "__main__":
    typer.run(main)
