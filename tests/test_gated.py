"""How linears end: activations, gates. Every scheme, every way to compute them, the same bits on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qbert import ops
from qbert.convert import quantize_
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.ops import call, reference, table
from qbert.ops.abi import Activation
from qbert.ops.composed import LINEAR_THEN_ACTIVATION
from qbert.ops.kernel import problem_of
from qbert.ops.operations import Linear, operation_of
from qbert.quantizers import quantize
from qbert.target import Target, cpu_target, native_cpu
from qbert.testing import assert_matches_reference, random_problem, schemes_of
from qbert.weight import Layout
from qbert.weight.layout import PANEL_LAYOUTS, layouts_of

_cpu: Any = native_cpu()
needs_native = pytest.mark.skipif(_cpu is None, reason="the extension qbert._cpu is not built here")
ALL = schemes_of("linear")
INTEGER = [name for name in ALL if SCHEMES[name].activation is not None]
SCHEMES_OF_ALL = pytest.mark.parametrize("scheme", ALL)
ACTIVATIONS = pytest.mark.parametrize("activation", list(Activation), ids=lambda each: each.text)
# (t, n, k): whole panels in each half, or not; no token, one, a strip and one more; a block of channels and part of one.
SIZES = [(0, 16, 64), (1, 16, 64), (3, 17, 100), (17, 48, 70), (33, 80, 130), (5, 1, 1)]


def problem(scheme: str, t: int, n: int, k: int, *, panels: bool = True, **options: Any) -> Linear:
    """Gated, in panels or as in a file; k is rounded up to whole groups."""
    size = SCHEMES[scheme].group_size or 1
    layout = next(each for each in layouts_of(SCHEMES[scheme]) if not panels or each in PANEL_LAYOUTS)
    options = {"gated": True, "scheme": scheme, "layout": layout, **options}
    return random_problem("linear", t, n, -(-k // size) * size, **options)


def kernel_of(a: Linear) -> str:
    return table.select("linear", problem_of(a), cpu_target()).name


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def on_each_isa() -> Iterator[Callable[[Linear], list[Tensor]]]:
    """The native kernel's results on every instruction set here."""
    before = _cpu.isa()

    def run(a: Linear) -> list[Tensor]:
        found = []
        for isa in _cpu.supported_isas():
            _cpu.use_isa(isa)
            (row,) = (row for row in table.KERNELS["linear"] if row.name == f"native {isa}")
            assert row.obstacle(problem_of(a), Target("cpu", isa, native=True)) is None
            found.append(row.call(a))
        return found

    yield run
    _cpu.use_isa(before)


# ---- against the reference ------------------------------------------------------------------------------------------


@SCHEMES_OF_ALL
@pytest.mark.parametrize(("t", "n", "k"), SIZES)
def test_matches_reference(scheme: str, t: int, n: int, k: int) -> None:
    for index, panels in enumerate((True, False)):
        activation, dtype = list(Activation)[(t + n + index) % 5], ops.FLOAT_DTYPES[(t + k) % 3]
        a = problem(scheme, t, n, k, panels=panels, activation=activation, dtype=dtype, bias=t != 3)
        y = call(a)
        assert y.shape == (t, n)
        assert_matches_reference(a, y)


@pytest.mark.parametrize("scheme", INTEGER)
@ACTIVATIONS
def test_codes_with_a_static_scale(scheme: str, activation: Activation) -> None:
    for zero in (0, -100):
        a = problem(scheme, 19, 32, 128, activation=activation, int8_out=True, zero=zero)
        assert_matches_reference(a, call(a))


def test_torch_s_kernels_and_the_composition_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme, n in itertools.product(("w8a8", "gobo3a8", "w4a16"), (16, 17)):
        a = problem(scheme, 5, n, 128, panels=False, activation="silu")
        for native in (True, False):
            target = replace(cpu_target(), native=native and _cpu is not None)
            monkeypatch.setattr(table, "target_of", lambda device, target=target: target)
            assert_matches_reference(a, table.run(a))


def test_halves_are_the_weight_s() -> None:
    """Activation of the first half, times the second."""
    a = problem("w8a8", 6, 32, 64, activation="gelu_tanh")
    whole = call(a._replace(activation=Activation.NONE, gated=False))
    want = torch.nn.functional.gelu(whole[:, :32], approximate="tanh") * whole[:, 32:]
    torch.testing.assert_close(call(a), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


# ---- the native kernels ---------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("scheme", INTEGER)
@pytest.mark.parametrize(("t", "n", "k"), [(1, 16, 64), (17, 48, 200), (70, 96, 130)])
def test_instruction_sets_agree(
    scheme: str, t: int, n: int, k: int, on_each_isa: Callable[[Linear], list[Tensor]]
) -> None:
    a = problem(scheme, t, n, k, activation=list(Activation)[t % 5], dtype=ops.FLOAT_DTYPES[n % 3])
    first, *others = on_each_isa(a)
    assert_matches_reference(a, first)
    for each in others:
        assert_same_bits(each, first)


@needs_native
@ACTIVATIONS
def test_functions_on_every_instruction_set(
    activation: Activation, on_each_isa: Callable[[Linear], list[Tensor]]
) -> None:
    """Of values of every size, by a weight of zeros and them as its bias; NaN and infinities as torch has them."""
    size = torch.logspace(-38, 38, 2000)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, -1e-45])
    x = torch.cat((size, -size, torch.linspace(-100, 100, 12_346), special)).to(torch.float32)
    x = torch.nn.functional.pad(x, (0, -len(x) % 16))
    weight = quantize(torch.zeros(len(x), 1), SCHEMES["w8a8"]).to_layout(Layout.INT8_PANELS)
    a = Linear(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1), weight, x, activation, False, torch.float32)
    first, *others = on_each_isa(a)
    for each in others:
        assert_same_bits(each, first)
    (y,) = first
    torchs = reference.activated(x[None], activation, gated=False)[0]
    exact = reference.activated(x[None].double(), activation, gated=False)[0]
    finite = x.isfinite()
    if activation is not Activation.GELU:  # torch's own of infinity depends on its vectors
        assert torch.equal(y.isnan(), torchs.isnan())
        assert torch.equal(y.isinf(), torchs.isinf())
    assert bool(((y - exact).abs()[finite] <= 2.5e-7 * x.double().abs()[finite] + 1e-37).all())
    if activation in (Activation.SILU, Activation.GELU_TANH):  # the left tail goes to 0 and does not turn
        tail = y[4000:16_346][(x[4000:16_346] < -5)]
        assert bool((tail.diff() <= 0).all())
        assert bool((tail <= 0).all())


@needs_native
def test_whole_panels_run_in_one_kernel_and_the_rest_is_composed() -> None:
    assert kernel_of(problem("w8a8", 3, 32, 64)).startswith("native")
    assert kernel_of(problem("gobo3a8", 3, 16, 64)).startswith("native")
    for a in (problem("w8a8", 3, 24, 64), problem("w4a16", 3, 32, 128)):
        assert kernel_of(a) == LINEAR_THEN_ACTIVATION
        choice = table.explain("linear", problem_of(a), cpu_target())
        assert choice.reason.startswith(f"native {_cpu.isa()} (compiled kernel for this CPU), then")


@needs_native
@pytest.mark.parametrize("scheme", ["w8a8", "gobo4a8"])
def test_a_token_has_the_same_bits_alone_and_by_threads(scheme: str) -> None:
    a = problem(scheme, 40, 64, 200, activation="gelu")
    together, before = call(a), torch.get_num_threads()
    alone = [call(a._replace(x=a.x[i : i + 1], s=a.s[i : i + 1])) for i in range(0, 40, 7)]
    assert_same_bits(torch.cat(alone), together[::7])
    try:
        torch.set_num_threads(3)
        assert_same_bits(call(a), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n", [16, 17])
def test_a_bad_token_stays_in_its_row(n: int) -> None:
    a = problem("w8a8", 5, n, 64, activation="silu")
    want = call(a)
    a.s[2] = torch.nan
    y = call(a)
    assert bool(y[2].isnan().all())
    assert_same_bits(y[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
    a.bias[0], a.bias[n + 1] = torch.inf, -torch.inf
    y = call(a)
    assert not bool(y[:2, :2].isfinite().any())
    assert_same_bits(y[:2, 2:], want[:2, 2:])


# ---- the operator ---------------------------------------------------------------------------------------------------


def test_an_odd_number_of_rows_is_an_error() -> None:
    a = random_problem("linear", 2, 5, 64)
    with pytest.raises(QBertError, match="the weight of a gated linear has 5 rows; allowed: even numbers"):
        call(a._replace(gated=True))


@pytest.mark.parametrize("scheme", ["w8a8", "gobo3"])
def test_opcheck_and_compile(scheme: str) -> None:
    a = problem(scheme, 3, 16, 64, activation="relu")
    flat = operation_of(a).flatten(a)
    torch.library.opcheck(torch.ops.qbert.linear.default, flat)

    def doubled(x: Tensor) -> Tensor:
        return torch.ops.qbert.linear(x, *flat[1:]) * 2

    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(flat[0]), doubled(flat[0]))
    torch._dynamo.reset()


def test_an_unfused_linear_asks_for_no_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation modules stay modules there."""
    records: list[Linear] = []
    monkeypatch.setattr(ops, "call", lambda a: records.append(a) or call(a))
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16))
    quantize_(model, "w8a8+none")(torch.randn(3, 64))
    linears = [a for a in records if isinstance(a, Linear)]
    assert [(a.activation, a.gated) for a in linears] == [(Activation.NONE, False)] * 2
