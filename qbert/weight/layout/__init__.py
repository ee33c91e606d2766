"""How codes lie in memory: named layouts with a pack and an unpack, in plain torch.

`Layout.PLAIN` is what files hold, but for many zeros (`weight.zeros`). It is a bit stream: code i of a row occupies
bits i*b ... i*b + b - 1 of that row, counted from the least significant bit of its first byte, and each row starts on a byte.
So int8 is a byte a code, 4-bit codes lie low nibble first (even k in the low nibble), and eight 3-bit codes take three
bytes. The other layouts serve kernels; each is a bijection of PLAIN, so saving a model never depends on where it ran.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT4, INT8, EmulatedScheme, Format, Kind, Role, Scheme
from qbert.weight.layout import fragments, panels, rows, words
from qbert.weight.layout.bits import pack_bits, pack_codes, packed_width, signed, unpack_bits, unpack_codes

__all__ = [
    "FRAGMENT_LAYOUTS", "PADDED_ROWS", "PANEL_LAYOUTS", "Layout", "from_plain", "layouts_for", "layouts_of", "look_up",
    "pack_bits", "pack_codes", "packed_width", "qdata_shape", "qdata_type", "read_codes", "read_rows", "rows_together",
    "to_plain", "unpack_bits", "unpack_codes",
]  # fmt: skip


class Layout(enum.Enum):
    """Where the bits of a weight's codes are."""

    PLAIN = "plain"  # little-endian bit stream along k, rows start on a byte
    BYTES = "bytes"  # one code a byte: int8 for integer formats, uint8 for dictionary indices
    INT8_EXPANDED = "int8_expanded"  # the int8 operand itself: code * group_scale, or codebook[code]
    INT8_PANELS = "int8_panels"  # 16 output channels a panel, four input channels of each a row, and their sums
    INT4_PANELS = "int4_panels"  # the same with eight input channels a row: four low nibbles, four high ones
    INT3_PANELS = "int3_panels"  # the same with 32 input channels in three rows: two planes of two bits, one of one
    INT8_ROWS = "int8_rows"  # PLAIN with rows padded to whole 16 bytes
    NIBBLE_HALVES = "nibble_halves"  # a nibble a code; a byte holds codes 64 input channels apart
    SELECT_HALVES = "select_halves"  # a nibble a code; a word holds two selectors of `prmt`, 64 input channels apart
    DICT3_WORDS = "dict3_words"  # three bits a code; three words hold six selectors of `prmt` and the bits of two more
    FRAGMENTS_S8 = "fragments_s8"  # in the order of the registers of `wgmma`'s int8 operand
    FRAGMENTS_F16 = "fragments_f16"  # in the order of the registers of its 16-bit operand
    BITMAP = "bitmap"  # in files of weights with many zeros: the other codes, and a bit for each place (`weight.zeros`)
    TWO_OF_FOUR = "2:4"  # the same where of every four neighbours two are zero: the others, and their places


PANEL_LAYOUTS = (Layout.INT8_PANELS, Layout.INT4_PANELS, Layout.INT3_PANELS)
FRAGMENT_LAYOUTS = (Layout.FRAGMENTS_S8, Layout.FRAGMENTS_F16)
# Layouts whose `qdata` does not show how many rows the matrix has, nor one row by itself.
PADDED_ROWS = frozenset({*PANEL_LAYOUTS, *FRAGMENT_LAYOUTS})
# Look-ups read single rows of these; tables that no linear can be tied to have no other layouts.
_TABLE_LAYOUTS = (Layout.PLAIN, Layout.BYTES)
_PANELS_OF_BITS = {8: Layout.INT8_PANELS, 4: Layout.INT4_PANELS, 3: Layout.INT3_PANELS}
_ROWS_OF_FORMAT = {
    INT8: (Layout.INT8_ROWS,),
    INT4: (Layout.NIBBLE_HALVES,),
    DICT4: (Layout.SELECT_HALVES,),
    DICT3: (Layout.SELECT_HALVES, Layout.DICT3_WORDS),
}
_ROW_LAYOUTS = frozenset({Layout.INT8_ROWS, Layout.NIBBLE_HALVES, Layout.SELECT_HALVES})
# Layouts that only the weight-only kernel reads: what is to become int8 has no time for three bits.
_FLOAT_LAYOUTS = frozenset({Layout.DICT3_WORDS})
_OPERANDS = {
    Layout.FRAGMENTS_S8: fragments.Operand.INT8,
    Layout.FRAGMENTS_F16: fragments.Operand.FLOAT16,
}
_PACK_INT8: dict[Layout, Callable[[Tensor], Tensor]] = {
    Layout.INT8_PANELS: panels.pack_int8,
    Layout.INT8_ROWS: rows.pack_int8,
}
# Layouts of smaller codes, from and to unsigned codes (n, k).
_PACK: dict[Layout, Callable[[Tensor], Tensor]] = {
    Layout.INT4_PANELS: panels.pack_int4,
    Layout.INT3_PANELS: panels.pack_int3,
    Layout.NIBBLE_HALVES: rows.pack_nibble_halves,
    Layout.SELECT_HALVES: rows.pack_select_halves,
    Layout.DICT3_WORDS: words.pack_dict3,
}
_UNPACK: dict[Layout, Callable[[Tensor, int, int], Tensor]] = {
    Layout.INT4_PANELS: panels.unpack_int4,
    Layout.INT3_PANELS: panels.unpack_int3,
    Layout.NIBBLE_HALVES: lambda qdata, n, k: rows.unpack_nibble_halves(qdata, k),
    Layout.SELECT_HALVES: lambda qdata, n, k: rows.unpack_select_halves(qdata, k),
    Layout.DICT3_WORDS: lambda qdata, n, k: words.unpack_dict3(qdata, k),
}


def layouts_for(fmt: Format, int8_activations: bool) -> tuple[Layout, ...]:
    """The layouts that a linear's weight codes can be in."""
    unpacked = () if fmt.bits == 8 else (Layout.BYTES, Layout.INT8_EXPANDED) if int8_activations else (Layout.BYTES,)
    if fmt not in _ROWS_OF_FORMAT:  # no compiled kernel reads such codes
        return (Layout.PLAIN, *unpacked)
    in_rows = (each for each in _ROWS_OF_FORMAT[fmt] if not int8_activations or each not in _FLOAT_LAYOUTS)
    return (Layout.PLAIN, *unpacked, *in_rows, *_fragments_for(fmt, int8_activations), _PANELS_OF_BITS[fmt.bits])


def _fragments_for(fmt: Format, int8_activations: bool) -> tuple[Layout, ...]:
    """An int8 weight under int8 activations has none: the copy engine brings it to `wgmma` through shared memory as it is."""
    if not int8_activations:
        return (Layout.FRAGMENTS_F16,)
    return () if fmt == INT8 else (Layout.FRAGMENTS_S8,)


def layouts_of(scheme: Scheme) -> tuple[Layout, ...]:
    """The layouts that a scheme's weight can be in."""
    if isinstance(scheme, EmulatedScheme):  # no kernel reads it
        return (Layout.PLAIN,)
    layouts = layouts_for(scheme.weight, scheme.activation is not None)
    if Role.LINEAR in scheme.roles:
        return layouts
    return tuple(each for each in layouts if each in _TABLE_LAYOUTS)


def qdata_shape(layout: Layout, fmt: Format, n: int, k: int) -> tuple[int, ...]:
    """Shape that `qdata` of an (n, k) matrix must have."""
    if layout is Layout.PLAIN:
        return n, packed_width(k, fmt.bits)
    if layout in _ROW_LAYOUTS:
        return n, rows.row_bytes(fmt.bits, k)
    if layout is Layout.DICT3_WORDS:
        return n, words.row_bytes(k)
    if layout in _OPERANDS:
        return fragments.fragments_shape(fmt, n, k)
    return panels.panel_shape(fmt.bits, n, k) if layout in PANEL_LAYOUTS else (n, k)


def qdata_type(layout: Layout, fmt: Format) -> torch.dtype:
    """Type that `qdata` must have: int8 where a byte is a signed value, uint8 where it is an index or packed bits."""
    holds_values = layout is Layout.INT8_EXPANDED or (layout is Layout.BYTES and fmt.kind is Kind.INTEGER)
    return torch.int8 if holds_values or fmt.bits == 8 else torch.uint8


def rows_together(layout: Layout) -> int:
    """Rows that lie in one piece of memory: matrices of multiples of so many stack by concatenation of their `qdata`."""
    if layout in FRAGMENT_LAYOUTS:
        return fragments.ROWS
    return panels.LANES if layout in PANEL_LAYOUTS else 1


def read_codes(qdata: Tensor, fmt: Format, n: int, k: int, layout: Layout) -> Tensor:
    """Codes (n, k) of any layout that holds codes: int8 for integer formats, uint8 for dictionary indices."""
    if layout is Layout.PLAIN:
        return unpack_codes(qdata, fmt, k)
    if layout is Layout.INT8_PANELS:
        return panels.unpack_int8(qdata, n, k)
    if layout is Layout.INT8_ROWS:
        return rows.unpack_int8(qdata, k)
    if layout in _OPERANDS:
        return signed(fragments.unpack(qdata, fmt, n, k, _OPERANDS[layout]), fmt)
    if layout in _UNPACK:
        return signed(_UNPACK[layout](qdata, n, k), fmt)
    return qdata


def read_rows(qdata: Tensor, chosen: Tensor, fmt: Format, k: int, layout: Layout) -> Tensor:
    """Codes (m, k) of the rows `chosen` (m,) int64, as `read_codes` gives those of all rows."""
    if layout in FRAGMENT_LAYOUTS:  # made for products, and no table lies so: nothing looks rows up often
        return read_codes(qdata, fmt, qdata.shape[0] * fragments.ROWS, k, layout)[chosen]
    taken = panels.select_rows(qdata, chosen) if layout in PANEL_LAYOUTS else qdata[chosen]
    return read_codes(taken, fmt, chosen.numel(), k, layout)


def from_plain(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], layout: Layout) -> dict[str, Tensor]:
    """The same (n, k) weight in another layout. Only `qdata` changes; the other tensors are passed on, not copied."""
    _check(scheme, layout)
    if layout is Layout.PLAIN:
        return dict(tensors)
    codes = unpack_codes(tensors["qdata"], scheme.weight, shape[1])
    if layout is Layout.INT8_EXPANDED:
        codes = _expand(codes, tensors, scheme)
    elif layout in _PACK_INT8:
        codes = _PACK_INT8[layout](codes)
    elif layout in _PACK:
        codes = _PACK[layout](_unsigned(codes, scheme.weight))
    elif layout in _OPERANDS:
        codes = fragments.pack(_unsigned(codes, scheme.weight), scheme.weight, _OPERANDS[layout])
    return {**tensors, "qdata": codes}


def to_plain(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], layout: Layout) -> dict[str, Tensor]:
    """Inverse of `from_plain`, bit for bit."""
    _check(scheme, layout)
    if layout is Layout.PLAIN:
        return dict(tensors)
    codes = read_codes(tensors["qdata"], scheme.weight, *shape, layout)
    if layout is Layout.INT8_EXPANDED:
        codes = _contract(codes, tensors, scheme)
    return {**tensors, "qdata": pack_codes(codes, scheme.weight)}


def look_up(codebook: Tensor, codes: Tensor) -> Tensor:
    """codebook[code] (n, k) of dictionary codes (n, k).

    Args:
        codebook: (2**b,), or (m, 2**b) of m matrices of n / m rows each, stacked: row r has dictionary r * m // n.
    """
    index = _by_matrix(codebook, codes).to(torch.int32)
    starts = torch.arange(index.shape[0], dtype=torch.int32, device=codes.device) * codebook.shape[-1]
    return codebook.reshape(-1).index_select(0, (index + starts[:, None]).view(-1)).view(codes.shape)


def _unsigned(codes: Tensor, fmt: Format) -> Tensor:
    """Codes as their bits; those of int8 are the values themselves."""
    return codes if fmt.bits == 8 else codes.view(torch.uint8) & (fmt.codes - 1)


def _by_matrix(codebook: Tensor, codes: Tensor) -> Tensor:
    """(n, k) to (m, n / m * k): the codes of each dictionary."""
    m = 1 if codebook.dim() == 1 else codebook.shape[0]
    if codes.shape[0] % m:
        raise QBertError(f"{codes.shape[0]} rows are not {m} matrices of as many rows each")
    return codes.reshape(m, codes.numel() // m)


def _check(scheme: Scheme, layout: Layout) -> None:
    if layout not in layouts_of(scheme):
        allowed = ", ".join(each.value for each in layouts_of(scheme))
        raise QBertError(f"scheme {scheme.name} has no layout {layout.value!r}; allowed: {allowed}")


def _expand(codes: Tensor, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """Codes (n, k) to the int8 operand (n, k) of the integer product."""
    if scheme.has_dictionary:
        return look_up(tensors["codebook"], codes)
    scales = _group_scales(tensors, codes.shape[1])
    return codes if scales is None else codes * scales  # |code| * scale <= 127 by W4A8_GROUP_SCALE_MAX


def _contract(operand: Tensor, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """Inverse of `_expand`. Equal centroids share their lowest index (the quantizer uses no other), so it is unique."""
    if scheme.has_dictionary:
        codebook = tensors["codebook"].to(torch.int32)
        codes = torch.searchsorted(codebook.view(-1, codebook.shape[-1]), _by_matrix(codebook, operand).to(torch.int32))
        return codes.to(torch.uint8).view(operand.shape)
    scales = _group_scales(tensors, operand.shape[1])
    return operand if scales is None else torch.div(operand, scales, rounding_mode="trunc")


def _group_scales(tensors: dict[str, Tensor], k: int) -> Tensor | None:
    """(n, k) int8 that codes are multiplied with; None where a row has one scale alone."""
    scales = tensors.get("group_scale")
    return None if scales is None else scales.to(torch.int8).repeat_interleave(k // scales.shape[1], 1)
