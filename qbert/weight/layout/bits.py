"""The bit stream: code i of a row occupies bits i*b ... i*b + b - 1, from the least significant bit of its first byte."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import Format, Kind


def packed_width(k: int, bits: int) -> int:
    """Bytes that a row of k codes of `bits` bits takes."""
    return (k * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, k), integers in 0 ... 2**bits - 1, to their bit stream (n, ceil(k * bits / 8)) uint8; spare bits are 0."""
    n, k = codes.shape
    run, width, word_type = _word(bits)
    words = -(-k // run)
    padded = torch.zeros(n, words * run, dtype=torch.uint8, device=codes.device)
    padded[:, :k] = codes
    word = torch.zeros(n, words, dtype=word_type, device=codes.device)
    for i, column in enumerate(padded.view(n, words, run).unbind(2)):
        word |= column.to(word_type) << (i * bits)
    stream = torch.stack([(word >> (8 * i) & 0xFF).to(torch.uint8) for i in range(width)], dim=2)
    return stream.view(n, words * width)[:, : packed_width(k, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `pack_bits`: bit stream (n, ceil(k * bits / 8)) uint8 to codes (n, k) uint8."""
    n, row_bytes = packed.shape
    if row_bytes != packed_width(k, bits):  # fewer would read as zeros, more would be left out, both without a word
        raise QBertError(f"{k} codes of {bits} bits take {packed_width(k, bits)} bytes a row, got {row_bytes}")
    run, width, word_type = _word(bits)
    words = -(-k // run)
    stream = torch.zeros(n, words * width, dtype=torch.uint8, device=packed.device)
    stream[:, :row_bytes] = packed
    word = torch.zeros(n, words, dtype=word_type, device=packed.device)
    for i, column in enumerate(stream.view(n, words, width).unbind(2)):
        word |= column.to(word_type) << (8 * i)
    mask = (1 << bits) - 1
    codes = torch.stack([(word >> (i * bits) & mask).to(torch.uint8) for i in range(run)], dim=2)
    return codes.view(n, words * run)[:, :k].contiguous()


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """The shortest run of codes that ends on a byte: its codes, its bytes, and an integer type that holds it."""
    run = 8 // math.gcd(8, bits)
    width = run * bits // 8
    return run, width, torch.uint8 if width == 1 else torch.int32 if width < 4 else torch.int64


def pack_codes(codes: Tensor, fmt: Format) -> Tensor:
    """Codes (n, k), signed for integer formats and indices for dictionaries, to the PLAIN `qdata`."""
    if fmt.bits == 8:
        return codes.to(torch.int8).contiguous()
    return pack_bits(codes.to(torch.int8) & (fmt.codes - 1), fmt.bits)


def unpack_codes(qdata: Tensor, fmt: Format, k: int) -> Tensor:
    """Inverse of `pack_codes`: (n, k), int8 for integer formats, uint8 for dictionary indices."""
    return qdata if fmt.bits == 8 else signed(unpack_bits(qdata, fmt.bits, k), fmt)


def signed(codes: Tensor, fmt: Format) -> Tensor:
    """Unsigned codes as what they mean: int8 of two's complement for integer formats, the indices themselves otherwise."""
    if fmt.kind is not Kind.INTEGER:
        return codes
    sign_bit = 1 << (fmt.bits - 1)  # two's complement: flip the sign bit, then take its weight off
    return ((codes ^ sign_bit).to(torch.int8) - sign_bit).to(torch.int8)
