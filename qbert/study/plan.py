"""What a study tries: a format at the sites that can take it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qbert.emulation import Emulation, emulate
from qbert.errors import QBertError
from qbert.formats import BlockFormat

SITES = ("weights", "embeddings", "activations", "attention", "norms", "gelu")
_STORED = ("weights", "embeddings")


@dataclass(frozen=True)
class Point:
    """One row of a study.

    Attributes:
        fmt: the format.
        sites: where it is: those of the study that it is for.
        left_out: site -> why it is not for that one.
    """

    fmt: BlockFormat
    sites: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def emulation(self) -> Emulation:
        """What `quantize_` takes."""
        chosen: dict[str, Any] = dict.fromkeys(self.sites, self.fmt)
        return emulate(**chosen)


def plan_points(formats: Sequence[BlockFormat], sites: Sequence[str] = ("weights",)) -> list[Point]:
    """A point for each format.

    Raises:
        QBertError: no format, two of one name, an unknown site, or a format that is for none of the sites.
    """
    if not formats:
        raise QBertError("no format to study; allowed: at least one --format or --sweep")
    for site in sites:
        if site not in SITES or list(sites).count(site) > 1:
            raise QBertError(f"site {site!r}; allowed once each: {', '.join(SITES)}")
    seen: dict[str, BlockFormat] = {}
    for fmt in formats:
        if seen.setdefault(fmt.name, fmt) != fmt:
            raise QBertError(f"two formats are called {fmt.name!r}; allowed: a name for each")
    return [_point(fmt, sites) for fmt in seen.values()]


def _point(fmt: BlockFormat, sites: Sequence[str]) -> Point:
    obstacle = fmt.obstacle_for_activations()
    left_out = {site: obstacle for site in sites if site not in _STORED and obstacle is not None}
    taken = tuple(site for site in sites if site not in left_out)
    if not taken:
        raise QBertError(f"format {fmt.name} is for none of the sites {', '.join(sites)}: {obstacle}")
    return Point(fmt, taken, left_out)
