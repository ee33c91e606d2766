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

from qbert import reference, tiles
from qbert.errors import QBertError
from qbert.kernels.epilogue import gelu
from qbert.layout import Layout
from qbert.ops.triton import TRITON
from qbert.ops.triton.int8 import programs
from qbert.target import Target
from qbert.testing import assert_matches_reference, random_arguments
from qbert.tiles import TileConfig

# A small tile of each road, so that sizes which the interpreter does quickly have several steps, subtiles and groups.
TILES = {
    "tma": TileConfig("tma", 64, 128, 64, warps=4, stages=3, group=2),
    "few": TileConfig("few", 16, 32, 64, warps=4, stages=3),
    "pointer": TileConfig("pointer", 32, 64, 64, warps=4, stages=3, group=2),
}


def call(name: str, *arguments: Any) -> None:
    """One of the functions below: cases of several share a process."""
    globals()[name](*arguments)


def launched(operation: str, arguments: tuple[Any, ...], road: str | None = None) -> torch.Tensor:
    """The kernel's result by one road, or by the one that the table chooses."""
    if road is None:
        return TRITON[operation](*arguments)
    with tiles.forced("w8a8_linear", TILES[road]):
        return TRITON[operation](*arguments)


def matches_reference(
    t: int, n: int, k: int, road: str | None, operation: str = "w8a8_linear", dtype: str = "float32", bias: bool = True,
    activation: str = "none", layout: str = "int8_rows",
) -> None:  # fmt: skip
    """One random problem against the reference: bit for bit without GELU, for all else is IEEE operations.

    But for bfloat16, to which the interpreter truncates, where GPUs round.
    """
    arguments = random_arguments(
        operation, t, n, k, seed=t + n + k, dtype=getattr(torch, dtype), bias=bias, activation=activation,
        layout=Layout(layout),
    )  # fmt: skip
    found = launched(operation, arguments, road)
    assert_matches_reference(operation, arguments, found)
    if activation == "none" and dtype != "bfloat16":
        assert torch.equal(found, reference.REFERENCES[operation](*arguments)), "bits differ from the reference"


def roads_agree(t: int, n: int, k: int, operation: str, activation: str) -> None:
    """All roads give the same bits, and so do tokens that come alone."""
    arguments = random_arguments(operation, t, n, k, activation=activation, layout=Layout.INT8_ROWS)
    results = {road: launched(operation, arguments, road) for road in TILES}
    q, s, *rest = arguments
    alone = [launched(operation, (q[i : i + 1].clone(), s[i : i + 1].clone(), *rest)) for i in range(t)]
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
    for operation, out in (("w8a8_linear", torch.float32), ("w8a8_linear_requant", 1e6)):
        arguments = (q, s, qdata, scale, bias, "none", out, "int8_rows")
        found, want = launched(operation, arguments, road), reference.REFERENCES[operation](*arguments)
        assert torch.equal(found.nan_to_num(7.0) if found.is_floating_point() else found, want.nan_to_num(7.0))


def rounds_half_to_even(road: str) -> None:
    """Codes of sums that lie on a half: n sums 1, 3, 5 ... of scale a half."""
    n, k = 64, 16
    qdata = torch.zeros(n, k, dtype=torch.int8)
    qdata[:, 0] = torch.arange(-n + 1, n, 2)
    arguments = (
        torch.ones(16, k, dtype=torch.int8), torch.ones(16), qdata, torch.full((n,), 0.5), None, "none", 1.0, "int8_rows",
    )  # fmt: skip
    found = launched("w8a8_linear_requant", arguments, road)
    assert torch.equal(found, reference.REFERENCES["w8a8_linear_requant"](*arguments))


def many_tiles_a_program(t: int, n: int, k: int, operation: str) -> None:
    """Persistent programs: one multiprocessor for all tiles, so that each program takes several, the last one fewer."""
    small = Target("cuda", "", sm=90, sm_count=1, shared_memory=232_448)
    arguments = random_arguments(operation, t, n, k, layout=Layout.INT8_ROWS)
    with mock.patch("qbert.ops.triton.int8.target_for", return_value=small):
        assert programs(TILES["tma"], t, n, 4, small) == 2
        found = launched(operation, arguments, "tma")
    assert torch.equal(found, reference.REFERENCES[operation](*arguments))


def empty(t: int, n: int, k: int) -> None:
    """Problems without tokens, channels or products: what is left is the bias."""
    q, qdata = torch.zeros(t, k, dtype=torch.int8), torch.zeros(n, k, dtype=torch.int8)
    s, scale, bias = torch.rand(t), torch.rand(n), torch.randn(n)
    for operation, out in (("w8a8_linear", torch.float32), ("w8a8_linear_requant", 0.1)):
        arguments = (q, s, qdata, scale, bias, "none", out, "plain")
        assert torch.equal(launched(operation, arguments), reference.REFERENCES[operation](*arguments))


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
    arguments = list(random_arguments("w8a8_linear", 8, 16, 32, layout=Layout.INT8_ROWS))
    if case == "strides":
        arguments[0] = arguments[0].t().contiguous().t()
    elif case == "address":
        arguments[1] = torch.cat((arguments[1][:1], arguments[1]))[1:]
    elif case == "activation":
        arguments[5] = "relu"
    with pytest.raises(QBertError, match=case):
        TRITON["w8a8_linear"](*arguments)
