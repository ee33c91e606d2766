"""The native weight-only linears: every instruction set, every format, odd shapes, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qbert import ops
from qbert.formats import SCHEMES, PerGroup
from qbert.ops import table
from qbert.ops.abi import Activation
from qbert.ops.kernel import problem_of
from qbert.ops.operations import Linear
from qbert.target import Target, native_cpu
from qbert.testing import assert_matches_reference, random_problem, schemes_of
from qbert.weight import Layout, Weight
from qbert.weight.layout import PANEL_LAYOUTS, layouts_of, panels

_cpu: Any = native_cpu()
if _cpu is None:
    pytest.skip("the native extension is not built, or QBERT_CPU_ISA=torch does without it", allow_module_level=True)

WEIGHT_ONLY = [name for name in schemes_of("linear") if SCHEMES[name].activation is None]
SCHEMES_OF_ALL = pytest.mark.parametrize("scheme", WEIGHT_ONLY)
DTYPES = pytest.mark.parametrize("dtype", ops.FLOAT_DTYPES, ids=str)
# (t, n, k): all numbers of tokens that take another way, panels in fours and left over, k with and without padding.
SIZES = [
    (0, 3, 17), (1, 1, 1), (1, 130, 192), (2, 77, 100), (3, 17, 1023), (5, 64, 64), (8, 20, 130), (17, 3, 64), (33, 70, 100),
    (70, 33, 256), (129, 18, 65),
]  # fmt: skip
GROUP_SIZES = {name: SCHEMES[name].group_size or 1 for name in WEIGHT_ONLY}


@pytest.fixture(params=_cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def problem(scheme: str, t: int, n: int, k: int, **options: Any) -> Linear:
    """In panels; k is rounded up to whole groups."""
    layout = next(each for each in layouts_of(SCHEMES[scheme]) if each in PANEL_LAYOUTS)
    size = GROUP_SIZES[scheme]
    return random_problem("linear", t, n, -(-k // size) * size, scheme=scheme, layout=layout, **options)


def native() -> table.Kernel:
    """The native kernel of the instruction set in use."""
    return next(row for row in table.KERNELS["linear"] if row.name == f"native {_cpu.isa()}")


def obstacle(a: Linear) -> str | None:
    return native().obstacle(problem_of(a), Target("cpu", _cpu.isa(), native=True))


def run(a: Linear) -> Tensor:
    """The native implementation itself: torch's would give the same result, but not be tested here."""
    a.check()
    assert obstacle(a) is None
    return native().call(a)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


# ---- values ---------------------------------------------------------------------------------------------------------


@SCHEMES_OF_ALL
@pytest.mark.parametrize(("t", "n", "k"), SIZES)
def test_matches_reference(isa, scheme, t, n, k):
    dtype = ops.FLOAT_DTYPES[(t + n) % len(ops.FLOAT_DTYPES)]
    a = problem(scheme, t, n, k, dtype=dtype, activation=list(Activation)[(t + n + k) % 5], bias=t != 5)
    assert_matches_reference(a, run(a))


@SCHEMES_OF_ALL
@DTYPES
@pytest.mark.parametrize("t", [1, 16])
def test_matches_reference_at_an_encoders_size(scheme, dtype, t):
    """Sums of 3072 products: what float32 loses grows with their number."""
    a = problem(scheme, t, 40, 3072, dtype=dtype)
    assert_matches_reference(a, run(a))


@SCHEMES_OF_ALL
@DTYPES
def test_bias_of_another_type(scheme, dtype):
    a = problem(scheme, 3, 50, 100)
    a = a._replace(bias=a.bias.to(dtype))
    assert_matches_reference(a, run(a))
    assert run(a._replace(bias=a.bias.to(torch.float64))).shape == (3, 50)


@SCHEMES_OF_ALL
def test_operator_runs_it(scheme):
    a = problem(scheme, 3, 50, 100)
    assert_same_bits(ops.call(a), run(a))


# ---- bits -----------------------------------------------------------------------------------------------------------


@SCHEMES_OF_ALL
@DTYPES
def test_every_instruction_set_gives_the_same_bits(scheme, dtype):
    a = problem(scheme, 9, 150, 200, dtype=dtype, activation="gelu")
    before = _cpu.isa()
    results = []
    for name in _cpu.supported_isas():
        _cpu.use_isa(name)
        results.append(run(a))
    _cpu.use_isa(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@SCHEMES_OF_ALL
def test_a_token_does_not_see_its_batch(isa, scheme):
    a = problem(scheme, 131, 70, 100)
    together = run(a)
    for t in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 31, 64, 65, 130):
        assert_same_bits(run(a._replace(x=a.x[:t])), together[:t])
        assert_same_bits(run(a._replace(x=a.x[-t:])), together[-t:])


@SCHEMES_OF_ALL
@pytest.mark.parametrize("t", [1, 7, 200])
def test_the_number_of_threads_does_not_show(threads, scheme, t):
    a = problem(scheme, t, 1000, 768, dtype=torch.bfloat16)
    threads(1)
    alone = run(a)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(run(a), alone)


@SCHEMES_OF_ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("t", [4, 20])
def test_what_is_not_finite_stays_in_its_row(isa, scheme, bad, t):
    a = problem(scheme, t, 40, 100, activation="gelu")
    clean = run(a)
    a.x[2, 13] = bad
    found = run(a)
    others = [row for row in range(t) if row != 2]
    assert_same_bits(found[others], clean[others])
    assert_matches_reference(a, found)


# ---- arguments ------------------------------------------------------------------------------------------------------


@SCHEMES_OF_ALL
@DTYPES
def test_activations_need_not_be_contiguous(scheme, dtype):
    a = problem(scheme, 6, 40, 128, dtype=dtype)
    x, want = a.x, run(a)
    wide = torch.full((12, x.shape[1] + 9), float("nan"), dtype=dtype)
    rows, columns = wide[::2, 4:-5], x.t().contiguous().t()
    rows.copy_(x)
    for other in (rows, columns):
        assert not other.is_contiguous()
        assert_same_bits(run(a._replace(x=other)), want)
    assert_same_bits(run(a._replace(x=x[:1].expand(6, -1))), want[:1].expand(6, -1))


@pytest.mark.parametrize(("n", "k"), [(0, 64), (5, 0), (0, 0)])
def test_no_channel_and_no_input(isa, n, k):
    x, bias = torch.randn(3, k), torch.randn(n)
    tensors = panels.pack_int8(torch.ones(n, k, dtype=torch.int8)), torch.ones(n)
    weight = Weight.of(tensors, SCHEMES["w8a16"], Layout.INT8_PANELS, k)
    y = run(Linear(x, None, weight, bias, Activation.NONE, False, x.dtype))
    assert torch.equal(y, bias.expand(3, n))


@SCHEMES_OF_ALL
def test_other_layouts_are_left_to_torch(scheme):
    for layout in layouts_of(SCHEMES[scheme]):
        if layout not in PANEL_LAYOUTS:
            a = random_problem("linear", 2, 3, 2 * GROUP_SIZES[scheme], scheme=scheme, layout=layout)
            assert obstacle(a) == f"it does not read {scheme} weights in layout {layout.value}"


@pytest.mark.parametrize(("size", "runs"), [(32, True), (64, True), (128, True), (96, True), (8, False), (48, False)])
def test_groups_that_no_scheme_has(size, runs):
    """Multiples of 32 are computed; others, which the panels could hold too, are left to torch."""
    x, _, weight, bias, *end = problem("w4a16-g32", 3, 100, 384)
    scheme = replace(weight.scheme, granularity=PerGroup(size))
    tensors = {**weight.tensors, "scale": weight.scale.repeat(1, 4)[:, : 384 // size].contiguous()}
    a = Linear(x, None, Weight(scheme, (100, 384), weight.layout, tensors), bias, *end)
    a.check()
    assert obstacle(a) == (None if runs else f"groups of {size}; it takes multiples of 32")
    assert_matches_reference(a, run(a) if runs else ops.checked_run(a))


# ---- outliers -------------------------------------------------------------------------------------------------------


def with_outliers(rows: list[list[int]], t: int, k: int, column_type: torch.dtype) -> Linear:
    """A gobo3 problem with outliers in these columns of each row."""
    a = problem("gobo3", t, len(rows), k)
    col = torch.tensor([column for row in rows for column in row], dtype=column_type)
    outliers = {
        "outlier_rowptr": torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32),
        "outlier_col": col,
        "outlier_delta": torch.randn(col.numel(), generator=torch.Generator().manual_seed(1)),
    }
    held = a.weight
    return a._replace(weight=Weight(held.scheme, held.shape, held.layout, {**held.tensors, **outliers}))


@pytest.mark.parametrize("column_type", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("t", [1, 3, 9])
def test_outliers_in_few_rows_in_all_columns_and_nowhere(isa, t, column_type):
    everywhere = list(range(100))
    for rows in ([[]] * 40, [[], everywhere, [], [99], [0], *[[]] * 30, everywhere], [[7]], [everywhere] * 16 + [[]]):
        a = with_outliers(rows, t, 100, column_type)
        assert_matches_reference(a, run(a))


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("outlier_col", 0, -1), ("outlier_col", 1, 100), ("outlier_rowptr", 0, 1), ("outlier_rowptr", 1, 3),
        ("outlier_rowptr", 2, -5), ("outlier_rowptr", 3, 1 << 30),
    ],
)  # fmt: skip
def test_damaged_outliers_are_refused(name, at, value):
    a = with_outliers([[1], [2], []], 2, 100, torch.int16)
    run(a)
    a.weight.tensors[name][at] = value
    with pytest.raises(ValueError, match=f"{name} must"):
        run(a)


def test_layouts_are_what_the_names_say():
    """The tests above would pass with nothing tested if a scheme lost its panels."""
    found = {scheme: problem(scheme, 1, 1, 1).weight.layout for scheme in WEIGHT_ONLY}
    assert found["w8a16"] is Layout.INT8_PANELS
    assert found["gobo3"] is Layout.INT3_PANELS
    assert {found[scheme] for scheme in WEIGHT_ONLY if scheme not in ("w8a16", "gobo3")} == {Layout.INT4_PANELS}
    assert len(WEIGHT_ONLY) == 6
