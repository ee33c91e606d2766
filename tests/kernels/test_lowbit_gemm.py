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

from qbert.layout import rows
from qbert.reference import OUT_SCALE_AT
from qbert.testing import assert_matches_reference
from qbert.tiles import TileConfig, tiles_of

OPERATIONS = ("w4a8_linear", "gobo_linear")
SCHEMES = (("w4a8_linear", "w4a8"), ("w4a8_linear", "w4a8-g32"), ("w4a8_linear", "w4a8-g128"),
           ("gobo_linear", "gobo3a8"), ("gobo_linear", "gobo4a8"))  # fmt: skip
EVERY_SCHEME = pytest.mark.parametrize(("operation", "scheme"), SCHEMES, ids=[scheme for _, scheme in SCHEMES])
BERT = ((768, 768), (2304, 768), (3072, 768), (768, 3072), (1024, 1024), (1024, 4096))
LARGE = {operation: TileConfig("tma", 128, 128, 128, warps=8, stages=4) for operation in OPERATIONS}

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
    problems = [(*names, *shape, next(tiles)) for names in SCHEMES for shape in _shapes(names[1]) for _ in range(2)]
    _interpreted(*(("check", *problem) for problem in problems))


@pytest.mark.interpreter
def test_equals_reference_with_every_epilogue() -> None:
    """Of the table's tiles: for few, for some and for many tokens."""
    ends: list[dict[str, Any]] = [
        {"activation": "gelu"}, {"bias": False}, {"dtype": "bfloat16"}, {"dtype": "float16", "activation": "gelu"},
    ]  # fmt: skip
    problems = [("check", *SCHEMES[index % 5], tokens, 40, 384, None, end)
                for index, (tokens, end) in enumerate(itertools.product((5, 100, 530), ends))]  # fmt: skip
    requant = [("check", f"{operation}_requant", scheme, 70, 72, 256, tile, {"activation": "gelu"})
               for (operation, scheme), tile in zip(SCHEMES, itertools.cycle(cases.TILES), strict=False)]  # fmt: skip
    bounds = [(40, 66, 192, "few", {"matrices": 3}), (140, 96, 64, "turned", {"matrices": 2})]
    stacked = [("check", "gobo_linear", scheme, *problem) for scheme in ("gobo3a8", "gobo4a8") for problem in bounds]
    _interpreted(*problems, *requant, *stacked)


@pytest.mark.interpreter
def test_exact_codes_nan_and_nothing() -> None:
    exact = [("check_every_code", tile) for tile in cases.TILES]
    exact += [("check_every_centroid", bits, tile) for bits in (3, 4) for tile in cases.TILES]
    nothing = [("check_empty", *names, *shape, tile) for names in (SCHEMES[0], SCHEMES[4])
               for shape in [(0, 5, 64), (5, 0, 64), (5, 3, 0)] for tile in ("turned", "few", "pointer")]  # fmt: skip
    nan = [("check_nan", operation + end, scheme, tile) for operation, scheme in (SCHEMES[1], SCHEMES[3])
           for end, tile in [("", "few"), ("_requant", "turned")]]  # fmt: skip
    _interpreted(*exact, *nothing, *nan, ("check_refusals",))


@pytest.mark.interpreter
def test_a_token_has_the_same_bits_in_every_batch_and_on_every_road() -> None:
    _interpreted(*(("check_batch", *names) for names in SCHEMES[1::2]))


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
    operation: str, tile: TileConfig, out: str, *, gelu: bool = True, bits: int = 4, group_size: int = 64,
    outliers: bool = True, ones: tuple[str, ...] = (),
) -> sm90.Built:  # fmt: skip
    """The kernel as its launcher would run it, compiled; `ones` are sizes that are 1, which Triton compiles as constants."""
    from qbert.kernels.gobo_gemm import gobo_gemm_kernel
    from qbert.kernels.int4_gemm import int4_gemm_kernel
    from qbert.ops.triton.lowbit import MAX_REGISTERS

    tma = tile.road != "pointer"
    q = f"tensordesc<i8[{tile.block_t}, 128]>" if tma else "*i8"
    qdata = f"tensordesc<u8[{tile.block_n}, 64]>" if tma else "*u8"
    end = {"bias": "*bf16", "y": "*i32" if tile.split_k > 1 else f"*{out}", "inverse_out_scale": "fp32"}
    sizes = {"t": "i32", "n": "i32", "k": "i32"}
    constants = {
        "HAS_BIAS": True, "GELU": gelu, "BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n, "GROUP": tile.group,
        "SPLIT_K": tile.split_k, "TMA": tma, "PRMT": True,
    }  # fmt: skip
    if operation == "w4a8_linear":
        kernel, tensors, sizes["groups"] = int4_gemm_kernel, {"group_scale": "*u8", "scale": "*fp32"}, "i32"
        constants["GROUP_SIZE"] = group_size
    else:
        kernel, sizes["matrices"] = gobo_gemm_kernel, "i32"
        tensors = {
            "codebook": "*i32",
            "scale": "*fp32",
            "rowptr": "*i32",
            "col": "*i16",
            "delta": "*fp32",
            "columns": "*i8",
        }
        turned = tile.block_t == 128
        constants |= {"BITS": bits, "OUTLIERS": outliers, "TURNED": turned, "WARPS": tile.warps}
    arguments = {"q": q, "s": "*fp32", "qdata": qdata, **tensors, **end, **sizes, **dict.fromkeys(ones, "constexpr")}
    options = {"maxnreg": MAX_REGISTERS} if tile.road == "tma" else {}
    return sm90.build(
        kernel, arguments, {**dict.fromkeys(ones, 1), **constants}, warps=tile.warps, stages=tile.stages,
        unaligned=("t", "groups", "matrices"), enable_fp_fusion=False, **options,
    )  # fmt: skip


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
    ("operation", "out", "options"),
    [
        ("w4a8_linear", "bf16", {}),
        ("w4a8_linear", "i8", {"group_size": 32}),
        ("gobo_linear", "i8", {"bits": 3}),
        ("gobo_linear", "bf16", {"bits": 4}),
    ],
)
def test_large_tile(operation: str, out: str, options: dict[str, Any]) -> None:
    tile = LARGE[operation]
    built = _build(operation, tile, out, **options)
    _check(built, tile)
    loop = inner_loop(built.sass, "IGMMA")
    assert loop["IGMMA"] == 4, "64 rows of a warp group, 128 tokens, 128 inputs"
    assert loop["LDSM"] == 2, "packed weights reach registers as the matrix unit wants them"
    if operation == "gobo_linear":
        assert loop["PRMT"] == {3: 16, 4: 48}[options["bits"]]
    # The matrix unit takes 512 cycles for 128 x 128 x 128; two warps a scheduler must issue theirs in less.
    assert 2 * loop.total() < 512


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("out", "gelu"), [("fp32", True), ("bf16", False), ("fp16", True), ("i8", True), ("i8", False)]
)
def test_every_tile_of_the_table(operation: str, out: str, gelu: bool) -> None:
    variants = [{"group_size": size} for size in (32, 64, 128)] if operation == "w4a8_linear" else [
        {"bits": bits, "outliers": outliers} for bits in (3, 4) for outliers in (False, True)
    ]  # fmt: skip
    for tile, options in itertools.product(tiles_of(operation), variants):
        if tile.split_k > 1 and out != "bf16":
            continue  # partial sums have no epilogue
        _check(_build(operation, tile, out, gelu=gelu, **options), tile)


@pytest.mark.compile
@pytest.mark.parametrize(("operation", "more"), [("w4a8_linear", "groups"), ("gobo_linear", "matrices")])
def test_sizes_of_one(operation: str, more: str) -> None:
    for tile in (LARGE[operation], TileConfig("few", 16, 64, 128, warps=4, stages=4)):
        for ones in (("t", more), ("n",)):
            assert not sm90.problems(_build(operation, tile, "bf16", ones=ones), wgmma=True, tma=True)


@pytest.mark.compile
@pytest.mark.parametrize("outliers", [False, True])
def test_finish_kernels_and_columns_kernel(outliers: bool) -> None:
    from qbert.kernels.gobo_gemm import gobo_finish_kernel
    from qbert.kernels.outliers import columns_kernel
    from qbert.ops.triton.lowbit import _FINISH_TILE

    tensors = {
        "sums": "*i32",
        "s": "*fp32",
        "scale": "*fp32",
        "rowptr": "*i32",
        "col": "*i16",
        "delta": "*fp32",
        "q": "*i8",
    }
    end = {"bias": "*fp32", "y": "*bf16", "inverse_out_scale": "fp32", **dict.fromkeys("tnk", "i32"), "matrices": "i32"}
    constants = {"OUTLIERS": outliers, "HAS_BIAS": True, "GELU": True, **_FINISH_TILE, "SPLIT_K": 8}
    for ones in ((), ("t", "matrices"), ("n",)):
        arguments = {**tensors, **end, **dict.fromkeys(ones, "constexpr")}
        built = sm90.build(
            gobo_finish_kernel, arguments, {**dict.fromkeys(ones, 1), **constants}, unaligned=("t", "matrices")
        )
        assert not sm90.problems(built)
    built = sm90.build(columns_kernel, {"q": "*i8", "columns": "*i8", "t": "i32", "k": "i32"}, {"BLOCK_K": 128})
    assert not sm90.problems(built)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def on_gpu(test: Any) -> Any:
    """A test that needs an NVIDIA GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")(test))


def _gpu(operation: str, scheme: str, t: int, n: int, k: int, tile: str | None = None, **more: Any) -> None:
    cases.check(operation, scheme, t, n, k, tile, {**more, "device": "cuda"})


@on_gpu
@EVERY_SCHEME
@pytest.mark.parametrize("shape", BERT, ids=str)
def test_bert_shapes_on_gpu(operation: str, scheme: str, shape: tuple[int, int]) -> None:
    """2,048 tokens equal the reference; the first t of them have the same bits, whichever tile the table gives t tokens."""
    activation = "gelu" if shape[0] > shape[1] else "none"
    arguments = cases.arguments_of(operation, scheme, 2048, *shape, "bfloat16", activation=activation, device="cuda")
    at = OUT_SCALE_AT[f"{operation}_requant"]
    for name in (operation, f"{operation}_requant"):
        whole = cases.run(name, arguments)
        assert_matches_reference(name, arguments, whole)
        for t in (1, 16, 33, 64, 100, 200, 512, 1000):
            with cases.poisoned():
                part = cases.run(name, (arguments[0][:t].clone(), arguments[1][:t].clone(), *arguments[2:]))
            assert torch.equal(part, whole[:t]), f"{name}: {t} tokens"
        arguments = (*arguments[:at], float(whole.abs().max()) / 200, *arguments[at + 1 :])  # some codes are clamped


@on_gpu
@EVERY_SCHEME
@pytest.mark.parametrize("tile", [None, *cases.TILES])
def test_odd_shapes_on_gpu(operation: str, scheme: str, tile: str | None) -> None:
    for (t, n, k), dtype in itertools.product(_shapes(scheme), ("float32", "bfloat16", "float16")):
        _gpu(operation, scheme, t, n, k, tile, dtype=dtype)
        _gpu(f"{operation}_requant", scheme, t, n, k, tile)


@on_gpu
@EVERY_SCHEME
def test_random_shapes_on_gpu(operation: str, scheme: str) -> None:
    generator = torch.Generator().manual_seed(len(scheme))
    for seed in range(10):
        t, n, blocks = (int(torch.randint(1, high, (1,), generator=generator)) for high in (700, 1500, 12))
        k = 128 * blocks if operation == "w4a8_linear" else 128 * blocks - seed
        _gpu(operation, scheme, t, n, k, seed=seed, activation=("none", "gelu")[seed % 2], bias=seed % 3 > 0)


@on_gpu
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
def test_stacked_dictionaries_on_gpu(scheme: str) -> None:
    for t, n, k, matrices in [(512, 2304, 768, 3), (40, 66, 192, 3), (300, 96, 64, 2)]:
        _gpu("gobo_linear", scheme, t, n, k, matrices=matrices)


@on_gpu
def test_exact_codes_on_gpu() -> None:
    for tile in cases.TILES:
        cases.check_every_code(tile, device="cuda")
        for bits in (3, 4):
            cases.check_every_centroid(bits, tile, device="cuda")


@on_gpu
@EVERY_SCHEME
def test_ten_runs_and_every_batch_give_the_same_bits_on_gpu(operation: str, scheme: str) -> None:
    for t in (7, 640):
        arguments = cases.arguments_of(operation, scheme, t, 768, 768, device="cuda")
        first = cases.run(operation, arguments)
        for _ in range(9):
            assert torch.equal(cases.run(operation, arguments), first)
    cases.check_batch(operation, scheme, device="cuda")


@on_gpu
def test_in_a_cuda_graph_on_gpu() -> None:
    for operation, scheme in SCHEMES:
        arguments = cases.arguments_of(operation, scheme, 8, 768, 3072, device="cuda")
        wanted = cases.run(operation, arguments)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = cases.run(operation, arguments)
        result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, wanted)
