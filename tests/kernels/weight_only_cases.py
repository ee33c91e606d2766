"""What runs in Triton's interpreter, or on a GPU, for test_weight_only.py."""

from __future__ import annotations

from typing import Any

import torch
from launchers import changed, launch

from qbert.formats import INT4, SCHEMES, PerGroup, Role, Scheme
from qbert.ops import FLOAT_DTYPES, reference
from qbert.ops.abi import Activation
from qbert.ops.operations import Linear
from qbert.testing import assert_matches_reference, random_problem, schemes_of, to_device
from qbert.weight import Layout, Weight

SCHEME_NAMES = [name for name in schemes_of("linear") if SCHEMES[name].activation is None]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def streamed_layout(scheme: str) -> str:
    """The layout that the streaming kernel reads."""
    if SCHEMES[scheme].has_dictionary:
        return "dict3_words" if SCHEMES[scheme].weight_bits == 3 else "select_halves"
    return "int8_rows" if SCHEMES[scheme].weight_bits == 8 else "nibble_halves"


def problem(scheme: str, t: int, n: int, k: int, layout: str | None = None, **options: Any) -> Linear:
    """k is rounded up to whole groups, and the layout is the streamed one if none is named."""
    size = SCHEMES[scheme].group_size or 1
    layout = layout or streamed_layout(scheme)
    return random_problem("linear", t, n, -(-k // size) * size, scheme=scheme, layout=Layout(layout), **options)


def matches(
    scheme: str, t: int, n: int, k: int, dtype: str, *, layout: str | None = None, **options: Any
) -> None:  # fmt: skip
    """Against the reference."""
    a = problem(scheme, t, n, k, layout, dtype=DTYPES[dtype], **options)
    assert_matches_reference(a, launch(a))


def plain_matches(scheme: str, device: str = "cpu") -> None:
    """The layout that only the expanded road reads."""
    matches(scheme, 3, 11, 130, "bfloat16", layout="plain", device=device)
    matches(scheme, 3, 11, 130, "float16", layout="plain", activation="gelu", bias=False, device=device)


def other_bias(dtype: str, bias_dtype: str, device: str = "cpu") -> None:
    """A bias of another type than the activations."""
    a = problem("w4a16", 3, 20, 128, dtype=DTYPES[dtype], device=device)
    a = a._replace(bias=a.bias.to(DTYPES[bias_dtype]))
    assert_matches_reference(a, launch(a))


def strided(dtype: str, device: str = "cpu") -> None:
    """Every other row of a wider matrix, whose rest must not be read."""
    a = problem("w4a16", 3, 20, 128, dtype=DTYPES[dtype], device=device)
    wide = torch.full((6, 131), float("nan"), dtype=a.x.dtype, device=device)
    wide[::2, 3:].copy_(a.x)
    assert torch.equal(launch(a._replace(x=wide[::2, 3:])), launch(a))


def grouped(group: int, k: int, dtype: str, device: str = "cpu") -> None:
    """Groups that no scheme has."""
    a = problem("w4a16-g32", 3, 20, k, dtype=DTYPES[dtype], device=device)
    scheme = Scheme(f"w4a16-g{group}", INT4, PerGroup(group), None, frozenset({Role.LINEAR}), "")
    scale = (torch.rand(20, k // group, device=device) + 0.5).to(torch.bfloat16)
    a = a._replace(weight=Weight(scheme, (20, k), a.weight.layout, {"qdata": a.weight.qdata, "scale": scale}))
    assert_matches_reference(a, launch(a))


def sparse(rows: list[list[int]], dtype: str, column_type: str, t: int = 3, device: str = "cpu") -> None:
    """Outliers in these columns of each row, of k = 100."""
    for scheme in ("gobo3", "gobo4"):
        for layout in (None, "plain"):
            a = problem(scheme, t, len(rows), 100, layout, dtype=DTYPES[dtype], device=device)
            rowptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(device, torch.int32)
            col = torch.tensor(
                [column for row in rows for column in row], dtype=getattr(torch, column_type), device=device
            )
            delta = torch.randn(col.numel(), generator=torch.Generator().manual_seed(1)).to(device)
            weight = changed(a.weight, outlier_rowptr=rowptr, outlier_col=col, outlier_delta=delta)
            a = a._replace(weight=weight)
            assert_matches_reference(a, launch(a))


def not_finite(scheme: str, dtype: str, bad: str, device: str = "cpu") -> None:
    """NaN or infinity in one token: what the reference has there, and no bit of another token changes."""
    a = problem(scheme, 4, 20, 200, dtype=DTYPES[dtype], activation="gelu", device=device)
    clean = launch(a)
    a.x[2, 13] = float(bad)
    found = launch(a)
    others = torch.tensor([0, 1, 3], device=device)
    assert torch.equal(found[others], clean[others])
    assert_matches_reference(a, found)


def batch_does_not_show(scheme: str, dtype: str, t: int, alone: list[int], device: str = "cpu") -> None:
    """A token's result has the same bits with others beside it."""
    a = problem(scheme, t, 40, 640, dtype=DTYPES[dtype], device=device)
    together = launch(a)
    for count in alone:
        assert torch.equal(launch(a._replace(x=a.x[:count])), together[:count]), count
        assert torch.equal(launch(a._replace(x=a.x[-count:])), together[-count:]), count


def empty(device: str = "cpu") -> None:
    """No token, no channel, no input."""
    for layout in ("int8_rows", "plain"):
        for t, n, k in ((0, 5, 64), (3, 0, 64), (3, 5, 0), (0, 0, 0)):
            bias = torch.randn(n, device=device)
            qdata = torch.ones(n, k, dtype=torch.int8, device=device)
            x, scale = torch.randn(t, k, device=device), torch.ones(n, device=device)
            weight = Weight(SCHEMES["w8a16"], (n, k), Layout(layout), {"qdata": qdata, "scale": scale})
            y = launch(Linear(x, None, weight, bias, Activation.NONE, False, torch.float32))
            expected = x @ qdata.float().t() + bias
            assert y.shape == expected.shape
            assert torch.allclose(y, expected)


def expanded_equals_dequantized(scheme: str, layout: str, n: int, k: int, dtype: str, device: str = "cpu") -> None:
    """The expanded weight is the reference's, rounded once: the identity matrix shows it."""
    size = SCHEMES[scheme].group_size or 1
    k = -(-k // size) * size
    a = problem(scheme, k, n, k, layout, dtype=DTYPES[dtype], bias=False, device=device)
    a = a._replace(x=torch.eye(k, dtype=DTYPES[dtype], device=device))
    expected = reference.linear(to_device(a, "cpu"))
    from qbert.ops.triton import weight_only

    most, weight_only.MOST_STREAMED_TOKENS = weight_only.MOST_STREAMED_TOKENS, -1
    few, weight_only.MOST_STREAMED_FLOAT32_TOKENS = weight_only.MOST_STREAMED_FLOAT32_TOKENS, -1
    try:
        found = launch(a).cpu()
    finally:
        weight_only.MOST_STREAMED_TOKENS, weight_only.MOST_STREAMED_FLOAT32_TOKENS = most, few
    step = torch.finfo(DTYPES[dtype]).eps
    assert torch.allclose(found.double(), expected.double(), rtol=step, atol=0)


def call(case: str, *arguments: Any) -> None:
    """A case by its name, so that different ones share an interpreter's process."""
    globals()[case](*arguments)
