"""Packed weights times int8 tokens: in Triton's interpreter against the reference, as machine code for sm_90, on a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import re
import struct
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'qbert[triton]'", allow_module_level=True)

import interpreted
import lowbit_gemm_cases as cases
import ptx
import sm90
from inner_loop import inner_loop

from qbert.ops.triton.arguments import Dictionaries, End, Groups, LowbitMeta, Outliers, Shape
from qbert.testing import assert_matches_reference
from qbert.tiles import TileConfig, tiles_of
from qbert.weight.layout import rows

KEYS = ("w4a8_linear", "gobo_linear")  # of the tables of tiles
SCHEMES = ("w4a8", "w4a8-g32", "w4a8-g128", "gobo3a8", "gobo4a8")
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)
BERT = ((768, 768), (2304, 768), (3072, 768), (768, 3072), (1024, 1024), (1024, 4096))
LARGE = {key: TileConfig("tma", 128, 128, 128, warps=8, stages=4) for key in KEYS}

# ---- in the interpreter ---------------------------------------------------------------------------------------------


def _shapes(scheme: str) -> list[tuple[int, int, int]]:
    """Odd numbers of everything; int4 groups must be whole."""
    if scheme.startswith("gobo"):
        return [(1, 1, 1), (3, 66, 200), (130, 65, 131), (65, 130, 48)]
    group = int(scheme.partition("-g")[2] or 64)
    return [(1, 1, group), (3, 66, 3 * group), (130, 65, 2 * group), (65, 130, 5 * group)]


def _interpreted(*calls: tuple[Any, ...]) -> None:
    """Calls functions of `lowbit_gemm_cases`, by name, in one process: to start one takes longer than most calls."""
    interpreted.run("lowbit_gemm_cases:call", calls)


@pytest.mark.interpreter
def test_equals_reference_at_odd_shapes() -> None:
    tiles = itertools.cycle(cases.TILES)
    problems = [(scheme, *shape, next(tiles)) for scheme in SCHEMES for shape in _shapes(scheme) for _ in range(2)]
    _interpreted(*(("check", *problem) for problem in problems))


@pytest.mark.interpreter
def test_equals_reference_with_every_epilogue() -> None:
    """Of the table's tiles: for few, for some and for many tokens."""
    ends: list[dict[str, Any]] = [
        {"activation": "gelu"}, {"bias": False}, {"dtype": "bfloat16"}, {"dtype": "float16", "activation": "gelu"},
        {"activation": "silu"}, {"activation": "gelu_tanh"}, {"dtype": "float16", "activation": "relu"},
    ]  # fmt: skip
    problems = [("check", SCHEMES[index % 5], tokens, 40, 384, None, end)
                for index, (tokens, end) in enumerate(itertools.product((5, 100, 530), ends))]  # fmt: skip
    requant = [("check", scheme, 70, 72, 256, tile, {"activation": "gelu", "int8_out": True, "zero": -117})
               for scheme, tile in zip(SCHEMES, itertools.cycle(cases.TILES), strict=False)]  # fmt: skip
    bounds = [(40, 66, 192, "few", {"matrices": 3}), (140, 96, 64, "turned", {"matrices": 2})]
    stacked = [("check", scheme, *problem) for scheme in ("gobo3a8", "gobo4a8") for problem in bounds]
    _interpreted(*problems, *requant, *stacked)


@pytest.mark.interpreter
def test_exact_codes_nan_and_nothing() -> None:
    exact = [("check_every_code", tile) for tile in cases.TILES]
    exact += [("check_every_centroid", bits, tile) for bits in (3, 4) for tile in cases.TILES]
    nothing = [("check_empty", scheme, *shape, tile) for scheme in (SCHEMES[0], SCHEMES[4])
               for shape in [(0, 5, 64), (5, 0, 64), (5, 3, 0)] for tile in ("turned", "few", "pointer")]  # fmt: skip
    nan = [("check_nan", scheme, int8_out, tile) for scheme in (SCHEMES[1], SCHEMES[3])
           for int8_out, tile in [(False, "few"), (True, "turned")]]  # fmt: skip
    _interpreted(*exact, *nothing, *nan, ("check_refusals",))


@pytest.mark.interpreter
def test_a_token_has_the_same_bits_in_every_batch_and_on_every_road() -> None:
    _interpreted(*(("check_batch", scheme) for scheme in SCHEMES[1::2]))


# ---- the assembly ---------------------------------------------------------------------------------------------------


def _assembly(function: Any) -> list[str]:
    return re.findall(r'"""\{(.*?)\}"""', function.src, re.DOTALL)


def _word(values: list[int]) -> int:
    """Four bytes as a register, the first one lowest."""
    return sum((value & 0xFF) << (8 * index) for index, value in enumerate(values))


def _run(assembly: str, results: int, operands: list[int]) -> list[int]:
    """The results, which are numbered first."""
    done = ptx.execute(assembly, dict(enumerate(operands, start=results)))
    return [done[index] for index in range(results)]


def _int8s(register: int) -> list[int]:
    return list(struct.unpack("4b", struct.pack("<I", register)))


@pytest.mark.parametrize("scale", [1, 2, 7, 17, 18])
def test_int4_assembly_multiplies_codes_by_scales(scale: int) -> None:
    from qbert.kernels.expand import expand_int4

    (assembly,) = _assembly(expand_int4)
    other = 19 - scale
    offsets = [0x80808080 - 0x08080808 * each for each in (scale, other)]
    codes = range(-7, 8)
    for low, high in itertools.product(codes, repeat=2):
        packed = _word([low & 15 | (high & 15) << 4, high & 15 | (low & 15) << 4, low & 15, (low & 15) << 4])
        operands = [packed, *[scale] * 4, *[offsets[0]] * 4, *[other] * 4, *[offsets[1]] * 4]
        first, second = (_int8s(register) for register in _run(assembly, 2, operands))
        assert first == [code * scale for code in (low, high, low, 0)]
        assert second == [code * other for code in (high, low, 0, low)]


@pytest.mark.parametrize("bits", [3, 4])
def test_dictionary_assembly_looks_codes_up(bits: int) -> None:
    from qbert.kernels.expand import _look_up_words

    assembly = _assembly(_look_up_words)[bits - 3]
    generator = torch.Generator().manual_seed(bits)
    book = torch.randint(-128, 128, (1 << bits,), generator=generator).tolist()
    tables = [_word(book[at : at + 4]) for at in range(0, len(book), 4)]
    codes = torch.randint(1 << bits, (200, 128), generator=generator).to(torch.uint8)
    words = rows.pack_select_halves(codes).view(200, 16, 4).tolist()
    for row, place in itertools.product(range(200), (0, 7, 15)):
        operands = [_word(words[row][place]), *(table for table in tables for _ in range(4))]
        halves = codes[row].view(2, 16, 4)[:, place].tolist()
        assert [_int8s(found) for found in _run(assembly, 2, operands)] == [
            [book[code] for code in half] for half in halves
        ]


def test_int8_to_float_assembly() -> None:
    from qbert.kernels.outliers import _to_float

    (assembly,) = _assembly(_to_float)
    for value in range(-128, 128):
        values = [value, ~value, -128, 127]
        assert [ptx.floats_of(found, "fp32") for found in _run(assembly, 4, [_word(values)])] == [
            [each] for each in values
        ]


# ---- compiled for sm_90 ---------------------------------------------------------------------------------------------


def _build(
    key: str, tile: TileConfig, out: str, *, gelu: bool = True, bits: int = 4, group_size: int = 64,
    outliers: bool = True, ones: tuple[str, ...] = (),
) -> sm90.Built:  # fmt: skip
    """The kernel as its launcher would run it, compiled; `ones` are sizes that are 1, which Triton compiles as constants."""
    from qbert.kernels.gobo_gemm import gobo_gemm_kernel
    from qbert.kernels.int4_gemm import int4_gemm_kernel
    from qbert.ops.triton.lowbit import MAX_REGISTERS

    tma, size = tile.road != "pointer", lambda name: sm90.ONE if name in ones else "i32"
    q = f"tensordesc<i8[{tile.block_t}, 128]>" if tma else "*i8"
    qdata = f"tensordesc<u8[{tile.block_n}, 64]>" if tma else "*u8"
    meta = LowbitMeta(tile.block_t, tile.block_n, tile.split_k, gelu, tile.group, TMA=tma, PRMT=True)
    if key == "w4a8_linear":
        kernel, weight = int4_gemm_kernel, {"group_scale": Groups("*u8", size("groups"))}
        meta = meta._replace(GROUP_SIZE=group_size)
    else:
        kernel, turned = gobo_gemm_kernel, tile.block_t == 128
        weight = {"dictionaries": _dictionaries(size("matrices"), outliers)}
        meta = meta._replace(BITS=bits, TURNED=turned, WARPS=tile.warps)
    arguments = {
        "q": q, "qdata": qdata, **weight, "y": "*i32" if tile.split_k > 1 else f"*{out}",
        "end": End("*fp32", "*fp32", "*bf16", "fp32"), "shape": Shape(size("t"), size("n"), "i32"),
        "META": sm90.Constant(meta),
    }  # fmt: skip
    options = {"maxnreg": MAX_REGISTERS} if tile.road == "tma" else {}
    return sm90.build(
        kernel, arguments, warps=tile.warps, stages=tile.stages, unaligned=("t", "groups", "matrices"),
        enable_fp_fusion=False, **options,
    )  # fmt: skip


def _dictionaries(matrices: Any, outliers: bool, codebook: str | None = "*i32") -> Dictionaries:
    return Dictionaries(codebook, matrices, Outliers("*i32", "*i16", "*fp32") if outliers else None, "*i8")


def _check(built: sm90.Built, tile: TileConfig) -> None:
    programs = 16 // tile.warps if tile.road == "tma" else 1
    programs = min(programs, sm90.SHARED_LIMIT // built.shared)
    assert not sm90.problems(
        built, wgmma=True, tma=tile.road != "pointer", a_from_registers=True, blocks_per_sm=programs
    )
    assert programs > 1 or tile.road != "tma"
    loop = inner_loop(built.sass, "IGMMA")
    assert "STS" not in loop, "the expanded operand goes from registers to the matrix unit, not through shared memory"
    if tile.block_t >= 32:  # a result of 16 tokens has less than 16 bytes for each thread
        assert re.search(r"STG\.E\.128", built.sass)
        assert not re.search(r"STG\.E(?!\.128)", built.sass), "results are stored 16 bytes at a time"


@pytest.mark.compile
@pytest.mark.parametrize(
    ("key", "out", "options"),
    [
        ("w4a8_linear", "bf16", {}),
        ("w4a8_linear", "i8", {"group_size": 32}),
        ("gobo_linear", "i8", {"bits": 3}),
        ("gobo_linear", "bf16", {"bits": 4}),
    ],
)
def test_large_tile(key: str, out: str, options: dict[str, Any]) -> None:
    tile = LARGE[key]
    built = _build(key, tile, out, **options)
    _check(built, tile)
    loop = inner_loop(built.sass, "IGMMA")
    assert loop["IGMMA"] == 4, "64 rows of a warp group, 128 tokens, 128 inputs"
    assert loop["LDSM"] == 2, "packed weights reach registers as the matrix unit wants them"
    if key == "gobo_linear":
        assert loop["PRMT"] == {3: 16, 4: 48}[options["bits"]]
    # The matrix unit takes 512 cycles for 128 x 128 x 128; two warps a scheduler must issue theirs in less.
    assert 2 * loop.total() < 512


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("out", "gelu"), [("fp32", True), ("bf16", False), ("fp16", True), ("i8", True), ("i8", False)]
)
def test_every_tile_of_the_table(key: str, out: str, gelu: bool) -> None:
    variants = [{"group_size": size} for size in (32, 64, 128)] if key == "w4a8_linear" else [
        {"bits": bits, "outliers": outliers} for bits in (3, 4) for outliers in (False, True)
    ]  # fmt: skip
    for tile, options in itertools.product(tiles_of(key), variants):
        if tile.split_k > 1 and out != "bf16":
            continue  # partial sums have no epilogue
        _check(_build(key, tile, out, gelu=gelu, **options), tile)


@pytest.mark.compile
@pytest.mark.parametrize(("key", "more"), [("w4a8_linear", "groups"), ("gobo_linear", "matrices")])
def test_sizes_of_one(key: str, more: str) -> None:
    for tile in (LARGE[key], TileConfig("few", 16, 64, 128, warps=4, stages=4)):
        for ones in (("t", more), ("n",)):
            assert not sm90.problems(_build(key, tile, "bf16", ones=ones), wgmma=True, tma=True)


def _build_finish(dictionary: bool, outliers: bool = False, ones: tuple[str, ...] = ()) -> sm90.Built:
    from qbert.kernels.gobo_gemm import gobo_finish_kernel
    from qbert.kernels.int4_gemm import int4_finish_kernel

    size = lambda name: sm90.ONE if name in ones else "i32"
    weight = {"dictionaries": _dictionaries(size("matrices"), outliers, codebook=None)} if dictionary else {}
    arguments = {
        "sums": "*i32", **weight, "y": "*bf16", "end": End("*fp32", "*fp32", "*fp32", "fp32"),
        "shape": Shape(size("t"), size("n"), "i32"), "META": sm90.Constant(LowbitMeta(16, 128, SPLIT_K=8, ACTIVATION=1)),
    }  # fmt: skip
    kernel = gobo_finish_kernel if dictionary else int4_finish_kernel
    return sm90.build(kernel, arguments, unaligned=("t", "matrices"))


@pytest.mark.compile
@pytest.mark.parametrize("outliers", [False, True])
def test_finish_kernels_and_columns_kernel(outliers: bool) -> None:
    from qbert.kernels.outliers import columns_kernel

    for ones in ((), ("t", "matrices"), ("n",)):
        assert not sm90.problems(_build_finish(True, outliers, ones))
        assert outliers or not sm90.problems(_build_finish(False, ones=ones))
    arguments = {"q": "*i8", "columns": "*i8", "t": "i32", "k": "i32", "BLOCK_K": sm90.Constant(128)}
    assert not sm90.problems(sm90.build(columns_kernel, arguments))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def on_gpu(test: Any) -> Any:
    """A test that needs an NVIDIA GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")(test))


def _gpu(scheme: str, t: int, n: int, k: int, tile: str | None = None, **more: Any) -> None:
    cases.check(scheme, t, n, k, tile, {**more, "device": "cuda"})


@on_gpu
@EVERY_SCHEME
@pytest.mark.parametrize("shape", BERT, ids=str)
def test_bert_shapes_on_gpu(scheme: str, shape: tuple[int, int]) -> None:
    """2,048 tokens equal the reference; the first t of them have the same bits, whichever tile the table gives t tokens."""
    activation = "gelu" if shape[0] > shape[1] else "none"
    a = cases.problem(scheme, 2048, *shape, "bfloat16", activation=activation, device="cuda")
    for _ in range(2):
        whole = cases.run(a)
        assert_matches_reference(a, whole)
        for t in (1, 16, 33, 64, 100, 200, 512, 1000):
            with cases.poisoned():
                part = cases.run(a._replace(x=a.x[:t].clone(), s=a.s[:t].clone()))
            assert torch.equal(part, whole[:t]), f"{whole.dtype}: {t} tokens"
        a = a._replace(out=float(whole.abs().max()) / 200)  # some codes are clamped


@on_gpu
@EVERY_SCHEME
@pytest.mark.parametrize("tile", [None, *cases.TILES])
def test_odd_shapes_on_gpu(scheme: str, tile: str | None) -> None:
    for (t, n, k), dtype in itertools.product(_shapes(scheme), ("float32", "bfloat16", "float16")):
        _gpu(scheme, t, n, k, tile, dtype=dtype)
        _gpu(scheme, t, n, k, tile, int8_out=True)


@on_gpu
@EVERY_SCHEME
def test_random_shapes_on_gpu(scheme: str) -> None:
    generator = torch.Generator().manual_seed(len(scheme))
    for seed in range(10):
        t, n, blocks = (int(torch.randint(1, high, (1,), generator=generator)) for high in (700, 1500, 12))
        k = 128 * blocks - (seed if scheme.startswith("gobo") else 0)
        _gpu(scheme, t, n, k, seed=seed, activation=("none", "gelu")[seed % 2], bias=seed % 3 > 0)


@on_gpu
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
def test_stacked_dictionaries_on_gpu(scheme: str) -> None:
    for t, n, k, matrices in [(512, 2304, 768, 3), (40, 66, 192, 3), (300, 96, 64, 2)]:
        _gpu(scheme, t, n, k, matrices=matrices)


@on_gpu
def test_exact_codes_on_gpu() -> None:
    for tile in cases.TILES:
        cases.check_every_code(tile, device="cuda")
        for bits in (3, 4):
            cases.check_every_centroid(bits, tile, device="cuda")


@on_gpu
@EVERY_SCHEME
def test_ten_runs_and_every_batch_give_the_same_bits_on_gpu(scheme: str) -> None:
    for t in (7, 640):
        a = cases.problem(scheme, t, 768, 768, device="cuda")
        first = cases.run(a)
        for _ in range(9):
            assert torch.equal(cases.run(a), first)
    cases.check_batch(scheme, device="cuda")


@on_gpu
def test_in_a_cuda_graph_on_gpu() -> None:
    for scheme in SCHEMES:
        a = cases.problem(scheme, 8, 768, 3072, device="cuda")
        wanted = cases.run(a)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = cases.run(a)
        result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, wanted)
