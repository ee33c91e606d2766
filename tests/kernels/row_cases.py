"""What `test_row_kernels` runs, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from launchers import changed, launch

from qbert.formats import SCHEMES
from qbert.ops import reference
from qbert.ops.operations import Embedding, EmbedNorm, Norm, QuantizeRows
from qbert.ops.reference import REFERENCES
from qbert.testing import assert_matches_reference, random_problem, to_device
from qbert.weight import Layout, Weight


def matches_reference(
    operation: str, t: int, n: int, k: int, dtype: str = "float32", *, device: str = "cpu", **options: Any
) -> None:
    a = random_problem(operation, t, n, k, dtype=getattr(torch, dtype), **options)
    assert_matches_reference(a, launch(to_device(a, device)))


def quantizes_what_is_not_a_number(t: int, k: int, dtype: str, device: str = "cpu") -> None:
    """Rows of zeros, NaN and infinities between others, read with a stride."""
    torch.manual_seed(0)
    x = (torch.randn(t, 2 * k) * torch.exp(5 * torch.randn(t, 1))).to(getattr(torch, dtype))[:, :k]
    x[0] = 0
    for row, value in enumerate(("nan", "inf", "-inf"), 1):
        if row < t:
            x[row, (row * k) // 4] = float(value)
    actual = launch(QuantizeRows(x.to(device)))
    assert_matches_reference(QuantizeRows(x), actual)
    assert same_bits(actual[1].cpu(), reference.codes_and_scales(x)[1])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def mixed_types(y: str, residual: str, k: int, device: str = "cpu") -> None:
    """Any two float types; gains and shifts of a third; `y` is every other row of a larger matrix."""
    a = random_problem("add_norm", 6, 0, k)
    norm = Norm(a.norm.gamma.half(), a.norm.beta.bfloat16(), a.norm.eps)
    a = a._replace(y=a.y.to(getattr(torch, y))[::2], residual=a.residual.to(getattr(torch, residual))[:3], norm=norm)
    assert_matches_reference(a, launch(to_device(a, device)))


def codes_are_the_norms(k: int, device: str = "cpu") -> None:
    """Codes and scales are bit for bit those of the float32 norm that the same kernel returns."""
    normed, codes, scale = launch(random_problem("add_norm", 5, 0, k, device=device))
    assert_matches_reference(QuantizeRows(normed.cpu()), (codes, scale))


def nan_stays_in_its_row(value: str, device: str = "cpu") -> None:
    a = random_problem("add_norm", 4, 0, 70)
    a.y[1, 3], a.residual[2, 69] = float(value), float(value)
    normed, codes, scale = launch(to_device(a, device))
    assert scale.isnan().tolist() == [False, True, True, False]
    assert normed.isnan().all(dim=1).tolist() == normed.isnan().any(dim=1).tolist() == scale.isnan().tolist()
    assert not bool(codes[1:3].any())
    assert_matches_reference(a, (normed, codes, scale))


def unknown_ids_are_nan(operation: str, scheme: str, ids_type: str, device: str = "cpu") -> None:
    """Ids below 0 and after the table: NaN there, and elsewhere what it would be."""
    a = random_problem(operation, 6, 5, 96, scheme=scheme)
    known = to_device(launch(to_device(a, device)), "cpu")
    bad = torch.tensor([False, True, False, True, True, False])
    ids = a.ids.to(getattr(torch, ids_type))
    ids[bad] = torch.tensor([-1, 5, torch.iinfo(ids.dtype).max], dtype=ids.dtype)
    for wrong in (a._replace(ids=ids), *_wrong_places(a)):
        result = launch(to_device(wrong, device))
        floats = (result[0] if isinstance(result, tuple) else result).cpu()
        assert torch.equal(floats.isnan().all(dim=1), bad)
        assert torch.equal(floats.isnan().any(dim=1), bad)
        if isinstance(result, tuple):
            assert torch.equal(result[2].isnan().cpu(), bad)
            assert not bool(result[1].cpu()[bad].any())
        expected = known[0] if isinstance(result, tuple) else known
        assert torch.equal(floats[~bad], expected[~bad])


def _wrong_places(a: Embedding | EmbedNorm) -> list[EmbedNorm]:
    """The fused look-up with position or token type ids that are outside at the same tokens; none of the others."""
    if not isinstance(a, EmbedNorm):
        return []
    outside = torch.tensor([0, -1, 0, 1 << 40, 7, 0])
    wrong = lambda ids: torch.where(outside == 0, ids, outside)
    return [
        a._replace(position_ids=wrong(a.position_ids)),
        a._replace(token_type_ids=wrong(a.token_type_ids)),
    ]


def damaged_outliers_stay_inside(device: str = "cpu") -> None:
    """Row pointers beyond the outliers and columns beyond the row read nothing and change no other value."""
    a = random_problem("embedding", 4, 5, 96, scheme="gobo3")
    rowptr, col, delta = a.weight.sparse
    rowptr, col = torch.full_like(rowptr, 1 << 30), torch.full_like(col, 96)
    rowptr[0] = -5
    damaged = changed(a.weight, outlier_rowptr=rowptr, outlier_col=col)
    plain = changed(
        a.weight, outlier_rowptr=torch.zeros_like(rowptr), outlier_col=col[:0], outlier_delta=delta[:0]
    )  # fmt: skip
    found = launch(to_device(a._replace(weight=damaged), device)).cpu()
    assert torch.equal(found, reference.embedding(a._replace(weight=plain)))


def nothing_to_do() -> None:
    for operation, scheme in (
        ("quantize_rows", None),
        ("add_norm", None),
        ("embed_norm", "gobo3"),
        ("embedding", "w8"),
    ):
        a = random_problem(operation, 0, 3, 64, scheme=scheme)
        expected = REFERENCES[operation](a)
        for got, want in zip(_as_tuple(launch(a)), _as_tuple(expected), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
    codes, scale = launch(QuantizeRows(torch.zeros(3, 0)))
    assert codes.shape == (3, 0)
    assert torch.equal(scale, reference.codes_and_scales(torch.zeros(3, 0))[1])
    ids = torch.zeros(2, 3, dtype=torch.int32)[:, ::2]
    tensors = {"qdata": torch.ones(1, 8, dtype=torch.int8), "scale": torch.ones(1)}
    table = Weight(SCHEMES["w8"], (1, 8), Layout.PLAIN, tensors)
    assert launch(Embedding(ids, table, torch.float16)).shape == (2, 2, 8)
    empty = Weight(
        SCHEMES["w8"], (1, 0), Layout.PLAIN, {**tensors, "qdata": torch.ones(1, 0, dtype=torch.int8)}
    )  # fmt: skip
    assert launch(Embedding(ids, empty, torch.float16)).shape == (2, 2, 0)


def _as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
