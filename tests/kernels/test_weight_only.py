"""The weight-only linears on GPUs: assembly executed on integers, kernels in the interpreter, compiled for sm_90, on a GPU."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'qbert[triton]'", allow_module_level=True)

import interpreted
import ptx
import sm90
import weight_only_cases as cases
from launchers import bind_with, changed, is_left_to_others, launch, obstacle_of

from qbert.errors import QBertError
from qbert.formats import DICT3, DICT4, INT4, INT8, SCHEMES
from qbert.ops.triton import weight_only
from qbert.ops.triton.arguments import ExpandMeta, Outliers, Packed, Shape, WeightOnlyMeta
from qbert.ops.triton.weight_only import streams
from qbert.tiles import TileConfig, tiles_of
from qbert.weight import layout as layouts
from qbert.weight.layout import Layout, layouts_of

SCHEME_NAMES = cases.SCHEME_NAMES
FORMATS = [
    ("int8_rows", INT8),
    ("nibble_halves", INT4),
    ("select_halves", DICT3),
    ("select_halves", DICT4),
    ("dict3_words", DICT3),
]
TYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


# ---- assembly -------------------------------------------------------------------------------------------------------


def _value(code: int, fmt: Any, codebook: list[float]) -> float:
    return codebook[code] if fmt in (DICT3, DICT4) else float(code)


@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize(("layout", "fmt"), FORMATS, ids=[f"{layout}-{fmt.name}" for layout, fmt in FORMATS])
def test_assembly_gives_the_weights_of_packed_codes(layout, fmt, kind):
    """Every code at every place: packed by `qbert.weight.layout`, decoded by the PTX that kernels contain."""
    import triton.language as tl

    from qbert.kernels import decode

    dtype = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}[kind]
    results, planes, tables, pair = decode._counts(layout, fmt.bits, dtype)
    assembly = decode._assembly(layout, fmt.bits, dtype)
    generator = random.Random(1)
    codebook = [ptx.floats_of(ptx.register_of([value] * (1 if kind == "fp32" else 2), kind), kind)[0]
                for value in (generator.randrange(-127, 128) / 64 for _ in range(fmt.codes))]  # fmt: skip
    low = -(fmt.codes // 2) if fmt in (INT8, INT4) else 0
    parts = results // 4
    k = 64 * parts
    codes = torch.tensor(
        [
            [low + (i * (2 * round_ + 1) + round_) % fmt.codes for i in range(k)]
            for round_ in range(max(2, fmt.codes * 2 // k))
        ]
    )
    scheme = SCHEMES[{INT8: "w8a16", INT4: "w4a16", DICT3: "gobo3", DICT4: "gobo4"}[fmt]]
    plain = {"qdata": layouts.pack_codes(codes, fmt)}
    packed = layouts.from_plain(plain, scheme, tuple(codes.shape), Layout(layout))["qdata"].view(torch.int32)
    bytes_of = (
        [torch.tensor(codebook).to(getattr(torch, TYPES[kind])).view(torch.uint8).view(fmt.codes, -1).tolist()]
        if tables
        else []
    )
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        width = len(words) // planes
        for first in range(0, width, pair):
            operands = {}
            for plane in range(planes):
                for i in range(pair):
                    operands[results + pair * plane + i] = words[plane * width + first + i]
            for table in range(tables):
                four, byte = divmod(table, tables * 4 // fmt.codes)
                word = sum(bytes_of[0][4 * four + entry][byte] << (8 * entry) for entry in range(4))
                for i in range(pair):
                    operands[results + pair * planes + pair * table + i] = word
            found = ptx.execute(assembly, operands)
            for index in range(results):
                part, inner = divmod(index, 4)
                weights = ptx.floats_of(found[index], kind)
                for j, weight in enumerate(weights):  # the documentation of `decode`
                    word, m = (first, inner) if pair == 1 else (first + inner // 2, 2 * (inner % 2) + j)
                    e = 4 * word + m
                    channel = 32 * word + 4 * part + m if layout == "dict3_words" else 64 * part + e
                    assert weight == _value(row[channel], fmt, codebook), (index, j, channel)


def test_the_emulator_knows_its_instructions():
    done = ptx.execute(
        "{ .reg .b32 s; prmt.b32 s, $1, $2, 0x8F40; xor.b32 $0, s, 1; }", {1: 0x0403_0281, 2: 0xA4B3_C2D1}
    )
    assert done[0] == 0xFFFF_D181 ^ 1  # sign of byte 0, sign of byte 7, byte 4, byte 0
    assert (
        ptx.execute("lop3.b32 $0, $1, $2, $3, 0xE4;", {1: 0xF0F0_F0F0, 2: 0x0F0F_0F0F, 3: 0xFFFF_0000})[0]
        == 0xF0F0_0F0F
    )
    assert ptx.execute("lop3.b32 $0, $1, 0xF, 0x8, 0x6A;", {1: 0x1234})[0] == 4 ^ 8
    with pytest.raises(KeyError, match="s"):
        ptx.execute("mov.b32 $0, s;", {})


# ---- choice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "fmt", "layout", "group", "dtype", "expected"),
    [
        (1, INT8, Layout.INT8_ROWS, 0, torch.float16, True),
        (64, DICT3, Layout.DICT3_WORDS, 0, torch.bfloat16, True),
        (65, DICT3, Layout.DICT3_WORDS, 0, torch.bfloat16, True),  # 0.75 bytes a weight, not 0.375 + 4
        (256, INT8, Layout.INT8_ROWS, 0, torch.bfloat16, True),  # 4, not 1 + 4
        (257, DICT3, Layout.DICT3_WORDS, 0, torch.bfloat16, False),
        (16, INT4, Layout.NIBBLE_HALVES, 64, torch.float32, True),
        (17, INT4, Layout.NIBBLE_HALVES, 64, torch.float32, False),
        (1, INT4, Layout.NIBBLE_HALVES, 96, torch.float16, True),
        (1, INT4, Layout.NIBBLE_HALVES, 48, torch.float16, False),
        (1, DICT4, Layout.PLAIN, 0, torch.float16, False),
    ],
)  # fmt: skip
def test_what_streams(t, fmt, layout, group, dtype, expected):
    assert streams(t, fmt, layout, group, dtype) is expected


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_layouts_of_other_kernels_are_left_alone(scheme):
    for layout in layouts_of(SCHEMES[scheme]):
        if layout not in weight_only.EXPANDED_LAYOUTS:
            a = cases.problem(scheme, 2, 3, 128, layout.value)
            assert f"{scheme} weights in layout {layout.value}" in str(obstacle_of(a))
            assert is_left_to_others(a)


@pytest.mark.parametrize("t", [1, 300])
def test_tensors_in_the_wrong_place_are_named(t):
    a = cases.problem("gobo3", t, 16, 128, dtype=torch.float16)
    if not torch.cuda.is_available():
        with pytest.raises(QBertError, match="given a tensor on cpu; allowed: cuda"):
            launch(a)
    qdata, codebook = a.weight.qdata, a.weight.codebook
    odd = torch.empty(qdata.numel() + 1, dtype=torch.uint8)[1:].view(qdata.shape)
    for wrong, message in (
        ({"qdata": odd}, "qdata starts at an address"),
        ({"qdata": qdata.t().contiguous().t()}, "qdata has strides"),
        ({"qdata": qdata.to("meta")}, "qdata is on meta"),
        ({"codebook": codebook.to("meta")}, "codebook of a gobo3 weight is on meta"),
    ):
        with pytest.raises(QBertError, match=message):
            launch(a._replace(weight=changed(a.weight, **wrong)))
    with pytest.raises(QBertError, match="unknown activation 'tanh'"):
        bind_with(a, "none", "tanh")


# ---- interpreter ----------------------------------------------------------------------------------------------------


def _sizes(scheme: str) -> list[dict[str, Any]]:
    """Types in turn; k with and without padding, odd, of several chunks; more tokens and rows than a program has."""
    sizes = [
        (1, 1, 1, "float16"), (3, 17, 131, "bfloat16"), (2, 9, 640, "float32"), (9, 20, 129, "float16"),
        (17, 33, 64, "bfloat16"), (1, 16, 1100, "bfloat16"), (70, 5, 130, "float16"), (17, 5, 70, "float32"),
        (3, 7, 33, "float32"),
    ]  # fmt: skip
    return [
        {
            "scheme": scheme,
            "t": t,
            "n": n,
            "k": k,
            "dtype": dtype,
            "activation": ("none", "gelu", "silu", "gelu_tanh", "relu")[n % 5],
            "bias": n != 9,
        }
        for t, n, k, dtype in sizes
    ]


@pytest.mark.interpreter
def test_matches_reference_in_the_interpreter():
    interpreted.run("weight_only_cases:matches", [case for scheme in SCHEME_NAMES for case in _sizes(scheme)])


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])  # the interpreter cuts bfloat16 off, where a GPU rounds
def test_more_sizes_in_the_interpreter(dtype):
    sizes = [(t, n, k) for t in (1, 2, 8, 16, 32, 33, 64, 65) for n, k in ((16, 384), (31, 200), (3, 1536))]
    cases_of_all = [[scheme, *size, dtype] for scheme in SCHEME_NAMES for size in sizes]
    interpreted.run("weight_only_cases:matches", cases_of_all, timeout=3600)


@pytest.mark.interpreter
def test_expanded_weights_in_the_interpreter():
    """Every layout of every scheme, and the products of the plain one, which an embedding table that heads share has."""
    exact = [
        ["expanded_equals_dequantized", scheme, layout.value, 7, 200 + 3 * i, dtype]
        for i, (scheme, dtype) in enumerate(zip(SCHEME_NAMES, 2 * list(TYPES.values()), strict=True))
        for layout in layouts_of(SCHEMES[scheme])
        if layout in weight_only.EXPANDED_LAYOUTS
    ]
    plain = [["plain_matches", scheme] for scheme in SCHEME_NAMES]
    interpreted.run("weight_only_cases:call", exact + plain)


@pytest.mark.interpreter
def test_edges_in_the_interpreter():
    everywhere = list(range(100))
    rows = [[], everywhere, [], [99], [0], *[[]] * 14, everywhere]
    interpreted.run(
        "weight_only_cases:call",
        [
            ["empty"],
            ["sparse", [[]] * 20, "float16", "int16"],
            ["sparse", rows, "float32", "int32"],
            ["sparse", [*[everywhere] * 8, []], "bfloat16", "int16"],
            ["not_finite", "w8a16", "float16", "nan"],
            ["not_finite", "w4a16-g32", "bfloat16", "inf"],
            ["not_finite", "gobo3", "float16", "-inf"],
            ["not_finite", "gobo4", "float32", "nan"],
            ["grouped", 96, 192, "float16"],
            ["grouped", 160, 320, "float32"],
            ["grouped", 64, 192, "bfloat16"],
            ["grouped", 48, 192, "float16"],
            ["other_bias", "float16", "float32"],
            ["other_bias", "float32", "bfloat16"],
            ["strided", "bfloat16"],
            ["batch_does_not_show", "w4a16", "float16", 12, [1, 7, 9]],
            ["batch_does_not_show", "gobo3", "float16", 12, [1, 9]],
        ],
    )


# ---- compiled -------------------------------------------------------------------------------------------------------

# Instructions a weight in the main loop that share 64 lanes of a multiprocessor; what decoding needs, and a margin.
_SHARED_LANES = ("PRMT", "LOP3", "SHF", "SEL", "IADD3", "LEA", "ISETP", "VIADD", "PLOP3", "MOV", "FSEL", "I2F", "I2FP")


def _tiles(layout: str) -> list[TileConfig]:
    operation = {"int8_rows": "w8a16_linear", "nibble_halves": "w4a16_linear"}.get(layout, "gobo_a16_linear")
    return tiles_of(operation)


def _build(
    layout: str, bits: int, kind: str, tile: TileConfig, *, group: int = 0, outliers: bool = False, gelu: bool = False
) -> sm90.Built:
    from qbert.kernels.weight_only import ROWS, weight_only_kernel

    dtype = getattr(torch, TYPES[kind])
    block_t = weight_only.tokens_of(tile, tile.block_t, group, dtype)
    meta = WeightOnlyMeta(
        layout, bits, group, weight_only.outliers_of(block_t), gelu, block_t, tile.block_n // ROWS.value, tile.warps, True
    )  # fmt: skip
    arguments = {
        "x_ptr": f"*{kind}", "weight": _packed("*i32", layout, group, outliers), "bias_ptr": "*fp32", "y_ptr": f"*{kind}",
        "shape": Shape("i32", "i32", "i32"), "META": sm90.Constant(meta),
    }  # fmt: skip
    return sm90.build(
        weight_only_kernel, arguments, warps=tile.warps, stages=tile.stages, unaligned=("t", "pitch"), enable_fp_fusion=True
    )  # fmt: skip


def _packed(codes: str, layout: str, group: int, outliers: bool, dictionary: bool | None = None) -> Packed:
    if dictionary is None:
        dictionary = layout not in ("int8_rows", "nibble_halves")
    codebook, scale = ("*fp32", None) if dictionary else (None, "*bf16" if group else "*fp32")
    return Packed(codes, "i32", codebook, scale, Outliers("*i32", "*i16", "*fp32") if outliers else None)


def _main_loop(built: sm90.Built) -> dict[str, int]:
    """How often each instruction stands in the longest loop with products of the matrix unit."""
    lines = sm90.re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+ )?\s*([A-Z0-9_]+)\S*(.*);", built.sass)
    bodies = []
    for address, name, rest in lines:
        target = sm90.re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < int(address, 16):
            bodies.append([each for at, each, _ in lines if int(target[1], 16) <= int(at, 16) <= int(address, 16)])
    body = max((each for each in bodies if "HMMA" in each), key=len)
    return {name: body.count(name) for name in set(body)}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("layout", "bits", "kind", "group", "limit"),
    [
        ("int8_rows", 8, "bf16", 0, 2.2),
        ("nibble_halves", 4, "fp16", 128, 1.6),
        ("nibble_halves", 4, "bf16", 32, 2.1),
        ("select_halves", 4, "bf16", 0, 2.9),
        ("dict3_words", 3, "fp16", 0, 1.65),
    ],
)
def test_few_tokens_stream_through_registers(layout, bits, kind, group, limit):
    """16-byte loads, no shared memory, barrier or shuffle in the loop, as few instructions as decoding needs."""
    from qbert.kernels.decode import parts_of

    tile = _tiles(layout)[0]
    built = _build(layout, bits, kind, tile, group=group, outliers=bits == 3)
    assert sm90.problems(built, blocks_per_sm=2) == []
    loop = _main_loop(built)
    assert {"STS", "LDS", "LDSM", "STSM", "SHFL", "BAR", "I2F", "I2FP", "F2F"}.isdisjoint(loop)
    weights = tile.block_n // 8 * 16 * parts_of(layout)  # of a lane
    assert sum(loop.get(name, 0) for name in _SHARED_LANES) / weights < limit
    words = tile.block_n // 8 * (3 if bits == 3 else 1)
    assert built.count("LDG.E.128") >= 2 * words  # the first chunk's, and the next one's within the loop


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize(
    ("layout", "bits", "group"),
    [("int8_rows", 8, 0), ("nibble_halves", 4, 32), ("nibble_halves", 4, 64), ("nibble_halves", 4, 128),
     ("select_halves", 3, 0), ("select_halves", 4, 0), ("dict3_words", 3, 0)],
)  # fmt: skip
def test_every_tile_compiles_without_spills(layout, bits, group, kind):
    for tile in _tiles(layout):
        built = _build(layout, bits, kind, tile, group=group, outliers=group == 0 and bits < 8, gelu=True)
        assert sm90.problems(built) == [], tile


def _build_expansion(layout: str, bits: int, group: int) -> sm90.Built:
    from qbert.kernels.dequantize import dequantize_kernel

    weight = _packed("*u8", layout, group, outliers=bits == 3, dictionary=bits == 3)
    meta = sm90.Constant(ExpandMeta(layout, bits, group, 1024))
    return sm90.build(dequantize_kernel, {"weight": weight, "out_ptr": "*bf16", "k": "i32", "META": meta}, warps=4)


EXPANDED = (("plain", 3, 0), ("dict3_words", 3, 0), ("nibble_halves", 4, 64), ("plain", 8, 0))


@pytest.mark.compile
def test_expansion_compiles_without_spills():
    for problem in EXPANDED:
        built = _build_expansion(*problem)
        assert sm90.problems(built, blocks_per_sm=8) == []
        assert built.count("STG.E.128") > 0


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", list(TYPES.values()))
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_matches_reference_on_gpu(scheme, dtype):
    generator = random.Random(scheme + dtype)
    shapes = [
        (1, 768, 768),
        (5, 2304, 768),
        (16, 3072, 768),
        (33, 768, 3072),
        (64, 1024, 1024),
        (200, 1024, 4096),
        (300, 384, 1536),
    ]
    shapes += [
        (generator.randrange(1, 80), generator.randrange(1, 600), generator.randrange(1, 1500)) for _ in range(10)
    ]
    for t, n, k in shapes:
        cases.matches(scheme, t, n, k, dtype, activation="gelu" if n % 2 else "none", bias=t != 5, device="cuda")


@pytest.mark.gpu
@on_gpu
def test_edges_on_gpu():
    cases.empty("cuda")
    everywhere = list(range(100))
    cases.sparse([[], everywhere, [], [99], [0], *[[]] * 14, everywhere], "float16", "int16", device="cuda")
    cases.sparse([*[everywhere] * 8, []], "float32", "int32", t=20, device="cuda")
    cases.grouped(96, 192, "float16", "cuda")
    cases.grouped(48, 192, "bfloat16", "cuda")
    for scheme in SCHEME_NAMES:
        for bad in ("nan", "inf"):
            cases.not_finite(scheme, "bfloat16", bad, "cuda")
        for layout in layouts_of(SCHEMES[scheme]):
            if layout in weight_only.EXPANDED_LAYOUTS:
                cases.expanded_equals_dequantized(scheme, layout.value, 7, 200, "float16", "cuda")
    cases.strided("bfloat16", "cuda")
    cases.other_bias("float16", "float32", "cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_ten_runs_into_poisoned_memory_give_the_same_bits(scheme, monkeypatch):
    a = cases.problem(scheme, 7, 770, 768, dtype=torch.bfloat16, device="cuda")
    expected = launch(a)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **options: new_empty(*args, **options).fill_(float("nan"))
    )
    for _ in range(10):
        assert torch.equal(launch(a), expected)
    assert bool(expected.isfinite().all())


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_a_token_does_not_see_its_batch_on_gpu(scheme):
    """Of the streamed road and 16-bit types: what torch multiplies is up to torch."""
    cases.batch_does_not_show(scheme, "bfloat16", 64, [1, 3, 8, 9, 17, 33], device="cuda")


@pytest.mark.gpu
@on_gpu
def test_a_graph_replays_it():
    a = cases.problem("gobo3", 4, 768, 768, dtype=torch.float16, device="cuda")
    launch(a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launch(a)
    a.x.copy_(a.x.flip(0))
    graph.replay()
    assert torch.equal(y, launch(a))
