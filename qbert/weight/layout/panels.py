"""Panels: how the native CPU kernels want codes to lie.

A panel is 16 output channels, its lanes. Rows of a panel are 64 bytes (one vector register, one row of an AMX tile): byte
lane * 4 + i of a row belongs to input channel 4 * quad + i of that lane, so that one instruction multiplies a quad of input
channels of 16 output channels and adds each lane up. k is rounded up to whole multiples of 64; missing rows and columns hold
bits 0.

Functions take and give unsigned codes (n, k) uint8, except for int8, whose code is the value itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16
QUAD = 4  # input channels that one 32-bit lane of an instruction holds
ROW_BYTES = LANES * QUAD
K_BLOCK = 64
INT4_QUADS = 2  # quads in a row of int4 panels: low nibbles, high nibbles
INT3_QUADS = 8  # quads in three rows of int3 panels


def padded_k(k: int) -> int:
    """k rounded up to a multiple of `K_BLOCK`."""
    return -(-k // K_BLOCK) * K_BLOCK


def panel_shape(bits: int, n: int, k: int) -> tuple[int, ...]:
    """Shape of the panels of an (n, k) matrix of 3-, 4- or 8-bit codes; the last dimension is `ROW_BYTES`."""
    panels, quads = -(-n // LANES), padded_k(k) // QUAD
    if bits == 8:
        return panels, quads + 1, ROW_BYTES
    if bits == 4:
        return panels, quads // INT4_QUADS, ROW_BYTES
    return panels, quads // INT3_QUADS, 3, ROW_BYTES


def pack_int8(values: Tensor) -> Tensor:
    """(n, k) int8 to (panels, kp / 4 + 1, 64): a row a quad, then the little-endian int32 sums of each lane over k."""
    quads = _quads(values)
    panels, rows = quads.shape[:2]
    out = torch.empty(panels, rows + 1, ROW_BYTES, dtype=torch.int8, device=values.device)
    out[:, :rows] = quads.reshape(panels, rows, ROW_BYTES)
    sums = torch.zeros(panels * LANES, dtype=torch.int32, device=values.device)
    sums[: values.shape[0]] = values.sum(dim=1, dtype=torch.int32)
    out[:, rows] = sums.view(torch.int8).view(panels, ROW_BYTES)
    return out


def unpack_int8(panels: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `pack_int8`."""
    return _unquads(panels[:, :-1].unflatten(2, (LANES, QUAD)), n, k)


def pack_int4(codes: Tensor) -> Tensor:
    """(n, k) to (panels, kp / 8, 64): of row r, low nibbles are k = 8 r + i, high nibbles k = 8 r + 4 + i."""
    low, high = _quads_of_rows(codes, INT4_QUADS)
    return (low | (high << 4)).flatten(2)


def unpack_int4(panels: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `pack_int4`."""
    return _unquads(_stacked([panels & 0xF, panels >> 4]), n, k)


def pack_int3(codes: Tensor) -> Tensor:
    """(n, k) to (panels, kp / 32, 3, 64).

    Of row r, quad j = 0 ... 7 is k = 32 r + 4 j + i. Plane 0 holds the low two bits of quads 0 ... 3 at bits 2 j, plane 1
    those of quads 4 ... 7, plane 2 bit 2 of quad j at bit j.
    """
    quads = _quads_of_rows(codes, INT3_QUADS)
    planes = torch.zeros(*quads[0].shape[:2], 3, LANES, QUAD, dtype=torch.uint8, device=codes.device)
    for j, quad in enumerate(quads):
        planes[:, :, j // 4] |= (quad & 3) << (2 * (j % 4))
        planes[:, :, 2] |= (quad >> 2) << j
    return planes.flatten(3)


def unpack_int3(panels: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `pack_int3`."""
    planes = panels.unbind(2)
    quads = [((planes[j // 4] >> (2 * (j % 4))) & 3) | (((planes[2] >> j) & 1) << 2) for j in range(INT3_QUADS)]
    return _unquads(_stacked(quads), n, k)


def select_rows(panels: Tensor, rows: Tensor) -> Tensor:
    """Panels (of any code) of the output channels `rows` (m,) int64, in that order: what packing those rows would give."""
    lanes = panels.unflatten(-1, (LANES, QUAD)).movedim(-2, 1)  # (panels, LANES, ..., QUAD)
    count = -(-rows.numel() // LANES)
    chosen = panels.new_zeros(count * LANES, *lanes.shape[2:])
    chosen[: rows.numel()] = lanes[rows // LANES, rows % LANES]
    return chosen.unflatten(0, (count, LANES)).movedim(1, -2).flatten(-2)


def _quads_of_rows(codes: Tensor, count: int) -> tuple[Tensor, ...]:
    """The first, second ... of every `count` quads, (panels, kp / 4 / count, LANES, QUAD) each."""
    quads = _quads(codes)
    return quads.view(quads.shape[0], quads.shape[1] // count, count, LANES, QUAD).unbind(2)


def _stacked(quads: list[Tensor]) -> Tensor:
    """Inverse of `_quads_of_rows`, for quads (panels, rows, ROW_BYTES): (panels, kp / 4, LANES, QUAD)."""
    panels, rows, _ = quads[0].shape
    return torch.stack(quads, dim=2).view(panels, rows * len(quads), LANES, QUAD)


def _quads(codes: Tensor) -> Tensor:
    """(n, k) to (panels, kp / 4, LANES, QUAD), zeros where there is no row or column."""
    n, k = codes.shape
    panels, width = -(-n // LANES), padded_k(k)
    if (n, k) != (panels * LANES, width):
        padded = codes.new_zeros(panels * LANES, width)
        padded[:n, :k] = codes
        codes = padded
    return codes.reshape(panels, LANES, width // QUAD, QUAD).transpose(1, 2)


def _unquads(quads: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `_quads`."""
    panels, rows = quads.shape[:2]
    return quads.transpose(1, 2).reshape(panels * LANES, rows * QUAD)[:n, :k].contiguous()
