"""INT8 attention: in Triton's interpreter against the reference, compiled for sm_90, and on a GPU where there is one."""

import importlib.util
import random

import attention_cases as cases
import pytest
import sm90
import torch
from interpreted import run
from launchers import H100, is_left_to_others, launch, obstacle_of

from qbert.errors import QBertError
from qbert.ops.operations import Attention
from qbert.ops.triton import attention
from qbert.ops.triton.arguments import AttentionMeta, Heads
from qbert.tiles import tiles_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'qbert[triton]'", allow_module_level=True)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


# ---- interpreter ----------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_results_are_the_references():
    shapes = [
        {"heads": 1, "head_dim": 64, "lengths": [1]},
        {"heads": 2, "head_dim": 64, "lengths": [63, 0, 64, 65, 0]},
        {"heads": 3, "head_dim": 32, "lengths": [0, 130, 5], "dtype": "bfloat16"},
        {"heads": 1, "head_dim": 64, "lengths": [257, 7], "dtype": "float16"},
        {"heads": 2, "head_dim": 20, "lengths": [40, 90]},
        {"heads": 1, "head_dim": 128, "lengths": [70, 3]},
        {"heads": 1, "head_dim": 32, "lengths": [513]},
    ]
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
def test_sums_are_exact_beyond_what_float32_holds():
    run("attention_cases:sums_are_exact", [[256], [260], [600]])


@pytest.mark.interpreter
def test_the_batch_does_not_show():
    lengths_and_others = [(30, [5]), (150, [1] * 10), (100, [384]), (530, [1] * 3)]
    run("attention_cases:the_batch_does_not_show", [
        [*each, per_token] for each in lengths_and_others for per_token in (False, True)
    ])  # fmt: skip


@pytest.mark.interpreter
def test_nan_stays_in_its_sequence():
    run("attention_cases:nan_stays_in_its_sequence", [
        [[10, 70, 3], which, column, value] for which in (0, 1) for column in range(3) for value in ("nan", "inf")
    ])  # fmt: skip
    run("attention_cases:static_nan_is_everywhere", [[0, "nan"], [1, "nan"], [2, "nan"], [2, "inf"]])


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


@pytest.mark.parametrize("head_dim", [8, 32, 48, 64, 80, 128])
@pytest.mark.parametrize("average", [1, 64, 128, 384, 65_536])
@pytest.mark.parametrize("per_token", [False, True])
def test_every_problem_has_a_tile(head_dim, average, per_token):
    tile = attention.attention_tile(head_dim, average, per_token, H100)
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
    registers = registers_of(tile, head_dim, out, per_token, distances)
    blocks = 1 if registers is None else sm90.REGISTER_FILE // (registers * tile.warps * 32)
    built = compiled(tile, head_dim, out, per_token, distances, per_head)
    assert not sm90.problems(built, wgmma=True, blocks_per_sm=blocks)
    assert built.count("HGMMA") > 0, "codes times values"
    assert built.count("HMMA") == 0


TILES = [(tile, False) for tile in tiles_of("attention_int8")] + [
    (tile, True) for tile in tiles_of("attention_int8_per_token")
]


@pytest.mark.compile
@pytest.mark.parametrize(("tile", "per_token"), TILES, ids=str)
def test_compiles_for_sm90(tile, per_token):
    check(tile, tile.block_k, "i8", per_token)


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
