"""INT8 attention: in Triton's interpreter against the reference, compiled for sm_90, and on a GPU where there is one."""

import importlib.util
import itertools
import random

import attention_cases as cases
import pytest
import sm90
import torch
from interpreted import run
from launchers import H100, ROWS, is_left_to_others, launch, obstacle_of

from qbert.errors import QBertError
from qbert.ops import table
from qbert.ops.kernel import Pattern, Problem
from qbert.ops.operations import Attention
from qbert.ops.triton import attention, rows
from qbert.ops.triton.arguments import AttentionMeta, Heads
from qbert.tiles import tiles_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'qbert[triton]'", allow_module_level=True)

PATTERNS = [
    {"window": 0}, {"window": 1}, {"window": 20}, {"window": 64}, {"window": 1000}, {"reach": 0}, {"reach": 5}, {"reach": 400},
    {"window": 20, "reach": 9},
]  # fmt: skip
FLOATS = [
    {"floats": "float32"}, {"floats": "float16", "dynamic": True, "window": 17}, {"floats": "float32", "rotary": True},
    {"floats": "bfloat16", "dynamic": True, "rotary": True}, {"floats": "bfloat16", "rotary": True, "window": 1},
    {"floats": "float32", "dynamic": True, "rotary": True, "window": 5, "reach": 3},
]  # fmt: skip

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


# ---- interpreter ----------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_results_are_the_references():
    shapes = [
        {"heads": 1, "head_dim": 64, "lengths": [1]},
        {"heads": 2, "head_dim": 64, "lengths": [63, 0, 64, 65, 0]},
        {"heads": 3, "head_dim": 32, "lengths": [0, 130, 5], "dtype": "bfloat16"},
        {"heads": 2, "head_dim": 20, "lengths": [40, 90], "dtype": "float16"},
        {"heads": 1, "head_dim": 128, "lengths": [70, 3]},
    ]
    _match_reference(shapes)


@pytest.mark.interpreter
@pytest.mark.slow
def test_results_of_long_sequences_are_the_references():
    _match_reference([
        {"heads": 1, "head_dim": 64, "lengths": [257, 7], "dtype": "float16"},
        {"heads": 1, "head_dim": 32, "lengths": [513]},
    ])  # fmt: skip


def _match_reference(shapes):
    run("attention_cases:matches_reference", [
        {"int8_out": int8_out, "per_token": per_token, **shape}
        for shape in shapes
        for int8_out in (False, True)
        for per_token in (False, True)
    ])  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.slow
def test_results_are_the_references_at_many_lengths():
    lengths = random.Random(0)
    run("attention_cases:matches_reference", [
        {
            "heads": 1, "head_dim": lengths.choice([32, 64, 96]), "seed": seed,
            "per_token": seed % 2 == 1, "lengths": [lengths.randrange(300) for _ in range(4)],
        }
        for seed in range(30)
    ])  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("per_token", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_results_by_distance_are_the_references(per_token):
    shapes = [
        {"heads": 1, "head_dim": 64, "lengths": [1]},
        {"heads": 3, "head_dim": 32, "lengths": [63, 0, 65, 1]},
        {"heads": 1, "head_dim": 20, "lengths": [5, 202]},
        {"heads": 1, "head_dim": 128, "lengths": [129]},
    ]
    run("attention_cases:matches_reference", [
        {"pattern": pattern, "int8_out": index % 3 == 2, "per_token": per_token, **shape}
        for index, pattern in enumerate(PATTERNS)
        for shape in shapes
    ])  # fmt: skip


@pytest.mark.interpreter
def test_results_of_floats_are_the_references():
    run("attention_cases:matches_reference", [
        {"heads": heads, "head_dim": head_dim, "lengths": lengths, "pattern": pattern, "int8_out": index % 3 == 2}
        for index, pattern in enumerate(FLOATS)
        for heads, head_dim, lengths in ((1, 64, [1, 0, 66 if index == 3 else 20]), (3, 20, [7, 10]))
    ])  # fmt: skip


@pytest.mark.interpreter
def test_codes_of_floats_are_the_references():
    run("attention_cases:rounds_as_the_reference", [
        [heads, head_dim, [3, 0, 1], pattern, bad]
        for pattern in FLOATS
        for heads, head_dim in ((1, 64), (3, 20), (17, 6), (2, 1), (1, 47))
        for bad in (None, "nan", "inf")
        if not (head_dim % 2 and "rotary" in pattern) and (bad is None or head_dim == 20)
    ])  # fmt: skip


@pytest.mark.interpreter
def test_a_window_passes_what_it_shows():
    run("attention_cases:a_wide_window_is_none", [[length, each] for length in (50, 130) for each in (False, True)])
    run("attention_cases:only_what_a_window_shows_is_passed", [[400, 0], [256, 64], [200, 65], [70, 300]])


@pytest.mark.interpreter
def test_what_has_no_rotation_is_nan():
    run("attention_cases:without_a_rotation_it_is_nan", [[False], [True]])


@pytest.mark.interpreter
def test_sums_are_exact_beyond_what_float32_holds():
    run("attention_cases:sums_are_exact", [[256], [260], [600]])


@pytest.mark.interpreter
def test_the_batch_does_not_show():
    lengths_and_others = [(30, [5]), (150, [1] * 10), (100, [140])]
    run("attention_cases:the_batch_does_not_show", [
        [*each, per_token] for each in lengths_and_others for per_token in (False, True)
    ])  # fmt: skip
    run("attention_cases:the_batch_does_not_show", [
        {"length": length, "others": others, "per_token": per_token, "pattern": pattern}
        for length, others, pattern in (
            (30, [5], {"reach": 30}), (100, [1] * 3, {"window": 30}), (100, [70], {"window": 70, "reach": 8}),
            (20, [1, 3], FLOATS[-1]),
        )
        for per_token in (False, True)
        if not (per_token and "floats" in pattern)
    ])  # fmt: skip


@pytest.mark.interpreter
def test_nan_stays_in_its_sequence():
    run("attention_cases:nan_stays_in_its_sequence", [
        [[10, 70, 3], which, column, value] for which in (0, 1) for column in range(3) for value in ("nan", "inf")
    ])  # fmt: skip
    run("attention_cases:static_nan_is_everywhere", [[0, "nan"], [1, "nan"], [2, "nan"], [2, "inf"]])
    run("attention_cases:nan_is_seen_in_its_window", [
        [column, value, reach] for column in range(3) for value in ("nan", "inf") for reach in (None, 3)
    ])  # fmt: skip
    run("attention_cases:bad_floats_are_seen_in_their_window", [["nan"], ["inf"]])


@pytest.mark.interpreter
def test_wrong_bounds_touch_nothing_else():
    wrong = [[0, 5000], [-9, 100], [50, 20, 90], [0, 2**31 - 1, 0, 100], [-(2**31), 2**31 - 1], [100, 0]]
    run("attention_cases:wrong_bounds_touch_nothing_else", [[each] for each in wrong])


@pytest.mark.interpreter
def test_nothing_to_do():
    run("attention_cases:nothing_to_do", [[]])


# ---- launcher -------------------------------------------------------------------------------------------------------


def test_arguments_are_refused_by_name():
    qkv, bounds = torch.zeros(4, 96, dtype=torch.int8), cases.bounds([4])
    a = Attention(qkv, torch.ones(3), bounds, 1, 1.0, None, None, None, torch.float32)
    with pytest.raises(QBertError, match="softmax_scale is 0"):
        launch(a._replace(softmax_scale=0.0))
    with pytest.raises(QBertError, match="qkv has strides"):
        launch(a._replace(qkv=qkv.t().contiguous().t()))
    with pytest.raises(QBertError, match="no sequence"):
        launch(a._replace(cu_seqlens=bounds[:1]))
    with pytest.raises(RuntimeError, match="scales must be"):
        launch(a._replace(scales=torch.ones(2)))
    with pytest.raises(QBertError, match="cpu; allowed: cuda"):
        launch(a)


def test_heads_wider_than_the_kernels_are_left_to_others():
    a = Attention(
        torch.zeros(4, 3 * 192, dtype=torch.int8),
        torch.ones(3),
        cases.bounds([4]),
        1,
        1.0,
        None,
        None,
        None,
        torch.float32,
    )
    assert obstacle_of(a) == "heads of 192; it takes up to 128"
    assert is_left_to_others(a)


def test_whatever_a_family_asks_for_is_taken():
    for asked in itertools.product((False, True), repeat=4):
        problem = Problem(None, None, 12, 64, torch.bfloat16, pattern=Pattern(*asked))
        assert table.select("attention", problem, H100) is ROWS["attention"], problem.pattern


@pytest.mark.parametrize("head_dim", [8, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("average", [1, 64, 128, 384, 65_536])
@pytest.mark.parametrize("narrow", [False, True])
def test_every_problem_has_a_tile(head_dim, average, narrow):
    tile = attention.attention_tile(head_dim, average, narrow, H100)
    assert tile.block_t in (64, 128)
    assert tile.block_t == 16 * tile.warps, "a warp of a wgmma holds 16 queries"


# ---- compiled for sm_90 ---------------------------------------------------------------------------------------------


PLAIN = attention.PLAIN
WINDOW, BIAS = PLAIN._replace(window="i32"), PLAIN._replace(bias="*fp32", reach="i32")


def registers_of(tile, head_dim, out, per_token, distances):
    return attention.max_registers(head_dim, per_token, tile.warps, out == "i8", distances)


def compiled(tile, head_dim, out, per_token, distances=PLAIN, per_head=False):
    from qbert.kernels.attention import attention_int8_kernel

    meta = AttentionMeta(head_dim, attention.block_d(head_dim), tile.block_t, per_token, per_head, PTX=True)
    arguments = {
        "tokens": ("*i8", "*fp32"), "cu_seqlens_ptr": "*i32", "out_ptr": f"*{out}", "t": "i32", "sequences": "i32",
        "heads": Heads("i32", "fp32", "fp32"), "distances": distances, "META": sm90.Constant(meta),
    }  # fmt: skip
    return sm90.build(
        attention_int8_kernel, arguments, warps=tile.warps, stages=tile.stages,
        unaligned=("t", "sequences", "number", "window", "reach", "positions"), enable_fp_fusion=False,
        maxnreg=registers_of(tile, head_dim, out, per_token, distances),
    )  # fmt: skip


def check(tile, head_dim, out, per_token, distances=PLAIN, per_head=False):
    registers = registers_of(tile, head_dim, out, per_token, distances) or sm90.MAX_REGISTERS + 1
    blocks = sm90.REGISTER_FILE // (registers * tile.warps * 32)
    built = compiled(tile, head_dim, out, per_token, distances, per_head)
    assert not sm90.problems(built, wgmma=True, blocks_per_sm=blocks)
    assert built.count("HGMMA") > 0, "codes times values"
    assert built.count("HMMA") == 0
    return built


TILES = [(tile, False) for tile in tiles_of("attention_int8")] + [
    (tile, True) for tile in tiles_of("attention_int8_per_token")
]


@pytest.mark.compile
@pytest.mark.parametrize(("tile", "per_token"), TILES, ids=str)
def test_compiles_for_sm90(tile, per_token):
    check(tile, tile.block_k, "i8", per_token)


NARROW = tiles_of("attention_int8_per_token")
BOTH = BIAS._replace(window="i32")


@pytest.mark.compile
@pytest.mark.parametrize(
    ("distances", "per_token", "per_head"),
    [(WINDOW._replace(positions="i32"), True, True), (WINDOW, False, False), (BIAS, True, False), (BOTH, False, False)],
    ids=["window, rotary", "window", "bias", "both"],
)
def test_distances_compile_for_sm90(distances, per_token, per_head):
    built = check(NARROW[0], 64, "i8", per_token, distances, per_head)
    assert built.shared <= compiled(NARROW[0], 64, "i8", per_token).shared, "biases are not copied ahead"


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("distances", [WINDOW, BIAS, BOTH, PLAIN._replace(positions="i32")], ids=str)
@pytest.mark.parametrize("out", ["i8", "fp32"])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("per_token", [False, True])
def test_every_distance_compiles_for_sm90(distances, out, head_dim, per_token):
    for tile in NARROW:
        if (head_dim <= 64) == (tile.block_k == 64):
            check(tile, head_dim, out, per_token, distances, per_head=per_token and out == "fp32")


def compiled_rounding(dtype, heads, head_dim, dynamic, rotary):
    from qbert.kernels.round_heads import round_heads_kernel

    meta = attention.heads_meta(heads, head_dim)
    arguments = {
        "qkv_ptr": f"*{dtype}", "given": None if dynamic else "*fp32", "rotation": ("*fp32", "i32") if rotary else None,
        "cu_seqlens_ptr": "*i32", "rounded": ("*i8", "*fp32" if dynamic else None), "t": "i32", "sequences": "i32",
        "heads": "i32", "META": sm90.Constant(meta),
    }  # fmt: skip
    return sm90.build(
        round_heads_kernel, arguments, unaligned=("t", "sequences", "heads", "rotation"),
        warps=rows.row_options(2 * meta.HALF * meta.HEADS)["num_warps"], enable_fp_fusion=False,
    )  # fmt: skip


@pytest.mark.compile
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("dtype", "heads", "head_dim"), [("bf16", 12, 64), ("fp32", 16, 128)])
def test_rounding_compiles_for_sm90(dtype, heads, head_dim, dynamic, rotary):
    built = compiled_rounding(dtype, heads, head_dim, dynamic, rotary)
    assert not sm90.problems(built)
    assert "fma.rn" not in built.ptx, "products are rounded, as in the reference"
    assert built.registers <= 128
    assert built.count("LDG.E.128") > 0


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("out", ["i8", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 128])
@pytest.mark.parametrize(("tile", "per_token"), TILES, ids=str)
def test_every_tile_compiles_for_sm90(tile, per_token, head_dim, out):
    if (head_dim <= 64) == (tile.block_k == 64):
        check(tile, head_dim, out, per_token)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("int8_out", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "lengths"),
    [
        (12, 64, [128] * 4), (16, 64, [384, 177, 33]), (12, 32, [512, 1, 0, 64, 65]), (2, 64, [256, 512]),
        (3, 20, [40, 90]), (2, 128, [100, 300]), (2, 64, [600, 513, 2000]), (1, 64, [1]),
    ],
)  # fmt: skip
def test_gpu_results_are_the_references(int8_out, heads, head_dim, lengths, per_token):
    for dtype in ("float32", "bfloat16", "float16"):
        options = {"int8_out": int8_out, "per_token": per_token, "dtype": dtype}
        cases.matches_reference(heads, head_dim, lengths, **options, device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("pattern", [*PATTERNS, *FLOATS], ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "lengths"),
    [(12, 64, [128] * 4), (2, 64, [600, 0, 1, 65]), (3, 20, [40, 300]), (2, 128, [1500])],
)
def test_gpu_results_by_distance_are_the_references(pattern, per_token, heads, head_dim, lengths):
    if not (per_token and "floats" in pattern):
        for int8_out in (False, True):
            options = {"int8_out": int8_out, "per_token": per_token, "pattern": pattern}
            cases.matches_reference(heads, head_dim, lengths, **options, device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pattern", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [None, "nan", "inf"])
def test_gpu_codes_of_floats_are_the_references(pattern, bad):
    for heads, head_dim in ((12, 64), (3, 20), (17, 6), (2, 128)):
        cases.rounds_as_the_reference(heads, head_dim, [100, 0, 513, 1], pattern, bad, device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("per_token", [False, True])
def test_gpu_a_wide_window_is_none(per_token):
    for length in (50, 64, 150, 600):
        cases.a_wide_window_is_none(length, per_token, device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_gpu_what_has_no_rotation_is_nan(dynamic):
    cases.without_a_rotation_it_is_nan(dynamic, device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("seed", range(10))
def test_gpu_random_lengths(seed):
    choose = random.Random(seed)
    lengths = [choose.randint(1, 512) for _ in range(choose.randint(1, 12))]
    cases.matches_reference(
        choose.choice([1, 3, 12]), choose.choice([32, 64, 72, 128]), lengths, per_token=seed % 2 == 1, seed=seed,
        device="cuda",
    )  # fmt: skip


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("half", [64, 256, 260, 1000])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_gpu_sums_are_exact(half, head_dim):
    cases.sums_are_exact(half, head_dim, device="cuda")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("length", [1, 30, 64, 65, 150, 384, 512, 530])
@pytest.mark.parametrize("others", [[5], [512, 512], [1] * 50])
def test_gpu_the_batch_does_not_show(length, others, per_token):
    cases.the_batch_does_not_show(length, others, per_token, heads=12, head_dim=64, device="cuda")
    for pattern in ({"window": 64}, {"reach": 128}, {"window": 30, "reach": 8}, *(() if per_token else FLOATS)):
        cases.the_batch_does_not_show(
            length, others, per_token, heads=2, head_dim=64, device="cuda", pattern=pattern
        )  # fmt: skip


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("column", range(3))
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_gpu_nan_stays_in_its_sequence(column, value):
    for which in range(2):
        cases.nan_stays_in_its_sequence([10, 70, 20], which, column, value, device="cuda")
    if (column, value) not in ((0, "inf"), (1, "inf")):
        cases.static_nan_is_everywhere(column, value, device="cuda")


@pytest.mark.gpu
@needs_gpu
def test_gpu_nan_is_seen_in_its_window():
    for value in ("nan", "inf"):
        cases.bad_floats_are_seen_in_their_window(value, device="cuda")
        for column, reach in itertools.product(range(3), (None, 3)):
            cases.nan_is_seen_in_its_window(column, value, reach, device="cuda")


@pytest.mark.gpu
@needs_gpu
def test_gpu_wrong_bounds_touch_nothing_else():
    for wrong in ([0, 5000], [-9, 100], [50, 20, 90], [0, 2**31 - 1, 0, 100], [-(2**31), 2**31 - 1], [100, 0]):
        cases.wrong_bounds_touch_nothing_else(wrong, device="cuda")


@pytest.mark.gpu
@needs_gpu
def test_gpu_every_element_is_written_and_always_the_same(monkeypatch):
    a = cases.to_device(cases.problem(12, 64, [100, 0, 512, 3]), "cuda")
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **k: empty(*args, **k).fill_(float("inf")))
    first = launch(a)
    assert bool(first.isfinite().all())
    assert all(torch.equal(first, launch(a)) for _ in range(10))
