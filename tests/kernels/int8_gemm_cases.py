"""What tests/kernels/test_int8_gemm.py runs in Triton's interpreter: functions of JSON values, called by `interpreted.run`."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from launchers import bind_with, launch
from torch import Tensor

from qbert import tiles
from qbert.errors import QBertError
from qbert.formats import SCHEMES
from qbert.kernels.epilogue import activated, gelu
from qbert.ops import reference
from qbert.ops.abi import Activation
from qbert.ops.cpu import native
from qbert.ops.operations import Linear
from qbert.ops.triton.int8 import programs
from qbert.target import Target, native_cpu
from qbert.testing import assert_matches_reference, random_problem
from qbert.tiles import TileConfig
from qbert.weight import Layout, Weight

# A small tile of each road, so that sizes which the interpreter does quickly have several steps, subtiles and groups.
TILES = {
    "tma": TileConfig("tma", 64, 128, 64, warps=4, stages=3, group=2),
    "few": TileConfig("few", 16, 32, 64, warps=4, stages=3),
    "pointer": TileConfig("pointer", 32, 64, 64, warps=4, stages=3, group=2),
}


def call(name: str, *arguments: Any) -> None:
    """One of the functions below: cases of several share a process."""
    globals()[name](*arguments)


def launched(a: Linear, road: str | None = None) -> Tensor:
    """The kernel's result by one road, or by the one that the table chooses."""
    if road is None:
        return launch(a)
    with tiles.forced("w8a8_linear", TILES[road]):
        return launch(a)


def weight_of(qdata: Tensor, scale: Tensor, layout: Layout = Layout.INT8_ROWS) -> Weight:
    return Weight(SCHEMES["w8a8"], tuple(qdata.shape), layout, {"qdata": qdata, "scale": scale})


def matches_reference(
    t: int, n: int, k: int, road: str | None, dtype: str = "float32", layout: str = "int8_rows", **options: Any
) -> None:
    """One random problem against the reference: bit for bit without GELU, for all else is IEEE operations.

    But for bfloat16, to which the interpreter truncates, where GPUs round.
    """
    a = random_problem(
        "linear", t, n, k, seed=t + n + k, dtype=getattr(torch, dtype), layout=Layout(layout), **options
    )  # fmt: skip
    found = launched(a, road)
    assert_matches_reference(a, found)
    if a.activation is Activation.NONE and dtype != "bfloat16":
        assert torch.equal(found, reference.linear(a)), "bits differ from the reference"


def roads_agree(t: int, n: int, k: int, int8_out: bool, activation: str) -> None:
    """All roads give the same bits, and so do tokens that come alone."""
    a = random_problem("linear", t, n, k, activation=activation, layout=Layout.INT8_ROWS, int8_out=int8_out)
    results = {road: launched(a, road) for road in TILES}
    alone = [launched(a._replace(x=a.x[i : i + 1].clone(), s=a.s[i : i + 1].clone())) for i in range(t)]
    results["one token at a time"] = torch.cat(alone)
    want = results.pop("tma").view(torch.uint8)
    for road, found in results.items():
        assert torch.equal(found.view(torch.uint8), want), f"{road} and tma give different bits"


def extremes(road: str) -> None:
    """The largest sums there are, and scales of NaN, infinity and zero: each stays in its token or channel."""
    t, n, k = 40, 144, 4096
    q, qdata = torch.full((t, k), 127, dtype=torch.int8), torch.full((n, k), 127, dtype=torch.int8)
    qdata[1::2] = -127
    s, scale, bias = torch.ones(t), torch.ones(n), torch.zeros(n)
    s[1], s[2], s[3], scale[4], bias[5] = torch.nan, torch.inf, 0.0, torch.nan, -torch.inf
    for out in (torch.float32, 1e6):
        a = Linear(q, s, weight_of(qdata, scale), bias, Activation.NONE, False, out)
        found, want = launched(a, road), reference.linear(a)
        assert torch.equal(found.nan_to_num(7.0) if found.is_floating_point() else found, want.nan_to_num(7.0))


def rounds_half_to_even(road: str) -> None:
    """Codes of sums that lie on a half: n sums 1, 3, 5 ... of scale a half."""
    n, k = 64, 16
    qdata = torch.zeros(n, k, dtype=torch.int8)
    qdata[:, 0] = torch.arange(-n + 1, n, 2)
    weight = weight_of(qdata, torch.full((n,), 0.5))
    a = Linear(torch.ones(16, k, dtype=torch.int8), torch.ones(16), weight, None, Activation.NONE, False, 1.0)
    assert torch.equal(launched(a, road), reference.linear(a))


def many_tiles_a_program(t: int, n: int, k: int, int8_out: bool) -> None:
    """Persistent programs: one multiprocessor for all tiles, so that each program takes several, the last one fewer."""
    small = Target("cuda", "", sm=90, sm_count=1, shared_memory=232_448)
    a = random_problem("linear", t, n, k, layout=Layout.INT8_ROWS, int8_out=int8_out)
    with mock.patch("qbert.ops.triton.int8.target_for", return_value=small):
        assert programs(TILES["tma"], t, n, 4, small) == 2
        found = launched(a, "tma")
    assert torch.equal(found, reference.linear(a))


def empty(t: int, n: int, k: int) -> None:
    """Problems without tokens, channels or products: what is left is the bias."""
    q, qdata = torch.zeros(t, k, dtype=torch.int8), torch.zeros(n, k, dtype=torch.int8)
    s, scale, bias = torch.rand(t), torch.rand(n), torch.randn(n)
    for out in (torch.float32, 0.1):
        a = Linear(q, s, weight_of(qdata, scale, Layout.PLAIN), bias, Activation.NONE, False, out)
        assert torch.equal(launched(a), reference.linear(a))


@triton.jit
def gelu_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, gelu(tl.load(x_ptr + at)))


def gelu_is_exact() -> None:
    """Nearer to the exact GELU than torch's float32 one on values of every size; NaN and infinity are not hidden."""
    x = torch.cat((torch.linspace(-40, 40, 2**16 - 2048), torch.logspace(-30, 30, 2048))).to(torch.float32)
    x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    y = torch.empty_like(x)
    gelu_kernel[(4,)](x, y, BLOCK=2**14)
    assert y[:3].isnan().all()
    assert y[3] == 0
    x, y, torchs = (each[4:].to(torch.float64) for each in (x, y, torch.nn.functional.gelu(x)))
    exact = torch.nn.functional.gelu(x)
    relative = lambda found: float(((found - exact).abs() / exact.abs())[x > 0].max())
    absolute = lambda found: float((found - exact).abs()[x < 0].max())
    assert relative(y) < min(1.3e-7, relative(torchs))
    assert absolute(y) < min(8e-8, absolute(torchs))


@triton.jit
def activated_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, activated(tl.load(x_ptr + at), 0.0, False, ACTIVATION))


@triton.jit
def fma_kernel(y_ptr, x, z):
    tl.store(y_ptr, tl.fma(x, x, z))


def fma_rounds_once() -> bool:
    """Not in the interpreter of Triton 3.6, which multiplies and then adds. (1 + 2**-12)**2 has a last bit of 2**-24."""
    y = torch.empty(1)
    fma_kernel[(1,)](y, 1 + 2.0**-12, -1.0)
    return y.item() == 2.0**-11 + 2.0**-24


def activations_are_those_of_cpus() -> None:
    """Near torch's in float64, of values of every size, NaN and infinities; bit for bit where a fused product is one."""
    x = torch.cat(
        (torch.linspace(-100, 100, 2**15 - 2048), torch.logspace(-38, 38, 2048), -torch.logspace(-38, 38, 2048))
    )
    x = torch.nn.functional.pad(x.to(torch.float32), (0, 2**14 * 3 - len(x)))
    x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    for activation in (Activation.GELU_TANH, Activation.RELU, Activation.SILU):
        y = torch.empty_like(x)
        activated_kernel[(3,)](x, y, BLOCK=2**14, ACTIVATION=int(activation))
        want = reference.activated(x, activation, gated=False)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isinf(), want.isinf())
        finite = want.isfinite()
        exact = reference.activated(x.double(), activation, gated=False)
        assert bool(((y - exact).abs()[finite] <= 2.5e-7 * x.double().abs()[finite] + 1e-38).all())
        if native_cpu() is not None and fma_rounds_once():
            weight = weight_of(torch.zeros(len(x), 1, dtype=torch.int8), torch.ones(len(x)), Layout.PLAIN)
            a = Linear(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1), weight, x, activation, False, torch.float32)
            # A product of zeros and a bias of -0.0 is 0.0 before any activation.
            by_cpu, by_triton = ((each + 0.0).nan_to_num(7.0).view(torch.int32) for each in (native.linear(a)[0], y))
            assert torch.equal(by_cpu, by_triton), activation


def gelu_of_file(path: str) -> None:
    """Float32 bits in a file become those of their GELU; 2**x is modelled as csrc/cuda models it, see `exp2_approx` there."""
    x = np.fromfile(path, np.float32)

    def exp2_approx(power: np.ndarray) -> np.ndarray:
        exact = np.frompyfunc(math.exp2, 1, 1)(power.astype(np.float64)).astype(np.float32)
        return np.where(exact < np.float32(2.0**-126), np.float32(0), exact)

    y = torch.empty(len(x))
    assert len(x) % 2**14 == 0
    with mock.patch.object(np, "exp2", exp2_approx):
        gelu_kernel[(len(x) // 2**14,)](torch.from_numpy(x), y, BLOCK=2**14)
    y.numpy().tofile(path)


def refuses(case: str) -> None:
    """Arguments that a kernel could not read end in an error that names them."""
    a = random_problem("linear", 8, 16, 32, layout=Layout.INT8_ROWS)
    wrong = {
        "strides": lambda: a._replace(x=a.x.t().contiguous().t()),
        "address": lambda: a._replace(s=torch.cat((a.s[:1], a.s))[1:]),
        "activation": lambda: bind_with(a, "none", "tanh"),
    }
    with pytest.raises(QBertError, match=case):
        launch(wrong[case]())
