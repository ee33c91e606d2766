"""What `test_row_kernels` runs, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from qbert import reference
from qbert.ops.triton import TRITON
from qbert.testing import assert_matches_reference, random_arguments, to_device


def matches_reference(
    operation: str, t: int, n: int, k: int, dtype: str = "float32", scheme: str | None = None, seed: int = 0,
    device: str = "cpu",
) -> None:  # fmt: skip
    arguments = random_arguments(operation, t, n, k, dtype=getattr(torch, dtype), scheme=scheme, seed=seed)
    assert_matches_reference(operation, arguments, TRITON[operation](*to_device(arguments, device)))


def quantizes_what_is_not_a_number(t: int, k: int, dtype: str, device: str = "cpu") -> None:
    """Rows of zeros, NaN and infinities between others, read with a stride."""
    torch.manual_seed(0)
    x = (torch.randn(t, 2 * k) * torch.exp(5 * torch.randn(t, 1))).to(getattr(torch, dtype))[:, :k]
    x[0] = 0
    for row, value in enumerate(("nan", "inf", "-inf"), 1):
        if row < t:
            x[row, (row * k) // 4] = float(value)
    actual = TRITON["quantize_per_token"](x.to(device))
    assert_matches_reference("quantize_per_token", (x,), actual)
    assert same_bits(actual[1].cpu(), reference.quantize_per_token(x)[1])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def mixed_types(y: str, residual: str, k: int, device: str = "cpu") -> None:
    """Any two float types; gains and shifts of a third; `y` is every other row of a larger matrix."""
    y_, r, gamma, beta, eps = random_arguments("add_layer_norm_quantize", 6, 0, k)
    arguments = y_.to(getattr(torch, y))[::2], r.to(getattr(torch, residual))[:3], gamma.half(), beta.bfloat16(), eps
    actual = TRITON["add_layer_norm_quantize"](*to_device(arguments, device))
    assert_matches_reference("add_layer_norm_quantize", arguments, actual)


def codes_are_the_norms(k: int, device: str = "cpu") -> None:
    """Codes and scales are bit for bit those of the float32 norm that the same kernel returns."""
    arguments = random_arguments("add_layer_norm_quantize", 5, 0, k)
    normed, codes, scale = TRITON["add_layer_norm_quantize"](*to_device(arguments, device))
    assert_matches_reference("quantize_per_token", (normed.cpu(),), (codes, scale))


def nan_stays_in_its_row(value: str, device: str = "cpu") -> None:
    y, residual, *rest = random_arguments("add_layer_norm_quantize", 4, 0, 70)
    y[1, 3], residual[2, 69] = float(value), float(value)
    normed, codes, scale = TRITON["add_layer_norm_quantize"](*to_device((y, residual, *rest), device))
    assert scale.isnan().tolist() == [False, True, True, False]
    assert normed.isnan().all(dim=1).tolist() == normed.isnan().any(dim=1).tolist() == scale.isnan().tolist()
    assert not bool(codes[1:3].any())
    assert_matches_reference("add_layer_norm_quantize", (y, residual, *rest), (normed, codes, scale))


def unknown_ids_are_nan(operation: str, scheme: str | None, ids_type: str, device: str = "cpu") -> None:
    """Ids below 0 and after the table: NaN there, and elsewhere what it would be."""
    arguments = list(random_arguments(operation, 6, 5, 96, scheme=scheme))
    known = to_device(TRITON[operation](*to_device(arguments, device)), "cpu") if scheme else None
    bad = torch.tensor([False, True, False, True, True, False])
    ids = arguments[0].to(getattr(torch, ids_type))
    ids[bad] = torch.tensor([-1, 5, torch.iinfo(ids.dtype).max], dtype=ids.dtype)
    for argument, wrong in enumerate((ids, *_wrong_places(arguments))):
        changed = [*arguments]
        changed[argument] = wrong
        result = TRITON[operation](*to_device(changed, device))
        floats = (result[0] if isinstance(result, tuple) else result).cpu()
        assert torch.equal(floats.isnan().all(dim=1), bad)
        assert torch.equal(floats.isnan().any(dim=1), bad)
        if isinstance(result, tuple):
            assert torch.equal(result[2].isnan().cpu(), bad)
            assert not bool(result[1].cpu()[bad].any())
            assert known is not None
            assert torch.equal(floats[~bad], known[0][~bad])


def _wrong_places(arguments: list[Any]) -> list[torch.Tensor]:
    """Position and token type ids of the fused look-up that are outside at the same tokens; none of the others."""
    if not isinstance(arguments[3], list):
        return []
    outside = torch.tensor([0, -1, 0, 1 << 40, 7, 0])
    return [torch.where(outside == 0, arguments[argument], outside) for argument in (1, 2)]


def damaged_outliers_stay_inside(device: str = "cpu") -> None:
    """Row pointers beyond the outliers and columns beyond the row read nothing and change no other value."""
    ids, qdata, codebook, rowptr, col, delta, *rest = random_arguments("gobo_embedding", 4, 5, 96, scheme="gobo3")
    rowptr, col = torch.full_like(rowptr, 1 << 30), torch.full_like(col, 96)
    rowptr[0] = -5
    arguments = (ids, qdata, codebook, rowptr, col, delta, *rest)
    plain = (ids, qdata, codebook, torch.zeros_like(rowptr), col[:0], delta[:0], *rest)
    assert torch.equal(TRITON["gobo_embedding"](*to_device(arguments, device)).cpu(), reference.gobo_embedding(*plain))


def nothing_to_do() -> None:
    for operation in ("quantize_per_token", "add_layer_norm_quantize", "embed_layer_norm_quantize", "w8_embedding"):
        arguments = random_arguments(operation, 0, 3, 64)
        expected = reference.REFERENCES[operation](*arguments)
        for got, want in zip(_as_tuple(TRITON[operation](*arguments)), _as_tuple(expected), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
    codes, scale = TRITON["quantize_per_token"](torch.zeros(3, 0))
    assert codes.shape == (3, 0)
    assert torch.equal(scale, reference.quantize_per_token(torch.zeros(3, 0))[1])
    ids = torch.zeros(2, 3, dtype=torch.int32)[:, ::2]
    assert TRITON["w8_embedding"](ids, torch.ones(1, 8, dtype=torch.int8), torch.ones(1), torch.float16).shape == (
        2,
        2,
        8,
    )


def _as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
