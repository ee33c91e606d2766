"""What runs in Triton's interpreter, or on a GPU, for test_weight_only.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qbert import ops
from qbert.formats import SCHEMES
from qbert.layout import Layout
from qbert.ops.triton.weight_only import KERNELS
from qbert.testing import assert_matches_reference, random_arguments, schemes_of

OPERATION_OF = {scheme: operation for operation in KERNELS for scheme in schemes_of(operation)}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ops.FLOAT_DTYPES}


def streamed_layout(scheme: str) -> str:
    """The layout that the streaming kernel reads."""
    if SCHEMES[scheme].has_dictionary:
        return "dict3_words" if SCHEMES[scheme].weight_bits == 3 else "select_halves"
    return "int8_rows" if SCHEMES[scheme].weight_bits == 8 else "nibble_halves"


def problem(scheme: str, t: int, n: int, k: int, layout: str | None = None, **options: Any) -> tuple[Any, ...]:
    """Arguments; k is rounded up to whole groups, and the layout is the streamed one if none is named."""
    size = SCHEMES[scheme].group_size or 1
    layout = layout or streamed_layout(scheme)
    return random_arguments(
        OPERATION_OF[scheme], t, n, -(-k // size) * size, scheme=scheme, layout=Layout(layout), **options
    )


def run(scheme: str, arguments: tuple[Any, ...]) -> Tensor:
    """The launcher's result."""
    y = KERNELS[OPERATION_OF[scheme]](*arguments)
    assert isinstance(y, Tensor)
    return y


def matches(
    scheme: str, t: int, n: int, k: int, dtype: str, *, layout: str | None = None, activation: str = "none",
    bias: bool = True, device: str = "cpu",
) -> None:  # fmt: skip
    """Against the reference."""
    options = {"dtype": DTYPES[dtype], "activation": activation, "bias": bias, "device": device}
    arguments = problem(scheme, t, n, k, layout, **options)
    assert_matches_reference(OPERATION_OF[scheme], arguments, run(scheme, arguments))


def plain_matches(scheme: str, device: str = "cpu") -> None:
    """The layout that only the expanded road reads."""
    matches(scheme, 3, 11, 130, "bfloat16", layout="plain", device=device)
    matches(scheme, 3, 11, 130, "float16", layout="plain", activation="gelu", bias=False, device=device)


def other_bias(dtype: str, bias_dtype: str, device: str = "cpu") -> None:
    """A bias of another type than the activations."""
    arguments = list(problem("w4a16", 3, 20, 128, dtype=DTYPES[dtype], device=device))
    arguments[-3] = arguments[-3].to(DTYPES[bias_dtype])
    assert_matches_reference("w4a16_linear", arguments, run("w4a16", tuple(arguments)))


def strided(dtype: str, device: str = "cpu") -> None:
    """Every other row of a wider matrix, whose rest must not be read."""
    x, *rest = problem("w4a16", 3, 20, 128, dtype=DTYPES[dtype], device=device)
    wide = torch.full((6, 131), float("nan"), dtype=x.dtype, device=device)
    wide[::2, 3:].copy_(x)
    assert torch.equal(run("w4a16", (wide[::2, 3:], *rest)), run("w4a16", (x, *rest)))


def grouped(group: int, k: int, dtype: str, device: str = "cpu") -> None:
    """Groups that no scheme has."""
    x, qdata, _scale, bias, activation, layout = problem("w4a16-g32", 3, 20, k, dtype=DTYPES[dtype], device=device)
    scale = (torch.rand(20, k // group, device=device) + 0.5).to(torch.bfloat16)
    arguments = x, qdata, scale, bias, activation, layout
    assert_matches_reference("w4a16_linear", arguments, run("w4a16-g32", arguments))


def sparse(rows: list[list[int]], dtype: str, column_type: str, t: int = 3, device: str = "cpu") -> None:
    """Outliers in these columns of each row, of k = 100."""
    for scheme in ("gobo3", "gobo4"):
        for layout in (None, "plain"):
            x, qdata, codebook, *_outliers, bias, activation, name = problem(
                scheme, t, len(rows), 100, layout, dtype=DTYPES[dtype], device=device
            )
            rowptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(device, torch.int32)
            col = torch.tensor(
                [column for row in rows for column in row], dtype=getattr(torch, column_type), device=device
            )
            delta = torch.randn(col.numel(), generator=torch.Generator().manual_seed(1)).to(device)
            arguments = x, qdata, codebook, rowptr, col, delta, bias, activation, name
            assert_matches_reference("gobo_a16_linear", arguments, run(scheme, arguments))


def not_finite(scheme: str, dtype: str, bad: str, device: str = "cpu") -> None:
    """NaN or infinity in one token: what the reference has there, and no bit of another token changes."""
    x, *rest = problem(scheme, 4, 20, 200, dtype=DTYPES[dtype], activation="gelu", device=device)
    clean = run(scheme, (x, *rest))
    x[2, 13] = float(bad)
    found = run(scheme, (x, *rest))
    others = torch.tensor([0, 1, 3], device=device)
    assert torch.equal(found[others], clean[others])
    assert_matches_reference(OPERATION_OF[scheme], (x, *rest), found)


def batch_does_not_show(scheme: str, dtype: str, t: int, alone: list[int], device: str = "cpu") -> None:
    """A token's result has the same bits with others beside it."""
    x, *rest = problem(scheme, t, 40, 640, dtype=DTYPES[dtype], device=device)
    together = run(scheme, (x, *rest))
    for count in alone:
        assert torch.equal(run(scheme, (x[:count], *rest)), together[:count]), count
        assert torch.equal(run(scheme, (x[-count:], *rest)), together[-count:]), count


def empty(device: str = "cpu") -> None:
    """No token, no channel, no input."""
    for layout in ("int8_rows", "plain"):
        for t, n, k in ((0, 5, 64), (3, 0, 64), (3, 5, 0), (0, 0, 0)):
            bias = torch.randn(n, device=device)
            qdata = torch.ones(n, k, dtype=torch.int8, device=device)
            x, scale = torch.randn(t, k, device=device), torch.ones(n, device=device)
            y = run("w8a16", (x, qdata, scale, bias, "none", layout))
            expected = x @ qdata.float().t() + bias
            assert y.shape == expected.shape
            assert torch.allclose(y, expected)


def expanded_equals_dequantized(scheme: str, layout: str, n: int, k: int, dtype: str, device: str = "cpu") -> None:
    """The expanded weight is the reference's, rounded once: the identity matrix shows it."""
    size = SCHEMES[scheme].group_size or 1
    k = -(-k // size) * size
    arguments = list(problem(scheme, k, n, k, layout, dtype=DTYPES[dtype], bias=False, device=device))
    arguments[0] = torch.eye(k, dtype=DTYPES[dtype], device=device)
    expected = ops.reference_of(OPERATION_OF[scheme])(
        *(each.cpu() if isinstance(each, Tensor) else each for each in arguments)
    )
    from qbert.ops.triton import weight_only

    most, weight_only.MOST_STREAMED_TOKENS = weight_only.MOST_STREAMED_TOKENS, -1
    few, weight_only.MOST_STREAMED_FLOAT32_TOKENS = weight_only.MOST_STREAMED_FLOAT32_TOKENS, -1
    try:
        found = run(scheme, tuple(arguments)).cpu()
    finally:
        weight_only.MOST_STREAMED_TOKENS, weight_only.MOST_STREAMED_FLOAT32_TOKENS = most, few
    step = torch.finfo(DTYPES[dtype]).eps
    assert torch.allclose(found.double(), expected.double(), rtol=step, atol=0)


def call(case: str, *arguments: Any) -> None:
    """A case by its name, so that different ones share an interpreter's process."""
    globals()[case](*arguments)
