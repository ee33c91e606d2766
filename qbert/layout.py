"""L2. How codes lie in memory: named layouts with a pack and an unpack, in plain torch.

`Layout.PLAIN` is the only one that is ever written to a file. It is a bit stream: code i of a row occupies bits
i*b ... i*b + b - 1 of that row, counted from the least significant bit of its first byte, and each row starts on a byte.
So int8 is a byte a code, 4-bit codes lie low nibble first (even k in the low nibble), and eight 3-bit codes take three
bytes. The other layouts serve kernels; each is a bijection of PLAIN, so saving a model never depends on where it ran.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import Format, Kind, Scheme

_CODES_PER_WORD = 8  # eight b-bit codes fill exactly b bytes, whatever b is


class Layout(enum.Enum):
    """Where the bits of a weight's codes are."""

    PLAIN = "plain"  # little-endian bit stream along k, rows start on a byte
    BYTES = "bytes"  # one code a byte: int8 for integer formats, uint8 for dictionary indices
    INT8_EXPANDED = "int8_expanded"  # the int8 operand itself: code * group_scale, or codebook[code]


def packed_width(k: int, bits: int) -> int:
    """Bytes that a row of k codes of `bits` bits takes."""
    return (k * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, k), integers in 0 ... 2**bits - 1, to their bit stream (n, ceil(k * bits / 8)) uint8; spare bits are 0."""
    n, k = codes.shape
    words = -(-k // _CODES_PER_WORD)
    padded = torch.zeros(n, words * _CODES_PER_WORD, dtype=torch.int64, device=codes.device)
    padded[:, :k] = codes
    shifts = torch.arange(_CODES_PER_WORD, device=codes.device) * bits
    word = (padded.view(n, words, _CODES_PER_WORD) << shifts).sum(dim=2)  # bits <= 7: fits 56 bits of the int64
    byte_shifts = torch.arange(bits, device=codes.device) * 8
    stream = ((word.unsqueeze(2) >> byte_shifts) & 0xFF).to(torch.uint8)
    return stream.view(n, words * bits)[:, : packed_width(k, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `pack_bits`: bit stream (n, ceil(k * bits / 8)) uint8 to codes (n, k) uint8."""
    n, width = packed.shape
    if width != packed_width(k, bits):  # fewer bytes would read as zeros, more would be left out, both without a word
        raise QBertError(f"{k} codes of {bits} bits take {packed_width(k, bits)} bytes a row, got {width}")
    words = -(-k // _CODES_PER_WORD)
    stream = torch.zeros(n, words * bits, dtype=torch.int64, device=packed.device)
    stream[:, :width] = packed
    byte_shifts = torch.arange(bits, device=packed.device) * 8
    word = (stream.view(n, words, bits) << byte_shifts).sum(dim=2)
    shifts = torch.arange(_CODES_PER_WORD, device=packed.device) * bits
    codes = (word.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return codes.view(n, words * _CODES_PER_WORD)[:, :k].to(torch.uint8).contiguous()


def pack_codes(codes: Tensor, fmt: Format) -> Tensor:
    """Codes (n, k), signed for integer formats and indices for dictionaries, to the PLAIN `qdata`."""
    if fmt.bits == 8:
        return codes.to(torch.int8).contiguous()
    return pack_bits(codes.to(torch.int64) & (fmt.codes - 1), fmt.bits)


def unpack_codes(qdata: Tensor, fmt: Format, k: int) -> Tensor:
    """Inverse of `pack_codes`: (n, k), int8 for integer formats, uint8 for dictionary indices."""
    if fmt.bits == 8:
        return qdata
    codes = unpack_bits(qdata, fmt.bits, k)
    if fmt.kind is not Kind.INTEGER:
        return codes
    sign_bit = 1 << (fmt.bits - 1)  # two's complement: flip the sign bit, then take its weight off
    return ((codes ^ sign_bit).to(torch.int8) - sign_bit).to(torch.int8)


def layouts_of(scheme: Scheme) -> tuple[Layout, ...]:
    """The layouts that a scheme's weight can be in."""
    if scheme.weight.bits == 8:
        return (Layout.PLAIN,)
    if scheme.activation is None:
        return (Layout.PLAIN, Layout.BYTES)
    return (Layout.PLAIN, Layout.BYTES, Layout.INT8_EXPANDED)


def from_plain(tensors: dict[str, Tensor], scheme: Scheme, k: int, layout: Layout) -> dict[str, Tensor]:
    """The same weight in another layout. Only `qdata` changes; the other tensors are passed on, not copied."""
    _check(scheme, layout)
    if layout is Layout.PLAIN:
        return dict(tensors)
    codes = unpack_codes(tensors["qdata"], scheme.weight, k)
    if layout is Layout.INT8_EXPANDED:
        codes = _expand(codes, tensors, scheme)
    return {**tensors, "qdata": codes}


def to_plain(tensors: dict[str, Tensor], scheme: Scheme, layout: Layout) -> dict[str, Tensor]:
    """Inverse of `from_plain`, bit for bit."""
    _check(scheme, layout)
    if layout is Layout.PLAIN:
        return dict(tensors)
    codes = tensors["qdata"]
    if layout is Layout.INT8_EXPANDED:
        codes = _contract(codes, tensors, scheme)
    return {**tensors, "qdata": pack_codes(codes, scheme.weight)}


def _check(scheme: Scheme, layout: Layout) -> None:
    if layout not in layouts_of(scheme):
        allowed = ", ".join(each.value for each in layouts_of(scheme))
        raise QBertError(f"scheme {scheme.name} has no layout {layout.value!r}; allowed: {allowed}")


def _expand(codes: Tensor, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """Codes (n, k) to the int8 operand (n, k) of the integer product."""
    if scheme.has_dictionary:
        return tensors["codebook"][codes.to(torch.int32)]
    scales = (
        tensors["group_scale"].to(torch.int8).repeat_interleave(codes.shape[1] // tensors["group_scale"].shape[1], 1)
    )
    return codes * scales  # |code| * scale <= 127 by W4A8_GROUP_SCALE_MAX


def _contract(operand: Tensor, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """Inverse of `_expand`. Equal centroids share their lowest index (the quantizer uses no other), so it is unique."""
    if scheme.has_dictionary:
        return torch.searchsorted(tensors["codebook"].to(torch.int32), operand.to(torch.int32)).to(torch.uint8)
    scales = (
        tensors["group_scale"].to(torch.int8).repeat_interleave(operand.shape[1] // tensors["group_scale"].shape[1], 1)
    )
    return torch.div(operand, scales, rounding_mode="trunc")
