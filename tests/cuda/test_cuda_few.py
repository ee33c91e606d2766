"""Linears of few tokens on an emulated H100, of int8 and of 16 bits, that read every weight once; and weights made dense."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest
import torch

from qbert import testing
from qbert.errors import QBertError
from qbert.formats import SCHEMES, PerGroup
from qbert.ops import cuda
from qbert.ops.abi import Activation
from qbert.ops.operations import Linear
from qbert.quantizers import quantize
from qbert.weight import Layout, Weight, codec

INT8_TOKENS = ("gobo3a8", "gobo4a8", "w4a8")
FLOAT_TOKENS = ("w8a16", "w4a16", "gobo3", "gobo4")
LAYOUTS = {**dict.fromkeys(INT8_TOKENS, Layout.FRAGMENTS_S8), **dict.fromkeys(FLOAT_TOKENS, Layout.FRAGMENTS_F16)}
SCHEMES_OF_FEW = (*INT8_TOKENS, *FLOAT_TOKENS)
# Tokens x channels of a thread block / thread blocks that share the columns.
PLANS = ("16x64/1", "16x128/8", "32x256/2", "64x64/4", "64x256/2", "128x64/2", "128x128/4")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poisoned")


def plans_of(scheme):
    return [plan for plan in PLANS if scheme in INT8_TOKENS or not plan.startswith("128")]


def problem_of(scheme, t, n, k, *, dtype=torch.bfloat16, **chosen):
    layout = LAYOUTS[scheme.removesuffix("-g32")]
    return testing.random_problem("linear", t, n, k, scheme=scheme, layout=layout, dtype=dtype, **chosen)


def with_weight(a, scheme=None, **tensors):
    """The same with other tensors of the weight."""
    weight = replace(a.weight, scheme=scheme or a.weight.scheme, tensors={**a.weight.tensors, **tensors})
    return a._replace(weight=weight)


def run(a, plan=""):
    few = "" if a.s is None else "few " if plan else "few"
    return cuda.linear(a, tile=few + plan)


def check(a, plan=""):
    testing.assert_matches_reference(a, run(a, plan))


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES_OF_FEW)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 1, 128), (5, 64, 256), (16, 100, 640), (17, 200, 1024), (64, 330, 384)])
def test_sizes(scheme, t, n, k):
    for plan, dtype in zip(["", *plans_of(scheme)], itertools.cycle(SIXTEEN_BITS), strict=False):
        check(problem_of(scheme, t, n, k, seed=t, dtype=dtype), plan)


@pytest.mark.parametrize("k", [16, 100, 127, 200])
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8", "w8a16", "gobo3", "gobo4"])
def test_padded_columns(scheme, k):
    check(problem_of(scheme, 9, 70, k), "16x128/2")


@pytest.mark.parametrize("scheme", SCHEMES_OF_FEW)
def test_more_blocks_than_stages(scheme):
    """So that the ring of stages goes round, and the most stages there are."""
    for plan in ("16x64/1", "64x128/1"):
        check(problem_of(scheme, 3, 100, 6144), plan)


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("groups", [1, 3, 5, 8])
def test_groups(scheme, size, groups):
    """Also rows that end within a block of 128 columns, and blocks that several thread blocks share."""
    a = problem_of(f"{scheme}-g32", 7, 72, size * groups)
    name = "group_scale" if scheme == "w4a8" else "scale"
    wide = replace(a.weight.scheme, name=f"{scheme}-g{size} here", granularity=PerGroup(size))
    a = with_weight(a, wide, **{name: a.weight.tensors[name][:, :: size // 32].contiguous()})
    for plan in ("16x64/1", "16x64/4"):
        check(a, plan)


@pytest.mark.parametrize("scheme", SCHEMES_OF_FEW)
@pytest.mark.parametrize(("n", "bias", "activation"), [(200, True, "gelu"), (65, False, "none"), (66, False, "gelu")])
def test_ends(scheme, n, bias, activation):
    chosen = {"bias": bias, "activation": activation}
    for dtype in (torch.float32, *SIXTEEN_BITS) if scheme in INT8_TOKENS else SIXTEEN_BITS:
        check(problem_of(scheme, 20, n, 256, dtype=dtype, **chosen), "32x128/2")
    if scheme in INT8_TOKENS:
        check(problem_of(scheme, 20, n, 256, int8_out=True, **chosen), "32x128/2")


@pytest.mark.parametrize(("matrices", "n"), [(3, 3 * 40), (2, 2 * 64), (7, 7 * 9)])
@pytest.mark.parametrize("scheme", ["gobo3a8", "gobo4a8"])
def test_stacked_matrices(scheme, matrices, n):
    """Which meet within a block of 64 rows, and within eight."""
    check(problem_of(scheme, 20, n, 256, matrices=matrices), "32x64/2")


@pytest.mark.parametrize("scheme", INT8_TOKENS)
def test_integer_sums_have_the_same_bits_however_they_are_cut(scheme):
    """And those of the kernel for many tokens: outliers, which are float32, included."""
    a = problem_of(scheme, 70, 200, 640, dtype=torch.float32)
    many = cuda.linear(a, tile="64x128x128 pingpong")
    for plan in plans_of(scheme):
        assert torch.equal(run(a, plan), many), plan


@pytest.mark.parametrize("scheme", FLOAT_TOKENS)
def test_a_token_does_not_depend_on_the_others(scheme):
    """What is chosen for any number of tokens shares the columns in the same way."""
    a = problem_of(scheme, 64, 200, 1024)
    together = run(a)
    for start, stop in ((3, 4), (0, 16), (30, 50)):
        assert torch.equal(run(a._replace(x=a.x[start:stop].contiguous())), together[start:stop])


# ---- decoding -------------------------------------------------------------------------------------------------------


def without_outliers(a):
    if a.weight.sparse is None:
        return a
    rowptr, col, delta = a.weight.sparse
    return with_weight(a, outlier_rowptr=torch.zeros_like(rowptr), outlier_col=col[:0], outlier_delta=delta[:0])


@pytest.mark.parametrize("scheme", FLOAT_TOKENS)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_every_weight_of_float_tokens(scheme, dtype):
    """Read by unit vectors for tokens: rounded once to their type. More tokens read a dense copy of the weight."""
    n, k = 130, 256
    a = problem_of(scheme, 1, n, k, bias=False, dtype=dtype)
    a = without_outliers(a._replace(x=torch.eye(k, dtype=dtype)))
    expected = testing.evaluate(a, torch.float64).to(dtype)
    assert expected.unique().numel() >= 8
    assert torch.equal(run(a), expected)
    for first in range(0, k, 64):
        few = a._replace(x=a.x[first : first + 64].contiguous())
        assert torch.equal(run(few), expected[first : first + 64])


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_every_int8_code(dtype):
    codes = torch.arange(-128, 128, dtype=torch.int8).view(2, 128).repeat(32, 1)
    plain, layout = {"qdata": codes, "scale": torch.ones(64)}, LAYOUTS["w8a16"]
    weight = Weight(SCHEMES["w8a16"], (64, 128), Layout.PLAIN, plain).to_layout(layout)
    for units in torch.eye(128, dtype=dtype).split(64):
        found = run(Linear(units, None, weight, None, Activation.NONE, False, dtype))
        assert torch.equal(found, units @ codes.t().to(dtype))


@pytest.mark.parametrize("scheme", INT8_TOKENS)
def test_every_weight_of_int8_tokens(scheme):
    """The largest operands, too."""
    n, k = 130, 256
    a = without_outliers(problem_of(scheme, 1, n, k, bias=False, dtype=torch.float32))
    a = a._replace(x=torch.eye(k, dtype=torch.int8), s=torch.ones(k))
    if a.weight.codebook is not None:
        codebook = torch.randint(-128, 128, a.weight.codebook.shape, dtype=torch.int8)
        a = with_weight(a, codebook=codebook, scale=torch.ones(1))
    else:
        groups = a.weight.group_scale
        group_scale = (torch.arange(groups.numel()) % 18 + 1).to(torch.uint8).view(groups.shape)
        a = with_weight(a, group_scale=group_scale, scale=torch.ones(n))
    expected = codec.operand(a.weight)
    for plan in ("64x64/1", "128x128/2"):
        assert torch.equal(run(a, plan).t(), expected.to(torch.float32))


@pytest.mark.parametrize("scheme", FLOAT_TOKENS)
def test_float32_tokens_read_a_dense_copy_of_the_weight(scheme):
    """Outliers in it bit for bit."""
    n, k = 70, 384
    a = problem_of(scheme, 1, n, k, bias=False, dtype=torch.float32)
    found = run(a._replace(x=torch.eye(k)))
    weight = quantize(testing.random_weight(n, k, seed=2), SCHEMES[scheme])
    assert torch.equal(found.t(), codec.decode(weight))


# ---- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", FLOAT_TOKENS)
def test_a_token_that_is_not_finite_stays_alone(scheme, value):
    a = problem_of(scheme, 12, 100, 200 if scheme != "w4a16" else 256, activation="none")
    a.x[5, 17] = value
    found = run(a, "16x128/2")
    testing.assert_matches_reference(a, found)
    finite = found.isfinite().all(dim=1)
    assert finite.tolist() == [token != 5 for token in range(12)]


# ---- schedules ------------------------------------------------------------------------------------------------------


def random_problem(scheme, source):
    t, n = source.choice((1, 5, 16, 17, 64, 128 if scheme in INT8_TOKENS else 33)), source.choice((1, 64, 100, 200))
    k = source.choice((128, 640, 1024) if "w4" in scheme else (16, 128, 100, 640, 1024))
    # GELU of a token's only value may vanish, and nothing is left to measure errors by.
    chosen = {"bias": source.random() < 0.5, "activation": source.choice(("none", "gelu")) if n > 1 else "none"}
    return problem_of(scheme, t, n, k, dtype=source.choice(SIXTEEN_BITS), seed=t, **chosen)


@pytest.mark.parametrize("seed", range(1, 7))
def test_any_schedule(emulated, seed):
    source = random.Random(seed)
    emulated.emulate(seed=seed, multiprocessors=3)
    for scheme in SCHEMES_OF_FEW:
        check(random_problem(scheme, source), source.choice(plans_of(scheme)))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES_OF_FEW)
def test_many_schedules(emulated, scheme):
    for plan, seed in itertools.product(("", *plans_of(scheme)), range(12)):
        emulated.emulate(seed=seed, multiprocessors=3)
        check(random_problem(scheme, random.Random(f"{plan} {seed}")), plan)


# ---- choice and refusals --------------------------------------------------------------------------------------------


def shape_of(plan):
    return [int(number) for number in re.findall(r"\d+", plan)]


@pytest.mark.parametrize("code", ["int8", "int4", "dict4", "dict3"])
@pytest.mark.parametrize(("n", "k"), [(768, 768), (3072, 768), (768, 3072), (4096, 4096), (64, 128)])
def test_float_sums_are_cut_alike_for_any_number_of_tokens(emulated, n, k, code):
    plans = [shape_of(emulated.few_choose(t, n, k, code, False)) for t in range(1, 65)]
    assert len({cluster for _, _, cluster in plans}) == 1
    assert all(t <= plan[0] for t, plan in enumerate(plans, start=1))


@pytest.mark.parametrize(("n", "k"), [(768, 768), (768, 3072), (1024, 1024), (1024, 4096), (4096, 4096)])
def test_small_matrices_occupy_most_of_an_h100(emulated, n, k):
    for t in (1, 16, 64):
        _, channels, cluster = shape_of(emulated.few_choose(t, n, k, "dict3", True))
        assert -(-n // channels) * cluster >= 96


def test_tokens_share_a_block_of_as_many(emulated):
    for t, tokens in ((1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (128, 128)):
        assert shape_of(emulated.few_choose(t, 768, 768, "dict4", True))[0] == tokens


def linear_of(**changed):
    """Arguments of the binding itself, for tensors that lie nowhere."""
    arguments = {
        "t": 1, "n": 64, "k": 128, "x": 16, "x_pitch": 128, "x_type": 1, "code": "dict3", "codes": 16, "scale": 4, "groups": 1,
        "codebook": 4, "rowptr": 0, "col": 0, "col_bytes": 2, "delta": 0, "outliers": 0, "bias": 0, "bias_type": 0,
        "activation": 0, "out": 16, "out_pitch": 64, "stream": 0,
    }  # fmt: skip
    return {**arguments, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"t": 0}, "t is 0; allowed: 1"),
        ({"k": 0}, "k is 0; allowed: 1"),
        ({"x_type": 0}, "x is float32; allowed: bfloat16, float16"),
        ({"x_type": 3}, "x's type has the code 3"),
        ({"x_pitch": 127}, "rows of x are 127 elements apart; allowed: at least their length, 128"),
        ({"x_pitch": 132}, "rows of x are 264 bytes apart; allowed: multiples of 16"),
        ({"x": 8}, "x starts 8 bytes past a multiple of 16"),
        ({"codes": 8}, "codes starts 8 bytes past a multiple of 16"),
        ({"codebook": 0}, "codebook is a null pointer"),
        ({"code": "int2"}, "there is no code 'int2'; allowed: int4, dict4, dict3, int8"),
        ({"code": "int4", "groups": 3}, "3 groups do not divide k = 128"),
        ({"code": "int4", "groups": 8}, "groups of 16; allowed: 32, 64, multiples of 128, or one group"),
        ({"code": "int8", "outliers": 1}, "an integer weight has 1 outliers; allowed: none"),
        ({"outliers": 1, "col_bytes": 8}, "columns of outliers have 8 bytes; allowed: 2, 4"),
        ({"outliers": 1}, "rowptr is a null pointer"),
        ({"out_pitch": 63}, "rows of out are 63 elements apart; allowed: at least their length, 64"),
        ({"out_pitch": 2**62}, "rows of out are 4611686018427387904 elements apart; allowed: 1099511627760 bytes"),
        ({"tile": "16x64/3"}, "there is no tile '16x64/3'; allowed: 16x64/1, 16x64/2"),
        ({"tile": "128x64/1"}, "there is no tile '128x64/1'"),
    ],
)
def test_refusals_of_weight_only(emulated, changed, message):
    with pytest.raises(QBertError, match=re.escape(message)):
        emulated.weight_only_linear(**linear_of(**changed))


def test_refusals_of_plans():
    a = problem_of("gobo3a8", 1, 64, 128)
    with pytest.raises(QBertError, match="there is no tile '16x32/1'"):
        run(a, "16x32/1")


def test_no_device(emulated):
    emulated.emulate(seed=0, multiprocessors=0)
    a = problem_of("gobo3", 1, 64, 128)
    with pytest.raises(QBertError, match="device"):
        run(a)
