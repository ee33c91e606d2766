"""Rows: how the GPU kernels want codes to lie.

A row of codes stays a row of bytes, K-major as the integer matrix units ask for, padded with code bits 0. Packed rows are
cut into blocks of `K_BLOCK` codes whose two halves lie in the same bytes, so that unpacking a block gives two operands of 64
neighbouring codes each, and no code ever moves between bytes:

    nibble halves   byte j of a block holds code j in its low nibble and code 64 + j in its high one
    select halves   the two low bytes of a word (little-endian) hold four neighbouring codes of the first half, a nibble each
                    from the lowest on, its two high bytes the same of the second half: each is a selector of PTX's `prmt`,
                    which picks four bytes of an eight-byte table at once

Functions take and give unsigned codes (n, k) uint8, except for int8, whose code is the value itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

K_BLOCK = 128
HALF = K_BLOCK // 2
# Rows of a matrix that the copy engine (TMA) reads start on 16 bytes.
ROW_ALIGNMENT = 16
_WORD_CODES = 4  # codes of one half in a 32-bit word of select halves


def padded_k(bits: int, k: int) -> int:
    """k rounded up to whole rows of 8-bit codes, or whole blocks of smaller ones."""
    multiple = ROW_ALIGNMENT if bits == 8 else K_BLOCK
    return -(-k // multiple) * multiple


def row_bytes(bits: int, k: int) -> int:
    """Bytes of a row of k codes; those of fewer than 8 bits take a nibble each."""
    return padded_k(bits, k) if bits == 8 else padded_k(bits, k) // 2


def pack_int8(values: Tensor) -> Tensor:
    """(n, k) int8 to (n, kp); the same tensor where nothing is to be padded."""
    return _padded(values, padded_k(8, values.shape[1]))


def unpack_int8(rows: Tensor, k: int) -> Tensor:
    """Inverse of `pack_int8`."""
    return rows if rows.shape[1] == k else rows[:, :k].contiguous()


def pack_nibble_halves(codes: Tensor) -> Tensor:
    """(n, k) uint8 to (n, kp / 2)."""
    first, second = _halves(codes)
    return (first | (second << 4)).flatten(1)


def unpack_nibble_halves(rows: Tensor, k: int) -> Tensor:
    """Inverse of `pack_nibble_halves`."""
    blocks = rows.unflatten(1, (-1, HALF))
    return _joined(blocks & 0xF, blocks >> 4, k)


def pack_select_halves(codes: Tensor) -> Tensor:
    """(n, k) uint8 to (n, kp / 2)."""
    words = [half.unflatten(2, (-1, _WORD_CODES)) for half in _halves(codes)]
    pairs = [word[..., 0::2] | (word[..., 1::2] << 4) for word in words]
    return torch.cat(pairs, dim=3).flatten(1)


def unpack_select_halves(rows: Tensor, k: int) -> Tensor:
    """Inverse of `pack_select_halves`."""
    words = rows.unflatten(1, (-1, HALF // _WORD_CODES, 4))
    first, second = (
        torch.stack((pair & 0xF, pair >> 4), dim=4).flatten(2) for pair in (words[..., :2], words[..., 2:])
    )
    return _joined(first, second, k)


def _padded(codes: Tensor, width: int) -> Tensor:
    return codes if codes.shape[1] == width else torch.nn.functional.pad(codes, (0, width - codes.shape[1]))


def _halves(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(n, k) to the first and second halves of its blocks, (n, blocks, HALF) each."""
    blocks = _padded(codes, padded_k(4, codes.shape[1])).unflatten(1, (-1, 2, HALF))
    return blocks[:, :, 0], blocks[:, :, 1]


def _joined(first: Tensor, second: Tensor, k: int) -> Tensor:
    """Inverse of `_halves`."""
    return torch.stack((first, second), dim=2).flatten(1)[:, :k].contiguous()
