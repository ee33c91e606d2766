"""L2. Words: how the weight-only GPU kernel wants 3-bit codes to lie. Truly three bits a code: it is bound by bytes.

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
_NIBBLES = 8  # of a word
_WORD_BYTES = 4


def row_bytes(k: int) -> int:
    """Bytes of a row of k codes."""
    return -(-k // BLOCK) * BLOCK * PLANES // 8


def pack_dict3(codes: Tensor) -> Tensor:
    """(n, k) uint8 to (n, 3 * kp / 8)."""
    width = -(-codes.shape[1] // BLOCK) * BLOCK
    eights = torch.nn.functional.pad(codes, (0, width - codes.shape[1])).unflatten(1, (-1, PLANES + 1, _NIBBLES))
    fourth = eights[:, :, PLANES]
    planes = [eights[:, :, p] | ((fourth >> p & 1) << 3) for p in range(PLANES)]
    return torch.cat([(plane[..., 0::2] | plane[..., 1::2] << 4).flatten(1) for plane in planes], dim=1)


def unpack_dict3(rows: Tensor, k: int) -> Tensor:
    """Inverse of `pack_dict3`."""
    runs = rows.shape[1] // (PLANES * _WORD_BYTES)
    nibbles = torch.stack((rows & 0xF, rows >> 4), dim=2).view(rows.shape[0], PLANES, runs, _NIBBLES)
    first, second, third = (nibbles >> 3).unbind(1)
    fourth = first | second << 1 | third << 2
    return torch.stack((*(nibbles & 7).unbind(1), fourth), dim=2).flatten(1)[:, :k].contiguous()
