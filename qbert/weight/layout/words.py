"""Words: how the weight-only GPU kernel wants 3-bit codes to lie. Truly three bits a code: it is bound by bytes.

32 neighbouring codes of a row take three 32-bit words (little-endian), each with eight codes in the low three bits of its
nibbles. The nibbles' fourth bits, 3 x 8 of them, hold the other eight codes. So a word without its fourth bits is two
selectors of PTX's `prmt`, which looks four codes up at a time, and three shifts put the fourth such word together:

    bits 4 j ... 4 j + 2 of word p = 0, 1, 2      code 32 i + 8 p + j
    bit 4 j + 3 of word p                         bit p of code 32 i + 24 + j

A row is three planes: all words 0, then all words 1, then all words 2. k is rounded up to a multiple of 128, with code bits 0,
so that a plane is whole loads of 16 bytes.

Functions take and give unsigned codes (n, k) uint8.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # codes of which each plane has 16 bytes
PLANES = 3
WORD_BYTES = 4
_NIBBLES = 8  # of a word


def row_bytes(k: int) -> int:
    """Bytes of a row of k codes."""
    return -(-k // BLOCK) * BLOCK * PLANES // 8


def pack_dict3(codes: Tensor) -> Tensor:
    """(n, k) uint8 to (n, 3 * kp / 8)."""
    width = -(-codes.shape[1] // BLOCK) * BLOCK
    runs = pack_runs(torch.nn.functional.pad(codes, (0, width - codes.shape[1])))
    return runs.transpose(1, 2).flatten(1)


def unpack_dict3(rows: Tensor, k: int) -> Tensor:
    """Inverse of `pack_dict3`."""
    runs = rows.shape[1] // (PLANES * WORD_BYTES)
    planes = rows.view(rows.shape[0], PLANES, runs, WORD_BYTES)
    return unpack_runs(planes.transpose(1, 2))[:, :k].contiguous()


def pack_runs(codes: Tensor) -> Tensor:
    """(..., 32 r) uint8 to the three words of each 32 codes, (..., r, 3, 4) bytes."""
    eights = codes.unflatten(-1, (-1, PLANES + 1, _NIBBLES))
    fourth = eights[..., PLANES, :]
    planes = torch.stack([eights[..., p, :] | ((fourth >> p & 1) << 3) for p in range(PLANES)], dim=-2)
    return planes[..., 0::2] | planes[..., 1::2] << 4


def unpack_runs(runs: Tensor) -> Tensor:
    """Inverse of `pack_runs`."""
    nibbles = torch.stack((runs & 0xF, runs >> 4), dim=-1).flatten(-2)
    first, second, third = (nibbles >> 3).unbind(-2)
    fourth = first | second << 1 | third << 2
    return torch.cat((nibbles & 7, fourth.unsqueeze(-2)), dim=-2).flatten(-3)
