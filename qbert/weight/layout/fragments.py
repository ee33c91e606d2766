"""Fragments: how the compiled GPU kernels want codes to lie: in the order in which a thread's registers take them.

`wgmma` of Hopper takes its A operand from registers: a thread of a warp group (128 threads) holds fixed places of it. A weight
that is stored in that order needs no shuffle on its way: a thread loads 16 bytes, expands them in place and multiplies.

The matrix, n padded to a multiple of 64 and k to one of 128 with code bits 0, is cut into blocks of 64 rows x 128 columns, each
stored whole: (n / 64, k / 128, block bytes). Thread w * 32 + g * 4 + c (warp w, g < 8, c < 4) of a warp group has 64 codes of a
block, 16 quads of 4, all of rows 16 w + g and 16 w + g + 8:

    int8 operand    quad 4 s + r holds row 16 w + g + 8 (r % 2), columns 32 s + 16 (r / 2) + 4 c ... + 3: register r of the
                    s-th product of 32 columns
    16-bit operand  quad 2 s + h holds row 16 w + g + 8 h, columns 16 s + 2 c, + 1, + 8, + 9: the pairs of registers h and h + 2
                    of the s-th product of 16 columns

and packs them into 32-bit words (little-endian):

    dict4           word i: the codes of quads 2 i and 2 i + 1, a nibble each from the lowest on: two selectors of PTX's `prmt`
    dict3           three words for eight quads, as `words` makes them of 32 codes
    int4            word i: byte b has one code of quad 2 i in its low nibble and the same of quad 2 i + 1 in its high one: code
                    b of an int8 operand; code 0, 2, 1, 3 of a 16-bit one, so that two halves of a word are neighbours
    int8            word i: the codes of quad i

A block is pieces: the first four words of all threads, the next four and so on, then of dict3 the last two. Loads of a piece
are 16 (8) bytes a thread, neighbours beside each other.

Functions take and give unsigned codes (n, k) uint8, except for int8, whose code is the value itself.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from qbert.formats import DICT3, DICT4, INT4, INT8, Format
from qbert.weight.layout import words

ROWS, COLUMNS = 64, 128  # of a block
_THREADS = 128
_QUADS, _QUAD = 16, 4  # quads of a thread, codes of a quad
_PIECE = 16  # bytes that a thread loads at once


class Operand(enum.Enum):
    """What the codes become in registers: which `wgmma` reads them."""

    INT8 = "int8"
    FLOAT16 = "float16"  # bfloat16 too


# What a column of a block is made of: (s, r / 2, c, code of the quad), or (s, half of the quad, c, code of the half).
_COLUMN = {Operand.INT8: (4, 2, 4, 4), Operand.FLOAT16: (8, 2, 4, 2)}
# From (strip, warp, row half, g, block, *column) to (strip, block, warp, g, c, quad, code of it).
_ORDER = {Operand.INT8: (0, 4, 1, 3, 7, 5, 6, 2, 8), Operand.FLOAT16: (0, 4, 1, 3, 7, 5, 2, 6, 8)}
_INT4_CODES = {Operand.INT8: (0, 1, 2, 3), Operand.FLOAT16: (0, 2, 1, 3)}  # its own inverse


def block_bytes(fmt: Format) -> int:
    """Bytes of a block of 64 x 128 codes."""
    return ROWS * COLUMNS * fmt.bits // 8


def fragments_shape(fmt: Format, n: int, k: int) -> tuple[int, int, int]:
    """(strips of 64 rows, blocks of 128 columns, bytes of a block) of an (n, k) matrix."""
    return -(-n // ROWS), -(-k // COLUMNS), block_bytes(fmt)


def pack(codes: Tensor, fmt: Format, operand: Operand) -> Tensor:
    """(n, k) to `fragments_shape`, uint8, or int8 of int8."""
    quads = _quads(codes.view(torch.uint8), operand)
    packed = _to_pieces(_PACK[fmt](quads, operand))
    return packed.view(torch.int8) if fmt == INT8 else packed


def unpack(fragments: Tensor, fmt: Format, n: int, k: int, operand: Operand) -> Tensor:
    """Inverse of `pack`."""
    quads = _UNPACK[fmt](_from_pieces(fragments.view(torch.uint8)), operand)
    codes = _unquads(quads, operand)[:n, :k].contiguous()
    return codes.view(torch.int8) if fmt == INT8 else codes


# ---- a matrix and the quads of its threads --------------------------------------------------------------------------


def _quads(codes: Tensor, operand: Operand) -> Tensor:
    """(n, k) to (strips, blocks, threads, quads, codes of a quad), zeros where there is no row or column."""
    n, k = codes.shape
    strips, blocks = -(-n // ROWS), -(-k // COLUMNS)
    padded = torch.nn.functional.pad(codes, (0, blocks * COLUMNS - k, 0, strips * ROWS - n))
    places = padded.view(strips, 4, 2, 8, blocks, *_COLUMN[operand])
    return places.permute(_ORDER[operand]).reshape(strips, blocks, _THREADS, _QUADS, _QUAD)


def _unquads(quads: Tensor, operand: Operand) -> Tensor:
    """Inverse of `_quads`, padding included."""
    strips, blocks = quads.shape[:2]
    places = (strips, 4, 2, 8, blocks, *_COLUMN[operand])
    order = _ORDER[operand]
    inverse = [order.index(axis) for axis in range(len(order))]
    ordered = quads.reshape([places[axis] for axis in order])
    return ordered.permute(inverse).reshape(strips * ROWS, blocks * COLUMNS)


# ---- quads and the bytes of a thread's words ------------------------------------------------------------------------


def _pack_int8(quads: Tensor, operand: Operand) -> Tensor:
    return quads.flatten(3)


def _unpack_int8(thread: Tensor, operand: Operand) -> Tensor:
    return thread.unflatten(3, (_QUADS, _QUAD))


def _pack_int4(quads: Tensor, operand: Operand) -> Tensor:
    low, high = quads[..., _INT4_CODES[operand]].unflatten(3, (-1, 2)).unbind(4)
    return (low | high << 4).flatten(3)


def _unpack_int4(thread: Tensor, operand: Operand) -> Tensor:
    bytes_of_words = thread.unflatten(3, (-1, _QUAD))
    quads = torch.stack((bytes_of_words & 0xF, bytes_of_words >> 4), dim=4).flatten(3, 4)
    return quads[..., _INT4_CODES[operand]]


def _pack_dict4(quads: Tensor, operand: Operand) -> Tensor:
    return (quads[..., 0::2] | quads[..., 1::2] << 4).flatten(3)


def _unpack_dict4(thread: Tensor, operand: Operand) -> Tensor:
    return torch.stack((thread & 0xF, thread >> 4), dim=4).flatten(3).unflatten(3, (_QUADS, _QUAD))


def _pack_dict3(quads: Tensor, operand: Operand) -> Tensor:
    return words.pack_runs(quads.flatten(3)).flatten(3)


def _unpack_dict3(thread: Tensor, operand: Operand) -> Tensor:
    runs = thread.unflatten(3, (-1, words.PLANES, words.WORD_BYTES))
    return words.unpack_runs(runs).unflatten(3, (_QUADS, _QUAD))


_PACK = {INT8: _pack_int8, INT4: _pack_int4, DICT4: _pack_dict4, DICT3: _pack_dict3}
_UNPACK = {INT8: _unpack_int8, INT4: _unpack_int4, DICT4: _unpack_dict4, DICT3: _unpack_dict3}


# ---- a thread's bytes and the pieces of a block ---------------------------------------------------------------------


def _to_pieces(threads: Tensor) -> Tensor:
    """(strips, blocks, threads, bytes) to (strips, blocks, block bytes)."""
    return torch.cat([piece.flatten(2) for piece in threads.split(_PIECE, dim=3)], dim=2)


def _from_pieces(fragments: Tensor) -> Tensor:
    """Inverse of `_to_pieces`."""
    pieces = fragments.split(_PIECE * _THREADS, dim=2)
    return torch.cat([piece.unflatten(2, (_THREADS, -1)) for piece in pieces], dim=3)
