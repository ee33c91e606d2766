"""Layouts: the documented bit order, and that every layout is a bijection of PLAIN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbert import layout as layouts
from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT2, INT3, INT4, INT8, SCHEMES, Format, Scheme
from qbert.layout import Layout, pack_bits, packed_width, unpack_bits
from qbert.quantizers import quantize
from qbert.testing import random_weight

LAYOUTS_OF_SCHEMES = [
    pytest.param(scheme, each, id=f"{scheme.name}-{each.value}")
    for scheme in SCHEMES.values()
    for each in layouts.layouts_of(scheme)
]


def _packed_by_big_integers(rows: list[list[int]], bits: int) -> list[list[int]]:
    """The documentation as arithmetic: code i is worth 2**(i * bits) in a row's little-endian number."""
    numbers = [sum(code << (i * bits) for i, code in enumerate(row)) for row in rows]
    width = (len(rows[0]) * bits + 7) // 8
    return [list(number.to_bytes(width, "little")) for number in numbers]


@st.composite
def _codes(draw: st.DrawFn) -> tuple[Tensor, int]:
    bits, n, k = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.integers(1, 70))
    values = st.integers(0, (1 << bits) - 1)
    rows = draw(st.lists(st.lists(values, min_size=k, max_size=k), min_size=n, max_size=n))
    return torch.tensor(rows), bits


@settings(max_examples=150, deadline=None)
@given(_codes())
def test_pack_is_the_documented_bit_stream_and_unpack_its_inverse(problem: tuple[Tensor, int]) -> None:
    codes, bits = problem
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == _packed_by_big_integers(codes.tolist(), bits)
    unpacked = unpack_bits(packed, bits, codes.shape[1])
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes.to(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("k", [1, 3, 7, 8, 9, 17, 1023])
def test_round_trip_of_extreme_codes(bits: int, k: int) -> None:
    """All ones and all zeros alternating by row: bits that leak into a neighbour or a spare bit show."""
    top = (1 << bits) - 1
    codes = torch.tensor([[top] * k, [0] * k, [top, 0] * (k // 2) + [top] * (k % 2)])
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, -(-k * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, k), codes.to(torch.uint8))
    assert int(packed[1].max()) == 0
    spare = packed.shape[1] * 8 - k * bits
    assert int(packed[0, -1]) == 0xFF >> spare  # the spare bits of the last byte are zero


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (4, [0x1, 0x2, 0x3], [0x21, 0x03]),  # even k in the low nibble
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),  # eight codes, three bytes
        (3, [7], [0b00000_111]),
        (2, [0, 1, 2, 3, 1], [0b11_10_01_00, 0b01]),
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000001, 0b1]),
        (7, [0x7F, 0x01], [0xFF, 0x00]),  # bit 7 is bit 0 of the second code
        (5, [0b10001, 0b11110], [0b110_10001, 0b11]),
    ],
    ids=["int4", "dict3", "one-code", "int2", "one-bit", "seven-bits", "five-bits"],
)
def test_bytes_written_by_hand(bits: int, codes: list[int], expected: list[int]) -> None:
    assert pack_bits(torch.tensor([codes]), bits).tolist() == [expected]


@pytest.mark.parametrize("fmt", [INT8, INT4, INT3, INT2, DICT3, DICT4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("k", [1, 3, 8, 17])
def test_signed_and_unsigned_codes_round_trip(fmt: Format, k: int) -> None:
    """Every code of the format, the most negative one too, in int8 or uint8 as kernels read it."""
    integer = fmt.name.startswith("int")
    low = -(fmt.codes // 2) if integer else 0
    codes = (torch.arange(fmt.codes * k).view(-1, k) % fmt.codes) + low
    plain = layouts.pack_codes(codes, fmt)
    assert plain.dtype == (torch.int8 if fmt.bits == 8 else torch.uint8)
    assert plain.shape == (fmt.codes, packed_width(k, fmt.bits))
    back = layouts.unpack_codes(plain, fmt, k)
    assert back.dtype == (torch.int8 if integer else torch.uint8)
    assert torch.equal(back.to(torch.int64), codes)


def test_negative_int4_bytes() -> None:
    assert layouts.pack_codes(torch.tensor([[-1, 7, -7, 1]]), INT4).tolist() == [[0x7F, 0x19]]


def test_pack_takes_strided_codes_and_leaves_them() -> None:
    codes = torch.arange(30).view(5, 6).t() % 8
    before = codes.clone()
    assert torch.equal(pack_bits(codes, 3), pack_bits(before.contiguous(), 3))
    assert torch.equal(codes, before)


@pytest.mark.parametrize("n", [0, 1])
def test_packing_of_no_rows(n: int) -> None:
    packed = pack_bits(torch.zeros(n, 17, dtype=torch.int64), 3)
    assert packed.shape == (n, 7)
    assert unpack_bits(packed, 3, 17).shape == (n, 17)


@pytest.mark.parametrize("width", [0, 6, 8], ids=["empty", "short", "long"])
def test_unpack_wants_exactly_the_bytes_of_its_codes(width: int) -> None:
    """A short row would read as codes 0, without a word."""
    with pytest.raises(QBertError, match=f"17 codes of 3 bits take 7 bytes a row, got {width}"):
        unpack_bits(torch.zeros(2, width, dtype=torch.uint8), 3, 17)


@pytest.mark.parametrize(("scheme", "layout"), LAYOUTS_OF_SCHEMES)
@pytest.mark.parametrize("shape", [(1, 128), (17, 256), (5, 129)], ids=str)
def test_every_layout_is_a_bijection_of_plain(scheme: Scheme, layout: Layout, shape: tuple[int, int]) -> None:
    n, k = shape
    if scheme.group_size and k % scheme.group_size:
        k -= 1
    plain = quantize(random_weight(n, k, seed=n), scheme)
    tensors = {name: tensor.clone() for name, tensor in plain.tensors.items()}
    moved = layouts.from_plain(plain.tensors, scheme, k, layout)
    back = layouts.to_plain(moved, scheme, layout)
    assert list(back) == list(moved) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name
        assert torch.equal(plain.tensors[name], tensor), f"{name} was edited in place"
        assert name == "qdata" or moved[name] is plain.tensors[name], f"{name} was copied"


@pytest.mark.parametrize("name", ["w4a8", "w4a8-g32", "w4a16", "gobo3", "gobo4", "gobo3a8", "gobo4a8"])
def test_bytes_layout_holds_the_codes(name: str) -> None:
    scheme = SCHEMES[name]
    plain = quantize(random_weight(3, 128), scheme)
    codes = layouts.from_plain(plain.tensors, scheme, 128, Layout.BYTES)["qdata"]
    stream = [int.from_bytes(bytes(row), "little") for row in plain.tensors["qdata"].tolist()]
    bits, half = scheme.weight_bits, 1 << (scheme.weight_bits - 1)
    expected = torch.tensor([[number >> (i * bits) & (2 * half - 1) for i in range(128)] for number in stream])
    if not scheme.has_dictionary:
        expected = torch.where(expected >= half, expected - 2 * half, expected)
    assert codes.dtype == (torch.uint8 if scheme.has_dictionary else torch.int8)
    assert torch.equal(codes.to(torch.int64), expected)


@pytest.mark.parametrize("name", ["w4a8-g32", "gobo3a8"])
def test_expanded_layout_holds_the_int8_operand(name: str) -> None:
    scheme = SCHEMES[name]
    plain = quantize(random_weight(3, 128), scheme)
    codes = layouts.from_plain(plain.tensors, scheme, 128, Layout.BYTES)["qdata"].to(torch.int64)
    operand = layouts.from_plain(plain.tensors, scheme, 128, Layout.INT8_EXPANDED)["qdata"]
    if scheme.has_dictionary:
        expected = plain.tensors["codebook"].to(torch.int64)[codes]
    else:
        groups = plain.tensors["group_scale"].to(torch.int64)
        expected = torch.stack([codes[:, column] * groups[:, column // 32] for column in range(128)], dim=1)
    assert operand.dtype == torch.int8
    assert torch.equal(operand.to(torch.int64), expected)


@pytest.mark.parametrize("group_scale", [1, 2, 17, 18])
def test_every_int4_code_survives_every_group_scale(group_scale: int) -> None:
    """Division by the group scale gives each code back, and no product leaves int8."""
    codes = torch.arange(-7, 8).repeat(5)[:64].view(1, 64)
    scheme = SCHEMES["w4a8"]
    tensors = {
        "qdata": layouts.pack_codes(codes, INT4),
        "scale": torch.ones(1),
        "group_scale": torch.full((1, 1), group_scale, dtype=torch.uint8),
    }
    moved = layouts.from_plain(tensors, scheme, 64, Layout.INT8_EXPANDED)
    assert torch.equal(moved["qdata"].to(torch.int64), codes * group_scale)
    assert torch.equal(layouts.to_plain(moved, scheme, Layout.INT8_EXPANDED)["qdata"], tensors["qdata"])


@pytest.mark.parametrize(
    "codebook",
    [
        [-127, -80, -80, -5, 0, 0, 0, 127],
        [0] * 8,
        [-3, -2, -1, 0, 1, 2, 3, 4],
    ],
    ids=["duplicates", "constant", "distinct"],
)
def test_expanded_dictionary_packs_again_by_the_lowest_code(codebook: list[int]) -> None:
    scheme = SCHEMES["gobo3a8"]
    canonical = [codebook.index(value) for value in codebook]
    tensors = {
        "qdata": layouts.pack_codes(torch.tensor([canonical]), DICT3),
        "codebook": torch.tensor(codebook, dtype=torch.int8),
    }
    moved = layouts.from_plain(tensors, scheme, 8, Layout.INT8_EXPANDED)
    assert moved["qdata"].tolist() == [codebook]
    assert torch.equal(layouts.to_plain(moved, scheme, Layout.INT8_EXPANDED)["qdata"], tensors["qdata"])


@pytest.mark.parametrize(
    ("name", "layout"), [("w8a8", Layout.BYTES), ("w8", Layout.INT8_EXPANDED), ("w4a16", Layout.INT8_EXPANDED)]
)
def test_a_layout_that_a_scheme_has_not_is_an_error(name: str, layout: Layout) -> None:
    for move in (
        lambda: layouts.from_plain({}, SCHEMES[name], 8, layout),
        lambda: layouts.to_plain({}, SCHEMES[name], layout),
    ):
        with pytest.raises(QBertError, match=f"scheme {name} has no layout '{layout.value}'; allowed: plain"):
            move()
