"""The native weight-only linears: every instruction set, every format, odd shapes, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qbert import ops, reference
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.layout import PANEL_LAYOUTS, Layout, layouts_of, panels
from qbert.target import native_cpu
from qbert.testing import assert_matches_reference, random_arguments, schemes_of

_cpu: Any = native_cpu()
if _cpu is None:
    pytest.skip("the native extension is not built, or QBERT_CPU_ISA=torch does without it", allow_module_level=True)

OPERATIONS = ("w8a16_linear", "w4a16_linear", "gobo_a16_linear")
SCHEME = {scheme: operation for operation in OPERATIONS for scheme in schemes_of(operation)}
SCHEMES_OF_ALL = pytest.mark.parametrize("scheme", list(SCHEME))
DTYPES = pytest.mark.parametrize("dtype", ops.FLOAT_DTYPES, ids=str)
# (t, n, k): all numbers of tokens that take another way, panels in fours and left over, k with and without padding.
SIZES = [
    (0, 3, 17), (1, 1, 1), (1, 130, 192), (2, 77, 100), (3, 17, 1023), (5, 64, 64), (8, 20, 130), (17, 3, 64), (33, 70, 100),
    (70, 33, 256), (129, 18, 65),
]  # fmt: skip
GROUP_SIZES = {name: SCHEMES[name].group_size or 1 for name in SCHEME}


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


def problem(scheme: str, t: int, n: int, k: int, **options: Any) -> tuple[Any, ...]:
    """Arguments in panels; k is rounded up to whole groups."""
    layout = next(each for each in layouts_of(SCHEMES[scheme]) if each in PANEL_LAYOUTS)
    size = GROUP_SIZES[scheme]
    return random_arguments(SCHEME[scheme], t, n, -(-k // size) * size, scheme=scheme, layout=layout, **options)


def run(scheme: str, arguments: tuple[Any, ...]) -> Tensor:
    """The native implementation itself: torch's would give the same result, but not be tested here."""
    y = ops.NATIVE[SCHEME[scheme]](*arguments)
    assert isinstance(y, Tensor)
    return y


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


# ---- values ---------------------------------------------------------------------------------------------------------


@SCHEMES_OF_ALL
@pytest.mark.parametrize(("t", "n", "k"), SIZES)
def test_matches_reference(isa, scheme, t, n, k):
    dtype = ops.FLOAT_DTYPES[(t + n) % len(ops.FLOAT_DTYPES)]
    activation = reference.ACTIVATIONS[k % 2]
    arguments = problem(scheme, t, n, k, dtype=dtype, activation=activation, bias=t != 5)
    assert_matches_reference(SCHEME[scheme], arguments, run(scheme, arguments))


@SCHEMES_OF_ALL
@DTYPES
@pytest.mark.parametrize("t", [1, 16])
def test_matches_reference_at_an_encoders_size(scheme, dtype, t):
    """Sums of 3072 products: what float32 loses grows with their number."""
    arguments = problem(scheme, t, 40, 3072, dtype=dtype)
    assert_matches_reference(SCHEME[scheme], arguments, run(scheme, arguments))


@SCHEMES_OF_ALL
@DTYPES
def test_bias_of_another_type(scheme, dtype):
    arguments = list(problem(scheme, 3, 50, 100))
    at = next(i for i, value in enumerate(arguments) if isinstance(value, str)) - 1
    arguments[at] = arguments[at].to(dtype)
    assert_matches_reference(SCHEME[scheme], arguments, run(scheme, tuple(arguments)))
    arguments[at] = arguments[at].to(torch.float64)
    assert run(scheme, tuple(arguments)).shape == (3, 50)


@SCHEMES_OF_ALL
def test_operator_runs_it(scheme):
    arguments = problem(scheme, 3, 50, 100)
    assert_same_bits(getattr(torch.ops.qbert, SCHEME[scheme])(*arguments), run(scheme, arguments))


# ---- bits -----------------------------------------------------------------------------------------------------------


@SCHEMES_OF_ALL
@DTYPES
def test_every_instruction_set_gives_the_same_bits(scheme, dtype):
    arguments = problem(scheme, 9, 150, 200, dtype=dtype, activation="gelu")
    before = _cpu.isa()
    results = []
    for name in _cpu.supported_isas():
        _cpu.use_isa(name)
        results.append(run(scheme, arguments))
    _cpu.use_isa(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@SCHEMES_OF_ALL
def test_a_token_does_not_see_its_batch(isa, scheme):
    x, *rest = problem(scheme, 131, 70, 100)
    together = run(scheme, (x, *rest))
    for t in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 31, 64, 65, 130):
        assert_same_bits(run(scheme, (x[:t], *rest)), together[:t])
        assert_same_bits(run(scheme, (x[-t:], *rest)), together[-t:])


@SCHEMES_OF_ALL
@pytest.mark.parametrize("t", [1, 7, 200])
def test_the_number_of_threads_does_not_show(threads, scheme, t):
    arguments = problem(scheme, t, 1000, 768, dtype=torch.bfloat16)
    threads(1)
    alone = run(scheme, arguments)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(run(scheme, arguments), alone)


@SCHEMES_OF_ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("t", [4, 20])
def test_what_is_not_finite_stays_in_its_row(isa, scheme, bad, t):
    x, *rest = problem(scheme, t, 40, 100, activation="gelu")
    clean = run(scheme, (x, *rest))
    x[2, 13] = bad
    found = run(scheme, (x, *rest))
    others = [row for row in range(t) if row != 2]
    assert_same_bits(found[others], clean[others])
    assert_matches_reference(SCHEME[scheme], (x, *rest), found)


# ---- arguments ------------------------------------------------------------------------------------------------------


@SCHEMES_OF_ALL
@DTYPES
def test_activations_need_not_be_contiguous(scheme, dtype):
    x, *rest = problem(scheme, 6, 40, 128, dtype=dtype)
    want = run(scheme, (x, *rest))
    wide = torch.full((12, x.shape[1] + 9), float("nan"), dtype=dtype)
    rows, columns = wide[::2, 4:-5], x.t().contiguous().t()
    rows.copy_(x)
    for other in (rows, columns):
        assert not other.is_contiguous()
        assert_same_bits(run(scheme, (other, *rest)), want)
    repeated = x[:1].expand(6, -1)
    assert_same_bits(run(scheme, (repeated, *rest)), want[:1].expand(6, -1))


@pytest.mark.parametrize(("n", "k"), [(0, 64), (5, 0), (0, 0)])
def test_no_channel_and_no_input(isa, n, k):
    x, bias = torch.randn(3, k), torch.randn(n)
    qdata, scale = panels.pack_int8(torch.ones(n, k, dtype=torch.int8)), torch.ones(n)
    y = run("w8a16", (x, qdata, scale, bias, "none", Layout.INT8_PANELS.value))
    assert torch.equal(y, bias.expand(3, n))


@SCHEMES_OF_ALL
def test_other_layouts_are_left_to_torch(scheme):
    for layout in layouts_of(SCHEMES[scheme]):
        if layout not in PANEL_LAYOUTS:
            k = 2 * GROUP_SIZES[scheme]
            arguments = random_arguments(SCHEME[scheme], 2, 3, k, scheme=scheme, layout=layout)
            assert ops.NATIVE[SCHEME[scheme]](*arguments) is NotImplemented


def test_groups_that_no_scheme_has():
    """A multiple of 32 is computed; others, which the panels could hold too, are left to torch."""
    x, qdata, scale, bias, activation, layout = problem("w4a16-g32", 3, 100, 192)
    assert scale.shape == (100, 6)
    for groups in (1, 2, 3, 6):
        arguments = (x, qdata, scale[:, :groups].contiguous(), bias, activation, layout)
        assert_matches_reference("w4a16_linear", arguments, run("w4a16-g32", arguments))
    for groups in (4, 12):
        arguments = (x, qdata, scale.repeat(1, 2)[:, :groups].contiguous(), bias, activation, layout)
        assert ops.NATIVE["w4a16_linear"](*arguments) is NotImplemented
        assert_matches_reference("w4a16_linear", arguments, torch.ops.qbert.w4a16_linear(*arguments))


def test_unknown_activation():
    *arguments, _activation, layout = problem("gobo3", 2, 3, 64)
    with pytest.raises(QBertError, match=r"unknown activation 'relu'; allowed: none, gelu"):
        run("gobo3", (*arguments, "relu", layout))


# ---- outliers -------------------------------------------------------------------------------------------------------


def with_outliers(rows: list[list[int]], t: int, k: int, column_type: torch.dtype) -> tuple[Any, ...]:
    """A gobo3 problem with outliers in these columns of each row."""
    x, qdata, codebook, *_outliers, bias, activation, layout = problem("gobo3", t, len(rows), k)
    rowptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32)
    col = torch.tensor([column for row in rows for column in row], dtype=column_type)
    delta = torch.randn(col.numel(), generator=torch.Generator().manual_seed(1))
    return x, qdata, codebook, rowptr, col, delta, bias, activation, layout


@pytest.mark.parametrize("column_type", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("t", [1, 3, 9])
def test_outliers_in_few_rows_in_all_columns_and_nowhere(isa, t, column_type):
    everywhere = list(range(100))
    for rows in ([[]] * 40, [[], everywhere, [], [99], [0], *[[]] * 30, everywhere], [[7]], [everywhere] * 16 + [[]]):
        arguments = with_outliers(rows, t, 100, column_type)
        assert_matches_reference("gobo_a16_linear", arguments, run("gobo3", arguments))


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("outlier_col", 0, -1), ("outlier_col", 1, 100), ("outlier_rowptr", 0, 1), ("outlier_rowptr", 1, 3),
        ("outlier_rowptr", 2, -5), ("outlier_rowptr", 3, 1 << 30),
    ],
)  # fmt: skip
def test_damaged_outliers_are_refused(name, at, value):
    arguments = with_outliers([[1], [2], []], 2, 100, torch.int16)
    run("gobo3", arguments)
    arguments[{"outlier_rowptr": 3, "outlier_col": 4}[name]][at] = value
    with pytest.raises(ValueError, match=f"{name} must"):
        run("gobo3", arguments)


def test_layouts_are_what_the_names_say():
    """The tests above would pass with nothing tested if a scheme lost its panels."""
    found = {scheme: problem(scheme, 1, 1, 1)[-1] for scheme in SCHEME}
    assert found["w8a16"] == Layout.INT8_PANELS.value
    assert found["gobo3"] == Layout.INT3_PANELS.value
    assert {found[scheme] for scheme in SCHEME if scheme not in ("w8a16", "gobo3")} == {Layout.INT4_PANELS.value}
