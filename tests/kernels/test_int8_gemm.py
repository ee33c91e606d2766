"""The W8A8 GEMM: in Triton's interpreter against the reference, as machine code for sm_90, its tiles, and on a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import random
from collections.abc import Callable

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'qbert[triton]'", allow_module_level=True)

import int8_tiles
import interpreted
import sm90

from qbert import reference
from qbert.layout import Layout
from qbert.ops.triton import TRITON
from qbert.ops.triton.int8 import ANY_SHAPE, programs, shared_bytes, subtiles, tile_for
from qbert.target import Target
from qbert.testing import assert_matches_reference, random_arguments
from qbert.tiles import TileConfig, forced, select_tile, tiles_of

H100 = int8_tiles.H100
A100 = Target("cuda", "", sm=80, sm_count=108, shared_memory=166_912)
L40S = Target("cuda", "", sm=89, sm_count=142, shared_memory=101_376)
BERT = ((768, 768), (2304, 768), (3072, 768), (768, 3072), (1024, 1024), (3072, 1024), (4096, 1024), (1024, 4096))
ROADS = ("tma", "few", "pointer")
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "i8": 1}


# ---- results, in the interpreter ------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_roads_equal_the_reference():
    problems = [(70, 144, 208), (1, 16, 16), (64, 128, 64), (17, 272, 48)]
    ends = [
        {"operation": "w8a8_linear"}, {"operation": "w8a8_linear_requant"}, {"dtype": "bfloat16", "bias": False},
        {"dtype": "float16", "activation": "gelu"}, {"operation": "w8a8_linear_requant", "activation": "gelu"},
    ]  # fmt: skip
    cases = [
        {"t": t, "n": n, "k": k, "road": road, **end}
        for road, (t, n, k), end in itertools.product(ROADS, problems, ends)
    ]
    interpreted.run("int8_gemm_cases:matches_reference", cases)


@pytest.mark.interpreter
def test_any_shape_equals_the_reference():
    """Widths that no descriptor takes, and both layouts; the table's tile or the one for any shape."""
    shapes = [(1, 1, 1), (37, 51, 77), (70, 3, 64), (130, 17, 1023), (5, 768, 31), (65, 40, 160)]
    cases = [
        {"t": t, "n": n, "k": k, "road": None, "layout": layout, "operation": operation}
        for (t, n, k), layout, operation in itertools.product(
            shapes, ("int8_rows", "plain"), ("w8a8_linear", "w8a8_linear_requant")
        )
    ]
    interpreted.run("int8_gemm_cases:matches_reference", cases)


@pytest.mark.interpreter
@pytest.mark.slow
def test_bert_shapes_equal_the_reference():
    cases = [
        {"t": t, "n": n, "k": k, "road": None, "activation": activation}
        for (n, k), t, activation in itertools.product(BERT, (1, 64, 100, 300), ("none", "gelu"))
    ]
    interpreted.run("int8_gemm_cases:matches_reference", cases, timeout=1800)


@pytest.mark.interpreter
def test_bits_do_not_depend_on_the_road_the_tile_or_the_batch():
    roads = [
        ["roads_agree", 17, 144, 208, operation, activation]
        for operation, activation in itertools.product(("w8a8_linear", "w8a8_linear_requant"), ("none", "gelu"))
    ]
    persistent = [
        ["many_tiles_a_program", 300, 400, 208, "w8a8_linear"],
        ["many_tiles_a_program", 129, 272, 64, "w8a8_linear_requant"],
        ["many_tiles_a_program", 65, 144, 400, "w8a8_linear"],
    ]
    interpreted.run("int8_gemm_cases:call", [*roads, *persistent])


@pytest.mark.interpreter
def test_extremes_empty_problems_refusals_and_gelu():
    by_road = [[name, road] for name, road in itertools.product(("extremes", "rounds_half_to_even"), ROADS)]
    empty = [["empty", *shape] for shape in ((0, 16, 32), (5, 0, 32), (5, 16, 0), (0, 0, 0))]
    refused = [["refuses", case] for case in ("strides", "address", "activation")]
    interpreted.run("int8_gemm_cases:call", [*by_road, *empty, *refused, ["gelu_is_exact"]])


# ---- tiles ----------------------------------------------------------------------------------------------------------


def test_shapes_that_no_descriptor_takes_get_plain_loads():
    assert tile_for(4096, 768, 768, 2, H100).road == "tma"
    assert tile_for(8, 3, 768, 2, H100).road == "few"
    for t, n, k in ((4096, 768, 770), (4096, 3, 768), (8, 768, 770), (8, 768, 0)):
        assert tile_for(t, n, k, 2, H100) == ANY_SHAPE


def test_older_gpus_get_plain_loads_and_what_fits():
    for target, t, (n, k) in itertools.product((A100, L40S), (1, 64, 128, 4096), BERT):
        tile = tile_for(t, n, k, 2, target)
        assert tile.road == "pointer"
        assert shared_bytes(tile, 2) <= target.shared_memory


def test_persistent_programs_fill_the_machine():
    large, small = TileConfig("tma", 128, 256, 128, 8, 4), TileConfig("tma", 128, 128, 128, 4, 3)
    for out_bytes in (1, 2, 4):
        assert programs(large, 65_536, 4096, out_bytes, H100) == 132
        assert programs(small, 65_536, 4096, out_bytes, H100) == 264
    assert programs(large, 256, 512, 2, H100) == 4


def test_the_table_is_near_the_best_of_the_model():
    """At the ends of its rows the table has the model's choice; between them a smaller tile may be a wave better."""
    worst = 1.0
    for (n, k), exponent in itertools.product(BERT, range(17)):
        t = 2**exponent
        tile = select_tile("w8a8_linear", t, n, k, H100)
        fewest = min(int8_tiles.cycles(each, t, n, k) for each in int8_tiles.CANDIDATES)
        worst = max(worst, int8_tiles.cycles(tile, t, n, k) / fewest)
    assert worst < 1.1


def test_the_model_chooses_the_blocks_that_gemlite_measured():
    """For n = k = 4096: https://github.com/dropbox/gemlite, gemlite/configs/h100.json, int8 x int8."""
    measured = {128: (64, 64), 256: (64, 128), 512: (128, 128), 1024: (128, 256), 4096: (128, 256)}
    for t, blocks in measured.items():
        tile = int8_tiles.best(t, 4096, 4096)
        assert (tile.block_t, tile.block_n) == blocks


# ---- machine code ---------------------------------------------------------------------------------------------------

VECTORS = {"s_ptr": "*fp32", "scale_ptr": "*fp32"}
SIZES = {"inverse_out_scale": "fp32", "t": "i32", "n": "i32", "k": "i32"}


def build(
    tile: TileConfig, out: str, *, gelu: bool = True, bias: str | None = "fp32", even_k: bool = True, odd_k: bool = False
) -> sm90.Built:  # fmt: skip
    """A road's kernel as its launcher asks for it; `odd_k`: rows start anywhere."""
    from qbert.kernels import int8_gemm

    constants = {
        "BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "HAS_BIAS": bias is not None, "GELU": gelu,
    }  # fmt: skip
    vectors = {**VECTORS, "bias_ptr": f"*{bias}"} if bias else VECTORS
    constants |= {} if bias else {"bias_ptr": None}
    block = lambda dtype, rows, columns: f"tensordesc<{dtype}[{rows}, {columns}]>"
    operands = {
        "q_desc": block("i8", tile.block_t, tile.block_k), "w_desc": block("i8", tile.block_n, tile.block_k),
    }  # fmt: skip
    if tile.road == "tma":
        parts = subtiles(tile, BYTES[out])
        kernel, constants = int8_gemm.int8_gemm_tma, {**constants, "GROUP": tile.group, "SUBTILES": parts}
        operands["out_desc"] = block(out, tile.block_t, tile.block_n // parts)
    elif tile.road == "few":
        kernel, operands = int8_gemm.int8_gemm_few, {**operands, "out_ptr": f"*{out}"}
    else:
        kernel, constants = int8_gemm.int8_gemm_pointer, {**constants, "GROUP": tile.group, "EVEN_K": even_k}
        operands = {"q_ptr": "*i8", "w_ptr": "*i8", "out_ptr": f"*{out}"}
    arguments = {**operands, **vectors, **SIZES} | ({"w_stride": "i32"} if tile.road == "pointer" else {})
    unaligned = ("t", "n", "k", "w_stride") if odd_k else ("t",)
    return sm90.build(
        kernel, arguments, constants, warps=tile.warps, stages=tile.stages, unaligned=unaligned, enable_fp_fusion=False
    )


def check(tile: TileConfig, out: str, **options: object) -> None:
    built = build(tile, out, **options)
    resident = 1
    if tile.road == "tma":
        resident = programs(tile, 65_536, 4096, BYTES[out], H100) // H100.sm_count
    wgmma = tile.road != "few" or tile.block_n >= 64
    found = sm90.problems(built, wgmma=wgmma, tma=tile.road != "pointer", blocks_per_sm=resident)
    assert not found, f"{tile} {out} {options}: {found}"
    assert built.shared <= shared_bytes(tile, BYTES[out]), f"{tile} {out}: {built.shared} bytes"
    assert "fma.rn.f32" not in built.ptx or options.get("gelu", True), "the reference rounds products before it adds"
    if not wgmma:
        assert built.count("IMMA") > 0
    if tile.road == "tma":
        assert built.count("UTMASTG") == subtiles(tile, BYTES[out]), "one epilogue, stored by the copy engine"


@pytest.mark.compile
@pytest.mark.parametrize(
    ("tile", "out", "gelu"),
    [
        (TileConfig("tma", 128, 256, 128, 8, 4), "bf16", False),
        (TileConfig("tma", 128, 256, 128, 8, 4), "i8", True),
        (TileConfig("tma", 128, 128, 128, 4, 3), "bf16", True),
        (TileConfig("tma", 128, 128, 128, 4, 3), "i8", True),
        (TileConfig("tma", 128, 128, 128, 4, 3), "fp32", False),
        (TileConfig("few", 16, 16, 256, 4, 8), "bf16", False),
        (TileConfig("pointer", 128, 128, 128, 8, 3), "i8", True),
    ],
    ids=lambda value: f"{value.road}-{value.block_t}x{value.block_n}" if isinstance(value, TileConfig) else str(value),
)
def test_machine_code(tile: TileConfig, out: str, gelu: bool):
    check(tile, out, gelu=gelu)


@pytest.mark.compile
def test_rows_that_start_anywhere_spill_nothing():
    check(ANY_SHAPE, "i8", even_k=False, odd_k=True)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("out", BYTES)
@pytest.mark.parametrize("tile", [*tiles_of("w8a8_linear"), ANY_SHAPE], ids=str)
def test_machine_code_of_every_tile(tile: TileConfig, out: str):
    for gelu, bias in itertools.product((False, True), (None, "bf16")):
        check(tile, out, gelu=gelu, bias=bias)
    if tile.road == "pointer":
        check(tile, out, even_k=False)


@pytest.mark.compile
@pytest.mark.parametrize("sm", [80, 89])
def test_older_gpus_multiply_int8_and_copy_ahead(sm: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qbert.kernels.int8_gemm import int8_gemm_pointer

    arguments = {
        "q_ptr": "*i8", "w_ptr": "*i8", "out_ptr": "*bf16", **VECTORS, "bias_ptr": "*fp32", **SIZES, "w_stride": "i32",
    }  # fmt: skip
    constants = {
        "BLOCK_T": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8, "EVEN_K": True, "HAS_BIAS": True, "GELU": True,
    }  # fmt: skip
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(arguments) if arguments[name] != "fp32"}
    source = ASTSource(int8_gemm_pointer, {**arguments, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": 8, "num_stages": 3}).asm["ptx"]
    assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in ptx
    assert "cp.async.cg.shared.global" in ptx


# ---- on a GPU -------------------------------------------------------------------------------------------------------

on_gpu = lambda test: pytest.mark.gpu(
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")(test)
)
ODD = ((1, 1, 1), (3, 17, 31), (65, 1000, 1023), (129, 771, 4097), (1023, 2304, 48), (4097, 768, 3072))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN, or a code that it never writes."""
    original: Callable[..., torch.Tensor] = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: object, **options: object) -> torch.Tensor:
        out = original(self, *size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else -128)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def _run(operation: str, arguments: tuple[object, ...]) -> torch.Tensor:
    return TRITON[operation](*arguments)


def _assert_bits(operation: str, arguments: tuple[object, ...]) -> None:
    """Without GELU every step is an IEEE operation: the reference, on the GPU too, gives the same bits."""
    assert torch.equal(_run(operation, arguments), reference.REFERENCES[operation](*arguments))


def _on_gpu(operation: str, t: int, n: int, k: int, **options: object) -> tuple[object, ...]:
    return random_arguments(operation, t, n, k, layout=Layout.INT8_ROWS, device="cuda", **options)


@on_gpu
@pytest.mark.parametrize("operation", ["w8a8_linear", "w8a8_linear_requant"])
@pytest.mark.parametrize(("n", "k"), BERT)
def test_bert_shapes_on_gpu(operation: str, n: int, k: int, poisoned: None):
    for t in (1, 16, 33, 64, 100, 128, 384, 1000, 4096):
        _assert_bits(operation, _on_gpu(operation, t, n, k, dtype=torch.bfloat16))
    arguments = _on_gpu(operation, 200, n, k, dtype=torch.bfloat16, activation="gelu")
    assert_matches_reference(operation, arguments, _run(operation, arguments))


@on_gpu
@pytest.mark.parametrize("operation", ["w8a8_linear", "w8a8_linear_requant"])
def test_odd_and_random_shapes_on_gpu(operation: str, poisoned: None):
    draw = random.Random()
    shapes = [*ODD, *((draw.randint(1, 3000), draw.randint(1, 2000), draw.randint(1, 3000)) for _ in range(10))]
    for (t, n, k), dtype in itertools.product(shapes, (torch.float32, torch.float16)):
        print(t, n, k, dtype)  # what failed, for the shapes are different in each run
        _assert_bits(operation, _on_gpu(operation, t, n, k, dtype=dtype))


@on_gpu
@pytest.mark.parametrize("tile", [*tiles_of("w8a8_linear"), ANY_SHAPE], ids=str)
def test_every_tile_on_gpu(tile: TileConfig, poisoned: None):
    """Ten runs of each tile: all of one problem are the same bits, with and without GELU."""
    for operation, activation in itertools.product(("w8a8_linear", "w8a8_linear_requant"), ("none", "gelu")):
        arguments = _on_gpu(operation, 1500, 1040, 784, activation=activation)
        expected = _run(operation, arguments)
        if activation == "none":
            assert torch.equal(expected, reference.REFERENCES[operation](*arguments))
        with forced("w8a8_linear", tile):
            for _ in range(10):
                assert torch.equal(_run(operation, arguments), expected)


@on_gpu
def test_a_captured_launch_computes_what_its_inputs_hold_when_it_replays():
    for t in (8, 100, 2000):
        operation = "w8a8_linear_requant"
        first, second = (_on_gpu(operation, t, 768, 768, seed=seed) for seed in (0, 1))
        held = tuple(each.clone() if isinstance(each, torch.Tensor) else each for each in first)
        _run(operation, held)  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = _run(operation, held)
        for arguments in (second, first):
            for mine, theirs in zip(held, arguments, strict=True):
                if isinstance(mine, torch.Tensor):
                    mine.copy_(theirs)
            graph.replay()
            same_scale = (*arguments[:6], held[6], *arguments[7:])
            assert torch.equal(out, reference.REFERENCES[operation](*same_scale))
