"""How a weight with many zeros is stored: the codes that are none, and where they stand. In files only, never in memory.

Two ways, both bijections of PLAIN for the codes that they take; every other tensor stays as it is.

`Layout.BITMAP`: `bitmap` (n, ceil(k / 8)) uint8, bit c of a row set where its code c is none of the zero's; and `qdata`, those
codes row after row as one bit stream, (count,) int8 or (ceil(count * bits / 8),) uint8.

`Layout.TWO_OF_FOUR`: of every four neighbours at most two are other than zero. `qdata` holds two codes of each, as PLAIN does
of k / 2 columns; `places` their places among the four, two bits each, (n, ceil(k / 8)) uint8, ascending. It is the operand of
the sparse matrix units of NVIDIA's GPUs (values and 2-bit metadata, Mishra et al., 2021) in plain order. Where fewer than two
are other than zero the first free places fill up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbert.errors import CheckpointError
from qbert.formats import Scheme
from qbert.weight.layout import Layout
from qbert.weight.layout.bits import pack_bits, pack_codes, packed_width, unpack_bits, unpack_codes
from qbert.weight.specs import TensorSpec

FILE_LAYOUTS = (Layout.BITMAP, Layout.TWO_OF_FOUR)
BITMAP, PLACES = "bitmap", "places"
_BESIDE = {Layout.BITMAP: BITMAP, Layout.TWO_OF_FOUR: PLACES}
EXTRA = frozenset(_BESIDE.values())  # tensors that no other layout has
GROUP, OF_GROUP = 4, 2
_PLACE_BITS = 2
_NEARLY = 0.03


def stored_specs(
    plain: dict[str, TensorSpec], scheme: Scheme, shape: tuple[int, int], layout: Layout, count: int
) -> dict[str, TensorSpec]:
    """The tensors of a file, of those in the PLAIN layout.

    Args:
        count: codes that are none of the zero's; of `Layout.BITMAP`, which stores so many.
    """
    if layout not in _BESIDE:
        return plain
    (n, k), bits, specs = shape, scheme.weight_bits, dict(plain)
    if layout is Layout.BITMAP:
        stream = (
            TensorSpec(torch.int8, (count,)) if bits == 8 else TensorSpec(torch.uint8, (packed_width(count, bits),))
        )
        return {**specs, "qdata": stream, BITMAP: TensorSpec(torch.uint8, (n, packed_width(k, 1)))}
    half = k // GROUP * OF_GROUP
    values = TensorSpec(torch.int8, (n, half)) if bits == 8 else TensorSpec(torch.uint8, (n, packed_width(half, bits)))
    return {**specs, "qdata": values, PLACES: TensorSpec(torch.uint8, (n, packed_width(half, _PLACE_BITS)))}


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    """In which layout a file's tensors are, by what stands beside them."""
    return next((layout for layout, name in _BESIDE.items() if name in tensors), Layout.PLAIN)


def zero_code(scheme: Scheme, tensors: dict[str, Tensor]) -> int | None:
    """The code that stands for zero: the lowest of a dictionary's that do; None where its values have no zero."""
    if not scheme.has_dictionary:
        return 0
    found = (tensors["codebook"] == 0).nonzero().flatten()
    return int(found[0]) if len(found) else None


def nonzeros(scheme: Scheme, shape: tuple[int, int], tensors: dict[str, Tensor]) -> Tensor:
    """Bool (n, k) of the codes of a PLAIN weight that are none of the zero's; all where there is none."""
    codes, zero = unpack_codes(tensors["qdata"], scheme.weight, shape[1]), zero_code(scheme, tensors)
    return torch.ones_like(codes, dtype=torch.bool) if zero is None else codes != zero


def best_layout(scheme: Scheme, shape: tuple[int, int], tensors: dict[str, Tensor]) -> Layout:
    """In which layout a file is smallest: PLAIN unless leaving zeros out saves something."""
    if zero_code(scheme, tensors) is None:
        return Layout.PLAIN
    there, bits = nonzeros(scheme, shape, tensors), scheme.weight_bits
    count = int(there.sum())
    costs = {Layout.PLAIN: float(bits * there.numel()), Layout.BITMAP: float(bits * count + there.numel())}
    if shape[1] % GROUP == 0 and int(there.unflatten(1, (-1, GROUP)).sum(2).max()) <= OF_GROUP:
        costs[Layout.TWO_OF_FOUR] = (bits + _PLACE_BITS) * there.numel() * OF_GROUP / GROUP
    if not count:  # nothing but zeros: no sparse matrix, and one row of codes too few for a file
        return Layout.PLAIN
    if Layout.TWO_OF_FOUR in costs:  # of nearly equal ones the layout of the matrix units
        costs[Layout.TWO_OF_FOUR] *= 1 - _NEARLY
    return min(costs, key=lambda each: costs[each])


def pack(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], layout: Layout) -> dict[str, Tensor]:
    """A PLAIN weight as a file holds it."""
    codes, there = unpack_codes(tensors["qdata"], scheme.weight, shape[1]), nonzeros(scheme, shape, tensors)
    if layout is Layout.BITMAP:
        stream = pack_codes(codes[there].view(1, -1), scheme.weight).flatten()
        return {**tensors, "qdata": stream, BITMAP: pack_bits(there.to(torch.uint8), 1)}
    places = _places(there)
    values = codes.unflatten(1, (-1, GROUP)).gather(2, places).flatten(1)
    packed = pack_bits(places.flatten(1).to(torch.uint8), _PLACE_BITS)
    return {**tensors, "qdata": pack_codes(values, scheme.weight), PLACES: packed}


def _places(there: Tensor) -> Tensor:
    """(n, k / 4, 2) int64 ascending: those that are there, then the first others."""
    order = (~there).unflatten(1, (-1, GROUP)).to(torch.uint8).argsort(dim=2, stable=True)
    return order[:, :, :OF_GROUP].sort(dim=2).values


def unpack(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], layout: Layout) -> dict[str, Tensor]:
    """Inverse of `pack`, of tensors that keep `check`'s rules."""
    (n, k), zero = shape, zero_code(scheme, tensors)
    device, kind = tensors["qdata"].device, torch.uint8 if scheme.has_dictionary else torch.int8
    codes = torch.full((n, k), zero or 0, dtype=kind, device=device)
    if layout is Layout.BITMAP:
        there = unpack_bits(tensors[BITMAP], 1, k).to(torch.bool)
        codes[there] = _stream(tensors["qdata"], scheme, int(there.sum())).to(kind)
    else:
        half = k // GROUP * OF_GROUP
        values = unpack_codes(tensors["qdata"], scheme.weight, half).to(kind).unflatten(1, (-1, OF_GROUP))
        codes.view(n, -1, GROUP).scatter_(2, _read_places(tensors[PLACES], half), values)
    rest = {name: each for name, each in tensors.items() if name not in EXTRA}
    return {**rest, "qdata": pack_codes(codes, scheme.weight)}


def _stream(qdata: Tensor, scheme: Scheme, count: int) -> Tensor:
    return unpack_codes(qdata.view(1, -1), scheme.weight, count).flatten()


def _read_places(packed: Tensor, half: int) -> Tensor:
    return unpack_bits(packed, _PLACE_BITS, half).to(torch.int64).unflatten(1, (-1, OF_GROUP))


def check(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], layout: Layout, prefix: str) -> None:
    """The rules for what says where zeros are, before anything is put in its place; types and shapes are as they must be.

    Raises:
        CheckpointError: the first rule that is broken.
    """
    k, zero = shape[1], zero_code(scheme, tensors)
    if zero is None:
        raise CheckpointError(f"{prefix}codebook", "must have a 0, which zeros are stored as", "none")
    if layout is Layout.TWO_OF_FOUR:
        half = k // GROUP * OF_GROUP
        _require_spare(f"{prefix}{PLACES}", tensors[PLACES], _PLACE_BITS * half)
        _require_spare(f"{prefix}qdata", tensors["qdata"], scheme.weight_bits * half)
        first, second = _read_places(tensors[PLACES], half).unbind(2)
        if not bool((first < second).all()):
            group = int((first >= second).flatten().nonzero()[0])
            raise CheckpointError(f"{prefix}{PLACES}", "both places among four must ascend", f"group {group}")
        return
    _require_spare(f"{prefix}{BITMAP}", tensors[BITMAP], k)
    count, stream = int(unpack_bits(tensors[BITMAP], 1, k).sum(dtype=torch.int64)), tensors["qdata"]
    if stream.numel() != packed_width(count, scheme.weight_bits):
        raise CheckpointError(
            f"{prefix}{BITMAP}", f"must have as many bits set as there are codes in {prefix}qdata", count
        )
    _require_spare(f"{prefix}qdata", stream.view(1, -1), scheme.weight_bits * count)
    if bool((_stream(stream, scheme, count) == zero).any()):
        raise CheckpointError(f"{prefix}qdata", "codes that are stored must be others than the zero's", zero)


def _require_spare(name: str, packed: Tensor, bits: int) -> None:
    used = bits % 8
    if used and packed.numel() and bool((packed[:, -1].to(torch.int32) >> used).any()):
        raise CheckpointError(name, f"the {8 - used} spare bits of a row must be 0", "others")


def two_of_four_product(x: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """x (t, k) times the transpose of a weight (n, k) whose two of four are given, exactly: what a sparse matrix unit sums up.

    Args:
        x: int8 codes.
        values: (n, k / 2) int8.
        places: (n, k / 2) in 0 ... 3.

    Returns:
        (t, n) int64 sums.
    """
    columns = torch.arange(values.shape[1], device=x.device) // OF_GROUP * GROUP + places.to(torch.int64)
    rows = zip(values.to(torch.int64), columns, strict=True)
    return torch.stack([(x[:, chosen].to(torch.int64) * row).sum(1) for row, chosen in rows], dim=1)
