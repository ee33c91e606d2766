"""How a Triton kernel cuts its problem: a table for each GPU, nothing tried out at run time.

The tables are `kernels/tuned/<gpu>.json`: operation -> rows. A row says for which problems it holds (`n` and `k`, null or left
out for any; `tokens`, up to how many) and what the tile is; rows for any n and k are the rule where nothing was measured.
`benchmarks.tune` adds rows for what it measured; `source` says where a row comes from.

A weight lies in one layout whatever it is multiplied with. So where the compiled kernels read another layout than Triton's
(`LAYOUT_BOUND`), a row of road "cuda" is for all problems of the operation: it has neither n, k nor tokens.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qbert.errors import QBertError
from qbert.formats import Scheme
from qbert.target import Target

TUNED = Path(__file__).parent / "kernels" / "tuned"
# Compute capability -> table. What has none of its own uses the nearest older one's tiles, cut down to its shared memory.
_TABLES = {90: "nvidia_h100"}
MIN_SM = 80  # bfloat16 and asynchronous copies
TMA_SM = 90


@dataclass(frozen=True)
class TileConfig:
    """One way to run one kernel.

    Attributes:
        road: which variant of the operation's kernel: ``"tma"`` (persistent, copies by descriptor), ``"pointer"`` (plain loads,
            any GPU and shape), ``"few"`` (few tokens: weight rows as the matrix unit's M, k split over programs), ``"cuda"``
            (the compiled extension, which chooses its own tile).
        block_t, block_n, block_k: tokens, output channels and input channels of a tile.
        warps, stages: of a program; copies in flight.
        group: tiles of the grid's first dimension that run close together, for the L2 cache.
        split_k: programs that share a tile's input channels.
        source: where the figures come from.
    """

    road: str
    block_t: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    split_k: int = 1
    source: str = "rule"


ROADS = ("tma", "pointer", "few", "cuda")
# Operations whose compiled kernels have a weight layout of their own.
LAYOUT_BOUND = frozenset({"w4a8_linear", "gobo_linear", "w8a16_linear", "w4a16_linear", "gobo_a16_linear"})
_FIELDS = frozenset(each.name for each in fields(TileConfig))
_KEYS = frozenset({"n", "k", "tokens"})


@dataclass(frozen=True)
class Row:
    """A row of a table: the problems it is for, and the tile."""

    n: int | None
    k: int | None
    tokens: int | None
    tile: TileConfig

    def fits(self, t: int, n: int, k: int) -> bool:
        """Whether it is for t tokens, n output and k input channels."""
        return self.n in (None, n) and self.k in (None, k) and (self.tokens is None or t <= self.tokens)


def tile_key(scheme: Scheme) -> str:
    """The name under which a table holds the tiles of linears of that scheme."""
    if scheme.has_dictionary:
        return "gobo_linear" if scheme.activation else "gobo_a16_linear"
    return f"w{scheme.weight_bits}a{scheme.activation_bits or 16}_linear"


def select_tile(operation: str, t: int, n: int, k: int, target: Target) -> TileConfig:
    """The tile of an operation's problem: of all rows that hold, the most particular one for the fewest tokens.

    Args:
        operation: with a table; `*_requant` shares its float twin's.
        t, n, k: tokens, output channels, input channels.

    Raises:
        QBertError: a GPU that is too old.
        KeyError: an operation without a table (a mistake in qbert, not in its input).
    """
    operation = operation.removesuffix("_requant")
    return _forced.get(operation) or _select(operation, max(t, 1), n, k, target)


def prefers_compiled(operation: str, target: Target) -> bool:
    """Whether the table sends problems of an operation to the compiled extension: some, or all of a `LAYOUT_BOUND` one."""
    rows = table(table_name(target)).get(operation.removesuffix("_requant"), [])
    return any(row.tile.road == "cuda" for row in rows)


_forced: dict[str, TileConfig] = {}


@contextmanager
def forced(operation: str, tile: TileConfig) -> Iterator[None]:
    """Within the block every problem of `operation` takes `tile`, in all threads: for tuning and tests."""
    before = _forced.get(operation)
    _forced[operation] = tile
    try:
        yield
    finally:
        _forced.pop(operation)
        if before is not None:
            _forced[operation] = before


def is_forced() -> bool:
    """Whether some operation's tile is `forced`: what was chosen before, or is chosen now, holds for no other time."""
    return bool(_forced)


@functools.lru_cache(maxsize=4096)
def _select(operation: str, t: int, n: int, k: int, target: Target) -> TileConfig:
    require_supported(target)
    rows = table(table_name(target))[operation]
    closed = {"tma": target.sm < TMA_SM, "cuda": not target.native}
    rows = [row for row in rows if not closed.get(row.tile.road)]
    holding = [row for row in rows if row.fits(t, n, k)]
    if not holding:
        raise KeyError(f"{operation}: no tile for t={t}, n={n}, k={k} in {table_name(target)}")
    best = min(
        holding,
        key=lambda row: (row.n is None, row.k is None, row.tokens is None, row.tokens or 0, row.tile.road != "cuda"),
    )
    return best.tile


def require_supported(target: Target) -> None:
    """
    Raises:
        QBertError: a CUDA device that the kernels do not run on.
    """
    if target.sm < MIN_SM:
        raise QBertError(
            f"this GPU has compute capability {target.sm / 10:.1f}; qbert's kernels need {MIN_SM / 10:.1f} or newer"
        )


def table_name(target: Target) -> str:
    """The table that holds for a GPU: its own, or the nearest older one's."""
    return _TABLES[max((sm for sm in _TABLES if sm <= target.sm), default=min(_TABLES))]


@functools.cache
def table(gpu: str) -> dict[str, list[Row]]:
    """The rows of `kernels/tuned/<gpu>.json` by operation.

    Raises:
        QBertError: a file that is not such a table.
    """
    path = TUNED / f"{gpu}.json"
    found = {operation: [_row(each, path) for each in rows] for operation, rows in json.loads(path.read_text()).items()}
    for operation in LAYOUT_BOUND & set(found):
        for row in found[operation]:
            if row.tile.road == "cuda" and (row.n, row.k, row.tokens) != (None, None, None):
                raise QBertError(
                    f"{path.name}: {operation} takes road cuda for n = {row.n}, k = {row.k}, tokens = {row.tokens}; allowed: "
                    "for no problem, or for all (null): its weight has another layout there"
                )
    return found


def tiles_of(operation: str, gpu: str = "nvidia_h100") -> list[TileConfig]:
    """The distinct tiles of Triton that the table can choose for an operation, sources left out: what tests compile."""
    of_triton = (row.tile for row in table(gpu)[operation] if row.tile.road != "cuda")
    return list(dict.fromkeys(replace(tile, source="table") for tile in of_triton))


def _row(record: dict[str, Any], path: Path) -> Row:
    unknown = set(record) - _FIELDS - _KEYS
    if unknown or record.get("road") not in ROADS:
        raise QBertError(
            f"{path.name}: {record} has {f'unknown fields {sorted(unknown)}' if unknown else 'no known road'}; "
            f"allowed: {', '.join(sorted(_FIELDS | _KEYS))}; roads: {', '.join(ROADS)}"
        )
    tile = TileConfig(**{name: value for name, value in record.items() if name in _FIELDS})
    return Row(record.get("n"), record.get("k"), record.get("tokens"), tile)
