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
from launchers import launch

from qbert.ops import reference
from qbert.ops.abi import Activation
from qbert.ops.operations import Linear
from qbert.ops.triton.arguments import End, Int8Meta
from qbert.ops.triton.int8 import ANY_SHAPE, MORE_WARPS, programs, shared_bytes, spills, subtiles, tile_for
from qbert.target import Target
from qbert.testing import assert_matches_reference, random_problem
from qbert.tiles import TileConfig, forced, select_tile, tiles_of
from qbert.weight import Layout

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
        {}, {"int8_out": True}, {"dtype": "bfloat16", "bias": False}, {"dtype": "float16", "activation": "gelu"},
        {"int8_out": True, "activation": "gelu"}, {"activation": "gelu_tanh"}, {"dtype": "float16", "activation": "relu"},
        {"int8_out": True, "activation": "silu"},
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
        {"t": t, "n": n, "k": k, "road": None, "layout": layout, "int8_out": int8_out}
        for (t, n, k), layout, int8_out in itertools.product(shapes, ("int8_rows", "plain"), (False, True))
    ]
    cases += [
        {"t": 37, "n": 51, "k": 77, "road": road, "int8_out": True, "zero": zero}
        for road, zero in itertools.product(ROADS, (-117, 127))
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
        ["roads_agree", 17, 144, 208, int8_out, activation]
        for int8_out, activation in itertools.product((False, True), ("none", "gelu"))
    ]
    persistent = [
        ["many_tiles_a_program", 300, 400, 208, False],
        ["many_tiles_a_program", 129, 272, 64, True],
        ["many_tiles_a_program", 65, 144, 400, False],
    ]
    interpreted.run("int8_gemm_cases:call", [*roads, *persistent])


@pytest.mark.interpreter
def test_extremes_empty_problems_refusals_and_gelu():
    by_road = [[name, road] for name, road in itertools.product(("extremes", "rounds_half_to_even"), ROADS)]
    empty = [["empty", *shape] for shape in ((0, 16, 32), (5, 0, 32), (5, 16, 0), (0, 0, 0))]
    refused = [["refuses", case] for case in ("strides", "address", "activation")]
    interpreted.run(
        "int8_gemm_cases:call", [*by_road, *empty, *refused, ["gelu_is_exact"], ["activations_are_those_of_cpus"]]
    )


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


def build(
    tile: TileConfig, out: str, *, activation: Activation = Activation.GELU, bias: str | None = "fp32", even_k: bool = True,
    odd_k: bool = False,
) -> sm90.Built:  # fmt: skip
    """A road's kernel as its launcher asks for it; `odd_k`: rows start anywhere."""
    from qbert.kernels import int8_gemm

    meta = Int8Meta(tile.block_t, tile.block_n, tile.block_k, int(activation))
    block = lambda dtype, rows, columns: f"tensordesc<{dtype}[{rows}, {columns}]>"
    operands = {
        "q_desc": block("i8", tile.block_t, tile.block_k), "w_desc": block("i8", tile.block_n, tile.block_k),
    }  # fmt: skip
    if tile.road == "tma":
        parts = subtiles(tile, BYTES[out])
        kernel, meta = int8_gemm.int8_gemm_tma, meta._replace(GROUP=tile.group, SUBTILES=parts)
        operands["out_desc"] = block(out, tile.block_t, tile.block_n // parts)
    elif tile.road == "few":
        kernel, operands = int8_gemm.int8_gemm_few, {**operands, "out_ptr": f"*{out}"}
    else:
        kernel, meta = int8_gemm.int8_gemm_pointer, meta._replace(GROUP=tile.group, EVEN_K=even_k)
        operands = {"q_ptr": "*i8", "w_ptr": "*i8", "out_ptr": f"*{out}"}
    sizes = ("i32",) * (3 if tile.road == "pointer" else 2)
    arguments = {**operands, "end": _end(bias and f"*{bias}"), "t": "i32", "sizes": sizes, "META": sm90.Constant(meta)}
    unaligned = ("t", "sizes") if odd_k else ("t",)
    return sm90.build(
        kernel, arguments, warps=tile.warps, stages=tile.stages, unaligned=unaligned, enable_fp_fusion=False
    )  # fmt: skip


def _end(bias: str | None) -> End:
    return End("*fp32", "*fp32", bias, "fp32")


def check(tile: TileConfig, out: str, **options: object) -> None:
    built = build(tile, out, **options)
    resident = 1
    if tile.road == "tma":
        resident = programs(tile, 65_536, 4096, BYTES[out], H100) // H100.sm_count
    wgmma = tile.road != "few" or tile.block_n >= 64
    found = sm90.problems(built, wgmma=wgmma, tma=tile.road != "pointer", blocks_per_sm=resident)
    assert not found, f"{tile} {out} {options}: {found}"
    assert built.shared <= shared_bytes(tile, BYTES[out]), f"{tile} {out}: {built.shared} bytes"
    assert "fma.rn.f32" not in built.ptx or options.get("activation") is not Activation.NONE, (
        "the reference rounds products before it adds"
    )
    if not wgmma:
        assert built.count("IMMA") > 0
    if tile.road == "tma":
        assert built.count("UTMASTG") == subtiles(tile, BYTES[out]), "one epilogue, stored by the copy engine"


@pytest.mark.compile
@pytest.mark.parametrize(
    ("tile", "out", "activation"),
    [
        (TileConfig("tma", 128, 256, 128, 8, 4), "bf16", Activation.NONE),
        (TileConfig("tma", 128, 256, 128, 8, 4), "i8", Activation.GELU),
        (TileConfig("tma", 128, 128, 128, 4, 3), "bf16", Activation.GELU),
        (TileConfig("tma", 128, 128, 128, 4, 3), "i8", Activation.GELU),
        (TileConfig("tma", 128, 128, 128, 4, 3), "fp32", Activation.NONE),
        (TileConfig("tma", 128, 128, 128, 4, 3), "bf16", Activation.RELU),
        (MORE_WARPS, "i8", Activation.GELU_TANH),
        (TileConfig("few", 16, 16, 256, 4, 8), "bf16", Activation.NONE),
        (TileConfig("few", 16, 16, 256, 4, 8), "i8", Activation.SILU),
        (TileConfig("pointer", 128, 128, 128, 8, 3), "i8", Activation.GELU),
    ],
    ids=lambda value: f"{value.road}-{value.block_t}x{value.block_n}" if isinstance(value, TileConfig) else str(value),
)
def test_machine_code(tile: TileConfig, out: str, activation: Activation):
    check(tile, out, activation=activation)


@pytest.mark.compile
def test_rows_that_start_anywhere_spill_nothing():
    check(ANY_SHAPE, "i8", even_k=False, odd_k=True)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("out", BYTES)
@pytest.mark.parametrize("tile", [*tiles_of("w8a8_linear"), ANY_SHAPE], ids=str)
def test_machine_code_of_every_tile(tile: TileConfig, out: str):
    for activation, bias in itertools.product(Activation, (None, "bf16")):
        if not spills(tile, BYTES[out], activation):
            check(tile, out, activation=activation, bias=bias)
    if tile.road == "pointer":
        check(tile, out, even_k=False)


@pytest.mark.compile
@pytest.mark.parametrize("sm", [80, 89])
def test_older_gpus_multiply_int8_and_copy_ahead(sm: int):
    import triton
    from triton.backends.compiler import GPUTarget

    from qbert.kernels.int8_gemm import int8_gemm_pointer

    meta = Int8Meta(128, 128, 128, ACTIVATION=1, GROUP=8, EVEN_K=True)
    arguments = {
        "q_ptr": "*i8", "w_ptr": "*i8", "out_ptr": "*bf16", "end": _end("*fp32"), "t": "i32", "sizes": ("i32",) * 3,
        "META": sm90.Constant(meta),
    }  # fmt: skip
    source = sm90.source(int8_gemm_pointer, arguments)
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


def _assert_bits(a: Linear) -> None:
    """Without GELU every step is an IEEE operation: the reference, on the GPU too, gives the same bits."""
    assert torch.equal(launch(a), reference.linear(a))


def _on_gpu(t: int, n: int, k: int, **options: object) -> Linear:
    return random_problem("linear", t, n, k, layout=Layout.INT8_ROWS, device="cuda", **options)


@on_gpu
@pytest.mark.parametrize("int8_out", [False, True])
@pytest.mark.parametrize(("n", "k"), BERT)
def test_bert_shapes_on_gpu(int8_out: bool, n: int, k: int, poisoned: None):
    options = {"dtype": torch.bfloat16, "int8_out": int8_out}
    for t in (1, 16, 33, 64, 100, 128, 384, 1000, 4096):
        _assert_bits(_on_gpu(t, n, k, **options))
    a = _on_gpu(200, n, k, activation="gelu", **options)
    assert_matches_reference(a, launch(a))


@on_gpu
@pytest.mark.parametrize("int8_out", [False, True])
def test_odd_and_random_shapes_on_gpu(int8_out: bool, poisoned: None):
    draw = random.Random()
    shapes = [*ODD, *((draw.randint(1, 3000), draw.randint(1, 2000), draw.randint(1, 3000)) for _ in range(10))]
    for (t, n, k), dtype in itertools.product(shapes, (torch.float32, torch.float16)):
        print(t, n, k, dtype)  # what failed, for the shapes are different in each run
        _assert_bits(_on_gpu(t, n, k, dtype=dtype, int8_out=int8_out))


@on_gpu
@pytest.mark.parametrize("tile", [*tiles_of("w8a8_linear"), ANY_SHAPE], ids=str)
def test_every_tile_on_gpu(tile: TileConfig, poisoned: None):
    """Ten runs of each tile: all of one problem are the same bits, with and without GELU."""
    for int8_out, activation in itertools.product((False, True), ("none", "gelu")):
        a = _on_gpu(1500, 1040, 784, activation=activation, int8_out=int8_out)
        expected = launch(a)
        if activation == "none":
            assert torch.equal(expected, reference.linear(a))
        with forced("w8a8_linear", tile):
            for _ in range(10):
                assert torch.equal(launch(a), expected)


@on_gpu
def test_a_captured_launch_computes_what_its_inputs_hold_when_it_replays():
    tensors_of = lambda a: (a.x, a.s, a.bias, *a.weight.tensors.values())
    for t in (8, 100, 2000):
        first, second, held = (_on_gpu(t, 768, 768, seed=seed, int8_out=True) for seed in (0, 1, 0))
        launch(held)  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = launch(held)
        for a in (second, first):
            for mine, theirs in zip(tensors_of(held), tensors_of(a), strict=True):
                mine.copy_(theirs)
            graph.replay()
            assert torch.equal(out, reference.linear(a._replace(out=held.out)))
