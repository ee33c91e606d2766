"""Layouts: the documented bit order, and that every layout is a bijection of PLAIN."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT2, INT3, INT4, INT8, SCHEMES, Format, Role, Scheme
from qbert.quantizers import quantize
from qbert.testing import random_weight
from qbert.weight import layout as layouts
from qbert.weight.layout import Layout, fragments, pack_bits, packed_width, panels, unpack_bits, words

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
def test_a_copied_scheme_lies_in_the_same_layouts(scheme: Scheme, layout: Layout) -> None:
    """`copy.deepcopy` of a model copies schemes and formats too."""
    copied = copy.deepcopy(scheme)
    assert copied.weight is not scheme.weight
    assert layouts.layouts_of(copied) == layouts.layouts_of(scheme)
    tensors = quantize(random_weight(17, 128), scheme).tensors
    expected, found = (layouts.from_plain(tensors, each, (17, 128), layout)["qdata"] for each in (scheme, copied))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    back = layouts.to_plain({**tensors, "qdata": found}, copied, (17, 128), layout)["qdata"]
    assert back.dtype == tensors["qdata"].dtype
    assert torch.equal(back, tensors["qdata"])


@pytest.mark.parametrize(("scheme", "layout"), LAYOUTS_OF_SCHEMES)
@pytest.mark.parametrize("shape", [(1, 128), (17, 256), (5, 129), (16, 128), (33, 384)], ids=str)
def test_every_layout_is_a_bijection_of_plain(scheme: Scheme, layout: Layout, shape: tuple[int, int]) -> None:
    n, k = shape
    if scheme.group_size and k % scheme.group_size:
        k -= 1
    plain = quantize(random_weight(n, k, seed=n), scheme)
    tensors = {name: tensor.clone() for name, tensor in plain.tensors.items()}
    moved = layouts.from_plain(plain.tensors, scheme, (n, k), layout)
    back = layouts.to_plain(moved, scheme, (n, k), layout)
    assert list(back) == list(moved) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name
        assert torch.equal(plain.tensors[name], tensor), f"{name} was edited in place"
        assert name == "qdata" or moved[name] is plain.tensors[name], f"{name} was copied"
    assert moved["qdata"].shape == layouts.qdata_shape(layout, scheme.weight, n, k)
    assert moved["qdata"].dtype == layouts.qdata_type(layout, scheme.weight)
    assert moved["qdata"].is_contiguous()


@pytest.mark.parametrize("name", ["w4a8", "w4a8-g32", "w4a16", "gobo3", "gobo4", "gobo3a8", "gobo4a8"])
def test_bytes_layout_holds_the_codes(name: str) -> None:
    scheme = SCHEMES[name]
    plain = quantize(random_weight(3, 128), scheme)
    codes = layouts.from_plain(plain.tensors, scheme, (3, 128), Layout.BYTES)["qdata"]
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
    codes = layouts.from_plain(plain.tensors, scheme, (3, 128), Layout.BYTES)["qdata"].to(torch.int64)
    operand = layouts.from_plain(plain.tensors, scheme, (3, 128), Layout.INT8_EXPANDED)["qdata"]
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
    moved = layouts.from_plain(tensors, scheme, (1, 64), Layout.INT8_EXPANDED)
    assert torch.equal(moved["qdata"].to(torch.int64), codes * group_scale)
    assert torch.equal(layouts.to_plain(moved, scheme, (1, 64), Layout.INT8_EXPANDED)["qdata"], tensors["qdata"])


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
    moved = layouts.from_plain(tensors, scheme, (1, 8), Layout.INT8_EXPANDED)
    assert moved["qdata"].tolist() == [codebook]
    assert torch.equal(layouts.to_plain(moved, scheme, (1, 8), Layout.INT8_EXPANDED)["qdata"], tensors["qdata"])


@pytest.mark.parametrize(
    ("name", "layout"), [("w8a8", Layout.BYTES), ("w8", Layout.INT8_EXPANDED), ("w4a16", Layout.INT8_EXPANDED)]
)
def test_a_layout_that_a_scheme_has_not_is_an_error(name: str, layout: Layout) -> None:
    for move in (
        lambda: layouts.from_plain({}, SCHEMES[name], (1, 8), layout),
        lambda: layouts.to_plain({}, SCHEMES[name], (1, 8), layout),
    ):
        with pytest.raises(QBertError, match=f"scheme {name} has no layout '{layout.value}'; allowed: plain"):
            move()


# ---- panels ---------------------------------------------------------------------------------------------------------

PACK = {8: panels.pack_int8, 4: panels.pack_int4, 3: panels.pack_int3}
UNPACK = {8: panels.unpack_int8, 4: panels.unpack_int4, 3: panels.unpack_int3}
BITS = pytest.mark.parametrize("bits", list(PACK))


def _random_codes(bits: int, n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + k)
    low, high = (-128, 128) if bits == 8 else (0, 1 << bits)
    return torch.randint(low, high, (n, k), generator=generator).to(torch.int8 if bits == 8 else torch.uint8)


def _code_at(packed: Tensor, bits: int, row: int, column: int) -> int:
    """The documentation as arithmetic: where the code of one output and one input channel lies."""
    panel, byte, quad = row // 16, row % 16 * 4 + column % 4, column // 4
    if bits == 8:
        return int(packed[panel, quad, byte])
    if bits == 4:
        return int(packed[panel, quad // 2, byte]) >> (4 * (quad % 2)) & 15
    of_row, j = packed[panel, quad // 8, :, byte].tolist(), quad % 8
    return (of_row[j // 4] >> (2 * (j % 4)) & 3) | (of_row[2] >> j & 1) << 2


@BITS
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("k", [0, 1, 3, 4, 5, 31, 32, 33, 63, 64, 65, 100, 768])
def test_panels_round_trip(bits: int, n: int, k: int) -> None:
    codes = _random_codes(bits, n, k)
    before = codes.clone()
    packed = PACK[bits](codes)
    padded = -(-k // 64) * 64
    row = {8: (padded // 4 + 1, 64), 4: (padded // 8, 64), 3: (padded // 32, 3, 64)}[bits]
    assert packed.shape == (-(-n // 16), *row)
    assert packed.dtype == codes.dtype
    assert packed.is_contiguous()
    assert torch.equal(UNPACK[bits](packed, n, k), before)
    assert torch.equal(codes, before)


@st.composite
def _panel_problem(draw: st.DrawFn) -> tuple[int, Tensor, list[int]]:
    bits, n, k = draw(st.sampled_from(list(PACK))), draw(st.integers(1, 40)), draw(st.integers(1, 200))
    rows = draw(st.lists(st.integers(0, n - 1), max_size=40))
    return bits, _random_codes(bits, n, k), rows


@settings(max_examples=100, deadline=None)
@given(_panel_problem())
def test_panels_hold_every_code_where_documented_and_zeros_elsewhere(problem: tuple[int, Tensor, list[int]]) -> None:
    bits, codes, rows = problem
    (n, k), packed = codes.shape, PACK[bits](codes)
    last_row, last_column = packed.shape[0] * 16, -(-k // 64) * 64
    places = {(row, column) for row in {0, n // 2, n - 1} for column in {0, k // 3, k // 2, k - 1}}
    for row, column in places:
        assert _code_at(packed, bits, row, column) == int(codes[row, column])
    everything = UNPACK[bits](packed, last_row, last_column)
    assert not everything[n:].any()
    assert not everything[:, k:].any()
    chosen = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(panels.select_rows(packed, chosen), PACK[bits](codes[chosen]))


@BITS
def test_codes_share_no_bit_and_leave_none_unused(bits: int) -> None:
    n, k = 32, 64
    seen = torch.zeros(panels.panel_shape(bits, n, k), dtype=torch.int64)
    for row, column in itertools.product(range(n), range(k)):
        codes = torch.zeros(n, k, dtype=torch.int8 if bits == 8 else torch.uint8)
        codes[row, column] = -1 if bits == 8 else (1 << bits) - 1
        changed = PACK[bits](codes).to(torch.int64) & 0xFF
        if bits == 8:
            changed[:, -1] = 0  # the sums
        assert sum(value.bit_count() for value in changed[changed > 0].tolist()) == bits
        assert not (seen & changed).any()
        seen |= changed
    assert bool((seen[:, :-1] == 0xFF if bits == 8 else seen == 0xFF).all())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 65), (33, 768), (3, 0)])
def test_the_last_row_of_int8_panels_holds_the_sums(n: int, k: int) -> None:
    values = _random_codes(8, n, k)
    values[0] = -128
    packed = PACK[8](values)
    stored = packed[:, -1].contiguous().numpy().view("<i4").reshape(-1).tolist()
    assert stored[:n] == values.to(torch.int64).sum(dim=1).tolist()
    assert not any(stored[n:])


def test_int4_and_int3_panels_written_by_hand() -> None:
    codes = torch.arange(64, dtype=torch.uint8)[None] % 7 + 1
    int4 = PACK[4](codes)
    assert int4[0, 0, :4].tolist() == [0x51, 0x62, 0x73, 0x14]  # k = 0 ... 3 low, k = 4 ... 7 high
    assert int4[0, 1, 0].item() == 0x62  # k = 8, k = 12
    int3 = PACK[3](codes)
    of_k = [1, 5, 2, 6, 3, 7, 4, 1]  # codes of k = 0, 4, 8 ... 28
    assert int3[0, 0, 0, 0].item() == 0b10_10_01_01
    assert int3[0, 0, 1, 0].item() == 0b01_00_11_11
    assert int3[0, 0, 2, 0].item() == sum((code >> 2) << j for j, code in enumerate(of_k))


@pytest.mark.parametrize("name", ["w4a8", "w4a16"])
def test_panels_of_negative_int4_codes(name: str) -> None:
    """Two's complement nibbles, and back to signed codes."""
    scheme = SCHEMES[name]
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(4)[None]
    tensors = {"qdata": layouts.pack_codes(codes, INT4)}
    moved = layouts.from_plain(tensors, scheme, (1, 64), Layout.INT4_PANELS)["qdata"]
    assert moved[0, 0, :4].tolist() == [0xC8, 0xD9, 0xEA, 0xFB]
    assert torch.equal(layouts.read_codes(moved, INT4, 1, 64, Layout.INT4_PANELS), codes)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_linears_have_the_panels_of_their_bits(scheme: Scheme) -> None:
    expected = {8: Layout.INT8_PANELS, 4: Layout.INT4_PANELS, 3: Layout.INT3_PANELS}[scheme.weight_bits]
    found = set(layouts.layouts_of(scheme)) & set(layouts.PANEL_LAYOUTS)
    assert found == ({expected} if Role.LINEAR in scheme.roles else set())


@pytest.mark.parametrize(("scheme", "layout"), LAYOUTS_OF_SCHEMES)
def test_rows_can_be_taken_out_of_every_layout(scheme: Scheme, layout: Layout) -> None:
    weight = quantize(random_weight(20, 128), scheme).to_layout(layout)
    rows = torch.tensor([19, 0, 7, 7, 16])
    fmt = INT8 if layout is Layout.INT8_EXPANDED else scheme.weight
    whole = layouts.read_codes(weight.tensors["qdata"], fmt, 20, 128, layout)
    assert torch.equal(layouts.read_rows(weight.tensors["qdata"], rows, fmt, 128, layout), whole[rows])


# ---- words ----------------------------------------------------------------------------------------------------------


def _dict3_at(packed: Tensor, row: int, column: int) -> int:
    """The documentation of `layout.words` as arithmetic."""
    planes = packed[row].view(torch.int32).view(3, -1).tolist()
    word, eight, j = column // 32, column // 8 % 4, column % 8
    if eight < 3:
        return planes[eight][word] >> (4 * j) & 7
    return sum((planes[p][word] >> (4 * j + 3) & 1) << p for p in range(3))


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("k", [0, 1, 8, 31, 127, 128, 129, 384, 768, 1023])
def test_words_hold_every_code_where_documented_and_zeros_elsewhere(n: int, k: int) -> None:
    codes = _random_codes(3, n, k)
    before = codes.clone()
    packed = words.pack_dict3(codes)
    padded = -(-k // 128) * 128
    assert packed.shape == (n, words.row_bytes(k)) == (n, 3 * padded // 8)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert torch.equal(words.unpack_dict3(packed, k), before)
    assert torch.equal(codes, before)
    assert not words.unpack_dict3(packed, padded)[:, k:].any()
    for row, column in {(0, 0), (n // 2, k // 3), (n - 1, k - 1)} if n and k else ():
        assert _dict3_at(packed, row, column) == int(codes[row, column])


def test_codes_in_words_share_no_bit_and_leave_none_unused() -> None:
    seen = torch.zeros(words.row_bytes(128), dtype=torch.int64)
    for column in range(128):
        codes = torch.zeros(1, 128, dtype=torch.uint8)
        codes[0, column] = 7
        changed = words.pack_dict3(codes)[0].to(torch.int64)
        assert sum(value.bit_count() for value in changed.tolist()) == 3
        assert not (seen & changed).any()
        seen |= changed
    assert bool((seen == 0xFF).all())


def test_words_written_by_hand() -> None:
    codes = torch.tensor([[1, 2, *[0] * 6, 3, *[0] * 7, *[0] * 7, 7, 4, 1, *[0] * 5, 6]], dtype=torch.uint8)
    found = [word & 0xFFFF_FFFF for word in words.pack_dict3(codes).view(torch.int32).view(3, -1)[:, 0].tolist()]
    assert found == [
        0x0000_00A1,  # codes 1, 2; bit 0 of code 25
        0x8000_0003,  # code 3; bit 1 of code 31
        0xF000_0008,  # code 7; bit 2 of codes 24 and 31
    ]


def test_only_float_activations_have_words() -> None:
    """What is expanded to int8 in registers reads a nibble a code."""
    assert Layout.DICT3_WORDS in layouts.layouts_of(SCHEMES["gobo3"])
    assert Layout.DICT3_WORDS not in layouts.layouts_of(SCHEMES["gobo3a8"])
    assert Layout.DICT3_WORDS not in layouts.layouts_of(SCHEMES["gobo4"])


# ---- fragments ------------------------------------------------------------------------------------------------------

FRAGMENTS = [
    pytest.param(fmt, operand, id=f"{fmt.name}-{operand.value}")
    for fmt in (INT8, INT4, DICT4, DICT3)
    for operand in fragments.Operand
    if not (fmt is INT8 and operand is fragments.Operand.INT8)
]


def _codes_of(fmt: Format, n: int, k: int) -> Tensor:
    """Unsigned codes, of int8 the values."""
    return _random_codes(fmt.bits, n, k)


def _place(operand: fragments.Operand, row: int, column: int) -> tuple[int, int, int]:
    """Thread, quad and code that hold a row and a column of a block: searched for in the documentation as it stands."""
    for thread in range(128):
        warp, g, c = thread // 32, thread % 32 // 4, thread % 4
        if row not in (16 * warp + g, 16 * warp + g + 8):
            continue
        for quad, code in itertools.product(range(16), range(4)):
            if operand is fragments.Operand.INT8:
                s, r = quad // 4, quad % 4
                place = 16 * warp + g + 8 * (r % 2), 32 * s + 16 * (r // 2) + 4 * c + code
            else:
                s, h = quad // 2, quad % 2
                place = 16 * warp + g + 8 * h, 16 * s + 2 * c + (0, 1, 8, 9)[code]
            if place == (row, column):
                return thread, quad, code
    raise AssertionError("no thread holds it")


def _word(block: Tensor, thread: int, word: int) -> int:
    """Word of a thread: pieces of 16 bytes a thread, then, where it has six, one of 8."""
    whole = word < 4 or block.numel() != 3072
    start = word // 4 * 2048 + (thread * 16 + word % 4 * 4 if whole else thread * 8 + word % 4 * 4)
    return int.from_bytes(bytes((block[start : start + 4].to(torch.int64) & 0xFF).tolist()), "little")


def _fragment_at(packed: Tensor, fmt: Format, operand: fragments.Operand, row: int, column: int) -> int:
    """The unsigned code of a row and a column, by the documentation of `layout.fragments`."""
    block = packed[row // 64, column // 128]
    thread, quad, code = _place(operand, row % 64, column % 128)
    if fmt is INT8:
        return _word(block, thread, quad) >> (8 * code) & 0xFF
    if fmt is DICT4:
        return _word(block, thread, quad // 2) >> (16 * (quad % 2) + 4 * code) & 0xF
    if fmt is INT4:
        byte = code if operand is fragments.Operand.INT8 else [0, 2, 1, 3].index(code)
        return _word(block, thread, quad // 2) >> (8 * byte + 4 * (quad % 2)) & 0xF
    half, j = quad // 8, 4 * (quad % 2) + code
    planes = [_word(block, thread, 3 * half + p) for p in range(3)]
    if quad % 8 < 6:
        return planes[quad % 8 // 2] >> (4 * j) & 7
    return sum((plane >> (4 * j + 3) & 1) << p for p, plane in enumerate(planes))


@pytest.mark.parametrize(("fmt", "operand"), FRAGMENTS)
@pytest.mark.parametrize(("n", "k"), [(0, 5), (3, 0), (1, 1), (63, 127), (64, 128), (65, 129), (130, 1023)])
def test_fragments_round_trip(fmt: Format, operand: fragments.Operand, n: int, k: int) -> None:
    codes = _codes_of(fmt, n, k)
    before = codes.clone()
    packed = fragments.pack(codes, fmt, operand)
    assert packed.shape == (-(-n // 64), -(-k // 128), {8: 8192, 4: 4096, 3: 3072}[fmt.bits])
    assert packed.dtype == codes.dtype
    assert packed.is_contiguous()
    assert torch.equal(fragments.unpack(packed, fmt, n, k, operand), before)
    assert torch.equal(codes, before)
    everything = fragments.unpack(packed, fmt, packed.shape[0] * 64, packed.shape[1] * 128, operand)
    assert not everything[n:].any()
    assert not everything[:, k:].any()


@st.composite
def _fragment_problem(draw: st.DrawFn) -> tuple[Format, fragments.Operand, Tensor, list[tuple[int, int]]]:
    fmt, operand = draw(st.sampled_from([tuple(each.values) for each in FRAGMENTS]))
    n, k = draw(st.integers(1, 140)), draw(st.integers(1, 300))
    place = st.tuples(st.integers(0, n - 1), st.integers(0, k - 1))
    return fmt, operand, _codes_of(fmt, n, k), draw(st.lists(place, min_size=1, max_size=6))


@settings(max_examples=80, deadline=None)
@given(_fragment_problem())
def test_fragments_hold_every_code_where_documented(
    problem: tuple[Format, fragments.Operand, Tensor, list[tuple[int, int]]],
) -> None:
    fmt, operand, codes, places = problem
    packed = fragments.pack(codes, fmt, operand)
    for row, column in places:
        found = _fragment_at(packed, fmt, operand, row, column)
        assert found == int(codes[row, column]) & (fmt.codes - 1), (row, column)


@pytest.mark.parametrize(("fmt", "operand"), FRAGMENTS)
def test_codes_in_fragments_share_no_bit_and_leave_none_unused(fmt: Format, operand: fragments.Operand) -> None:
    """Each bit of a block belongs to one code: a matrix for each bit of a place's number gives the number back."""
    places = torch.arange(64 * 128).view(64, 128)
    whole = (1 << fmt.bits) - 1
    for bit in range(13):
        chosen = places >> bit & 1
        ones = (chosen * whole).to(torch.uint8)
        zeros = ((1 - chosen) * whole).to(torch.uint8)
        if fmt is INT8:
            ones, zeros = ones.view(torch.int8), zeros.view(torch.int8)
        first, second = fragments.pack(ones, fmt, operand), fragments.pack(zeros, fmt, operand)
        assert bool(((first.to(torch.int64) ^ second.to(torch.int64)) & 0xFF == 0xFF).all())


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize(("fmt", "operand"), FRAGMENTS)
def test_strips_of_whole_rows_stack(fmt: Format, operand: fragments.Operand, rows: int) -> None:
    codes = _codes_of(fmt, 2 * rows, 200)
    parts = [fragments.pack(part, fmt, operand) for part in codes.split(rows)]
    assert torch.equal(torch.cat(parts), fragments.pack(codes, fmt, operand))


def test_int4_fragments_written_by_hand() -> None:
    """Lane 0 of warp 0: rows 0 and 8, columns 0 ... 3 of an int8 operand; 0, 8, 1, 9 of a 16-bit one."""
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    codes[0, :10] = torch.tensor([1, 2, 3, 4, 0, 0, 0, 0, 5, 6])
    codes[8, :10] = torch.tensor([7, 8, 9, 10, 0, 0, 0, 0, 11, 12])
    assert fragments.pack(codes, INT4, fragments.Operand.INT8)[0, 0, :4].tolist() == [0x71, 0x82, 0x93, 0xA4]
    assert fragments.pack(codes, INT4, fragments.Operand.FLOAT16)[0, 0, :4].tolist() == [0x71, 0xB5, 0x82, 0xC6]


def test_fragments_are_for_what_the_matrix_units_take() -> None:
    """Int8 under int8 activations comes through shared memory; all else is expanded to the operand of its products."""
    for scheme in SCHEMES.values():
        found = set(layouts.layouts_of(scheme)) & set(layouts.FRAGMENT_LAYOUTS)
        if Role.LINEAR not in scheme.roles or scheme.name == "w8a8":
            assert not found
        else:
            assert found == {Layout.FRAGMENTS_F16 if scheme.activation is None else Layout.FRAGMENTS_S8}
