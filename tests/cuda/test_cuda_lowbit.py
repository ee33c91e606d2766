"""Linears of 3- and 4-bit weights with int8 tokens on an emulated H100: every kernel's own source and the real launchers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qbert import testing
from qbert.errors import QBertError
from qbert.ops import cuda
from qbert.weight import Layout, codec

MANY = ("64x128x128 pingpong", "128x128x128 pingpong", "128x256x128 cooperative")
FRAGMENTS = Layout.FRAGMENTS_S8


def problem_of(scheme, t, n, k, *, out=torch.float32, **chosen):
    chosen |= {"int8_out": True} if out == torch.int8 else {"dtype": out}
    return testing.random_problem("linear", t, n, k, scheme=scheme, layout=FRAGMENTS, **chosen)


def with_weight(a, **tensors):
    """The same with other tensors of the weight."""
    return a._replace(weight=replace(a.weight, tensors={**a.weight.tensors, **tensors}))


def without_outliers(a):
    rowptr, col, delta = a.weight.sparse
    return with_weight(a, outlier_rowptr=torch.zeros_like(rowptr), outlier_col=col[:0], outlier_delta=delta[:0])


def with_outliers(a, counts, columns=torch.int16):
    """A dictionary linear with so many outliers in each row, in any order of columns."""
    generator = torch.Generator().manual_seed(len(counts))
    k, total = a.x.shape[1], sum(counts)
    rowptr = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    col = torch.cat([torch.randperm(k, generator=generator)[:count] for count in counts]).to(columns)
    return with_weight(a, outlier_rowptr=rowptr, outlier_col=col, outlier_delta=torch.randn(total, generator=generator))


@pytest.fixture(autouse=True)
def two_multiprocessors(emulated, poisoned):
    """A single cluster, which goes through all tiles."""
    emulated.emulate(seed=0, multiprocessors=2)


def run(a, tile):
    return cuda.linear(a, tile=tile)


def check(a, tile):
    testing.assert_matches_reference(a, run(a, tile))


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", MANY)
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8", "w4a8"])
@pytest.mark.parametrize(("t", "n", "k"), [(1, 1, 64), (129, 63, 128), (65, 130, 384), (257, 200, 192)])
def test_sizes(scheme, t, n, k, tile):
    check(problem_of(scheme, t, n, k, seed=t), tile)


@pytest.mark.parametrize("k", [16, 100, 127, 129, 255])
def test_padded_columns(k):
    check(problem_of("gobo3a8", 70, 65, k), MANY[0])
    check(problem_of("gobo4a8", 70, 65, k), MANY[1])


@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8", "w4a8"])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("n", "bias", "activation"), [(200, True, "gelu"), (65, False, "none")])
def test_ends(scheme, out, n, bias, activation):
    a = problem_of(scheme, 77, n, 128, out=out, bias=bias, activation=activation)
    for tile in MANY:
        check(a, tile)


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w4a8", "w4a8-g128"])
@pytest.mark.parametrize("groups_past", [0, 1])
def test_groups(scheme, groups_past):
    """Also rows whose group scales no wide load can take, as they do not start where one may."""
    size = int(scheme[6:] or 64)
    check(problem_of(scheme, 9, 72, size * (512 // size + groups_past)), MANY[0])


def test_one_group_of_any_size():
    a = problem_of("w4a8", 9, 72, 64)
    assert a.weight.group_scale.shape == (72, 1)
    check(a, MANY[1])


def weights(scheme, n, k, tile):
    """The int8 operand that a kernel makes, read by unit vectors for tokens; and the reference's."""
    a = problem_of(scheme, k, n, k, bias=False)._replace(x=torch.eye(k, dtype=torch.int8), s=torch.ones(k))
    if a.weight.codebook is not None:
        codebook = torch.randint(-128, 128, a.weight.codebook.shape, dtype=torch.int8)
        a = with_weight(without_outliers(a), codebook=codebook, scale=torch.ones(1))
    else:
        groups = a.weight.group_scale
        group_scale = (torch.arange(groups.numel()) % 18 + 1).to(torch.uint8).view(groups.shape)
        a = with_weight(a, group_scale=group_scale, scale=torch.ones(n))
    return run(a, tile).t(), codec.operand(a.weight).to(torch.float32)


@pytest.mark.parametrize("tile", MANY)
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8", "w4a8-g32", "w4a8", "w4a8-g128"])
def test_every_weight(scheme, tile):
    found, expected = weights(scheme, 144, 256, tile)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("matrices", "n"), [(3, 3 * 40), (2, 2 * 64), (7, 7 * 9)])
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
def test_stacked_matrices(scheme, matrices, n):
    """Which meet within a block of 64 rows, and within eight."""
    a = problem_of(scheme, 20, n, 96, matrices=matrices)
    for tile in MANY:
        check(a, tile)


# ---- outliers -------------------------------------------------------------------------------------------------------


def exact_gobo(a):
    """(t, n) float32 in the documented order: sum * scale, outliers of the row by fused multiply-adds, * s, + bias."""
    q, (rowptr, col, delta) = a.x, a.weight.sparse
    sums = q.double() @ codec.operand(a.weight).double().t()
    value = (sums.float() * a.weight.scale).numpy()
    for row in range(a.weight.n):
        for at in range(int(rowptr[row]), int(rowptr[row + 1])):
            # 24 by 8 bits and 24 more: exact enough in extended precision that rounding twice shows nowhere here.
            product = np.longdouble(delta[at].item()) * q[:, int(col[at])].numpy().astype(np.longdouble)
            value[:, row] = (product + value[:, row].astype(np.longdouble)).astype(np.float32)
    return torch.from_numpy(value) * a.s[:, None] + a.bias


@pytest.mark.parametrize("tile", MANY)
@pytest.mark.parametrize("columns", [torch.int16, torch.int32])
@pytest.mark.parametrize("kind", ["few", "one rich row", "first and last"])
def test_outliers_in_their_order(kind, columns, tile):
    n = 150
    counts = {
        "few": [row * 7 % 4 for row in range(n)],
        "one rich row": [60 if row == 70 else 0 for row in range(n)],
        "first and last": [3 if row in (0, n - 1) else 0 for row in range(n)],
    }[kind]
    a = with_outliers(problem_of("gobo3a8", 140, n, 100), counts, columns)
    assert torch.equal(run(a, tile), exact_gobo(a))


# ---- the same bits everywhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8", "w4a8"])
def test_bits_depend_on_neither_tile_nor_batch(scheme, out):
    a = problem_of(scheme, 64, 136, 256, out=out, activation="gelu")
    if scheme.startswith("gobo"):
        a = with_outliers(a, [row % 3 for row in range(136)])
    whole = run(a, MANY[0])
    for tile in (*MANY[1:], "few", ""):
        assert torch.equal(run(a, tile), whole)
    alone = run(a._replace(x=a.x[40:41].clone(), s=a.s[40:41].clone()), MANY[1])
    assert torch.equal(alone[0], whole[40])


def every_schedule(scheme, t, n, k, schedules, emulated):
    """Each warpgroup of each block has several tiles of its own, and clusters different numbers of them."""
    a = problem_of(scheme, t, n, k)
    if scheme.startswith("gobo"):
        a = with_outliers(a, [row % 3 for row in range(n)])
    for tile in MANY:
        emulated.emulate(seed=0, multiprocessors=2)
        expected = run(a, tile)
        testing.assert_matches_reference(a, expected)
        for seed, multiprocessors in schedules:
            emulated.emulate(seed=seed, multiprocessors=multiprocessors)
            assert torch.equal(run(a, tile), expected)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_schedules(blocks, emulated):
    schedules = [(seed, multiprocessors) for seed in (1, 3, 6) for multiprocessors in (1, 2, 5)]
    every_schedule("gobo3a8", 520, 260, 128 * blocks, schedules, emulated)


@pytest.mark.parametrize("scheme", ["gobo3a8", "w4a8"])
def test_more_blocks_than_stages(scheme, emulated):
    every_schedule(scheme, 260, 130, 1280, [(1, 2), (3, 2), (2, 5)], emulated)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8", "w4a8"])
@pytest.mark.parametrize("k", [128, 384, 1024, 1280])
def test_more_schedules(scheme, k, emulated):
    """Also more token tiles than a group of their order has."""
    schedules = [(seed, multiprocessors) for seed in range(6) for multiprocessors in (2, 6)]
    every_schedule(scheme, 1290, 600, k, schedules, emulated)


# ---- through the binding --------------------------------------------------------------------------------------------


def binding_arguments(a, y, **changes):
    q, weight, (rowptr, col, delta) = a.x, a.weight, a.weight.sparse
    keep = {"q": q, "s": a.s, "codes": weight.qdata, "codebook": weight.codebook, "scale": weight.scale, "rowptr": rowptr,
            "col": col, "delta": delta, "bias": a.bias, "out": y}  # fmt: skip
    call = {name: tensor.data_ptr() for name, tensor in keep.items()}
    call |= {
        "t": q.shape[0],
        "n": len(rowptr) - 1,
        "k": q.shape[1],
        "q_pitch": q.stride(0),
        "code": "dict3",
        "group_scale": 0,
    }
    call |= {"groups": 1, "matrices": 1, "col_bytes": col.itemsize, "outliers": 0, "columns": 0, "bias_type": 0}
    call |= {"activation": 0, "out_pitch": y.stride(0), "out_type": 0, "inverse_out_scale": 0.0, "zero": 0, "stream": 0}
    return {**call, **changes}


@pytest.mark.parametrize(("pitch", "start"), [(64, 0), (67, 0), (64, 1), (80, 4)])
def test_rows_of_the_result_may_lie_anywhere(pitch, start, emulated):
    a = problem_of("gobo3a8", 40, 60, 128)
    memory = torch.full((41 * pitch,), 77.0)
    y = memory[start : start + 40 * pitch].view(40, pitch)[:, :60]
    emulated.lowbit_linear(**binding_arguments(a, y, tile=MANY[0]))
    assert torch.equal(y, exact_gobo(without_outliers(a)))
    y.fill_(77.0)
    assert bool((memory == 77.0).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": 0}, "t is 0; allowed: 1 "),
        ({"k": 200_000}, "k is 200000; allowed: 1 ... 132104, beyond which int32 sums could overflow"),
        ({"q_pitch": 120}, "rows of q are 120 elements apart; allowed: at least their length, 128"),
        ({"q_pitch": 130}, "rows of q are 130 bytes apart; allowed: multiples of 16"),
        ({"q": 0}, "q is a null pointer"),
        ({"q": 8}, "q starts 8 bytes past a multiple of 16"),
        ({"codes": 8}, "codes starts 8 bytes past a multiple of 16"),
        ({"code": "int8"}, "code is int8; allowed: int4, dict4, dict3"),
        ({"code": "dict2"}, "there is no code 'dict2'; allowed: int4, dict4, dict3, int8"),
        ({"matrices": 7}, "7 matrices do not divide n = 60"),
        ({"codebook": 0}, "codebook is a null pointer"),
        ({"outliers": -1}, "-1 outliers; allowed: 0 "),
        ({"outliers": 4, "col_bytes": 8}, "columns of outliers have 8 bytes; allowed: 2, 4"),
        ({"outliers": 4, "delta": 0}, "delta is a null pointer"),
        ({"outliers": 4, "tile": MANY[0]}, "columns is a null pointer"),
        ({"code": "int4"}, "group_scale is a null pointer"),
        ({"code": "int4", "group_scale": 1, "groups": 3}, "3 groups do not divide k = 128"),
        (
            {"code": "int4", "group_scale": 1, "groups": 8},
            "groups of 16; allowed: 32, 64, multiples of 128, or one group",
        ),
        ({"activation": 2}, "activation has the code 2; allowed: 0 ... 1"),
        ({"out_type": 3}, "out's type has the code 3; allowed: 0 ... 2"),
        ({"out_pitch": 59}, "rows of out are 59 elements apart; allowed: at least their length, 60"),
        ({"out_pitch": 2**62}, "rows of out are 4611686018427387904 elements apart; allowed: 1099511627760 bytes"),
        ({"tile": "big"}, "there is no tile 'big'; allowed: few, 64x128x128 pingpong, 128x128x128 pingpong"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refusals(changes, message, emulated):
    a = problem_of("gobo3a8", 4, 60, 128)
    with pytest.raises(QBertError) as refused:
        emulated.lowbit_linear(**binding_arguments(a, torch.empty(4, 60), **changes))
    assert message in str(refused.value)


# ---- the choice of a tile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "n", "k", "gelu", "tile"),
    [
        (1, 768, 768, False, "few"),
        (128, 1024, 4096, False, "few"),
        (256, 2304, 768, False, MANY[0]),  # tiles of 128 tokens would leave most multiprocessors idle
        (4096, 2304, 768, False, MANY[1]),
        (4096, 3072, 768, True, MANY[1]),
        (513, 64, 64, False, MANY[0]),  # outliers, if there are any, want a copy of the tokens
    ],
)
def test_choice(t, n, k, gelu, tile, emulated):
    for code in ("dict3", "dict4", "int4"):
        assert emulated.lowbit_choose(t, n, k, code, gelu=gelu, multiprocessors=132) == tile


def test_long_sums_take_the_tile_with_the_fewest_bytes(emulated):
    """Their end need not hide, and of four bits shared memory is what there is least of."""
    assert (
        emulated.lowbit_choose(16384, 1024, 4096, "dict4") == emulated.lowbit_choose(4096, 768, 3072, "int4") == MANY[2]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": 0}, "t is 0; allowed: 1 "),
        ({"n": -1}, "n is -1; allowed: 1 "),
        ({"n": 2**40}, "n is 1099511627776; allowed: 1 ... 2147482623"),
        ({"k": 2**62}, "k is 4611686018427387904; allowed: 1 "),
        ({"t": 2**31 - 1025, "n": 2**31 - 1025}, "tiles of 64 x 128; allowed: 536870911"),
        ({"multiprocessors": 0}, "multiprocessors is 0; allowed: 1 "),
    ],
    ids=str,
)
def test_problems_that_no_model_can_count(changes, message, emulated):
    """Of 2**40 channels the count of tiles is 0 as an int32, by which a model would divide."""
    problem = {"t": 1, "n": 64, "k": 64, **changes}
    choices = {
        "choose": {}, "add_norm_choose": {}, "lowbit_choose": {"code": "dict4"}, "lowbit_columns_bytes": {"outliers": 5},
        "few_choose": {"code": "dict4", "int8_activations": True},
    }  # fmt: skip
    for name, more in choices.items():
        with pytest.raises(QBertError) as refused:
            getattr(emulated, name)(**problem, **more)
        assert message in str(refused.value), name


def test_workspace_is_for_outliers_of_many_tokens_only(emulated):
    size = emulated.lowbit_columns_bytes
    assert size(t=1025, n=100, k=70, outliers=5) == 9 * 128 * 70
    assert size(t=1025, n=100, k=70, outliers=0) == size(t=64, n=100, k=70, outliers=5) == 0
    assert size(t=64, n=100, k=70, outliers=5, tile=MANY[0]) == 128 * 70
