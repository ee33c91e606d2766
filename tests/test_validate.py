"""Every rule for a quantized tensor from outside: break it, and the error names the tensor and the rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qbert.errors import CheckpointError
from qbert.formats import SCHEMES
from qbert.quantizers import quantize
from qbert.testing import random_weight
from qbert.weight.validate import check_finite, check_plain_tensors, check_positive

PREFIX = "encoder.layer.3.output.dense."
N, K = 9, 192
FINITE, POSITIVE = "every value must be finite", "every value must be finite and positive"
Tensors = dict[str, Tensor]
Damage = Callable[[Tensors], None]


def _tensors(name: str, k: int = K) -> Tensors:
    """A valid weight; dictionary schemes have at least two outliers in some row."""
    tensors = quantize(random_weight(N, k, seed=1), SCHEMES[name]).tensors
    return {key: tensor.clone() for key, tensor in tensors.items()}


def _set(name: str, at: int, value: float) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors[name].view(-1)[at] = value

    return damage


def _cast(name: str, dtype: torch.dtype) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype)

    return damage


def _shape(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name])

    return damage


def _remove(name: str) -> Damage:
    def damage(tensors: Tensors) -> None:
        del tensors[name]

    return damage


def _add(name: str) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors[name] = torch.zeros(1)

    return damage


def _busy_row(tensors: Tensors) -> int:
    """Place of the first of two outliers of one row."""
    rowptr = tensors["outlier_rowptr"]
    row = int((rowptr.diff() >= 2).nonzero()[0])
    return int(rowptr[row])


def _swap_columns(tensors: Tensors) -> None:
    at, columns = _busy_row(tensors), tensors["outlier_col"]
    columns[at], columns[at + 1] = columns[at + 1].clone(), columns[at].clone()


def _repeat_column(tensors: Tensors) -> None:
    at, columns = _busy_row(tensors), tensors["outlier_col"]
    columns[at + 1] = columns[at]


def _shift_rowptr(tensors: Tensors) -> None:
    tensors["outlier_rowptr"][0] = 1


def _lower_rowptr(tensors: Tensors) -> None:
    """Falls and rises again: an unchecked reader would take a negative number of outliers."""
    rowptr = tensors["outlier_rowptr"]
    rowptr[N - 1] = int(rowptr[N - 2]) - 1


def _long_rowptr(tensors: Tensors) -> None:
    tensors["outlier_rowptr"][-1] += 1


def _swap_centroids(tensors: Tensors) -> None:
    codebook = tensors["codebook"]
    codebook[2], codebook[3] = codebook[3].clone(), codebook[2].clone()


def _equal_centroids(tensors: Tensors) -> None:
    """Codes 3 are now not the lowest of their centroid; they would not survive an expansion."""
    tensors["codebook"][3] = tensors["codebook"][2]


RULES: list[tuple[str, str, str, Damage, str, str]] = [
    # id, scheme, tensor that is named, damage, rule, value found
    ("missing", "w8a8", "scale", _remove("scale"), "tensor must be there", "nothing"),
    ("missing-outliers", "gobo3", "outlier_col", _remove("outlier_col"), "tensor must be there", "nothing"),
    ("extra", "w8a8", "zero_point", _add("zero_point"), "scheme w8a8 has no such tensor", "zero_point"),
    ("extra-scale", "gobo3", "scale", _add("scale"), "scheme gobo3 has no such tensor", "scale"),
    ("dtype", "w8a8", "scale", _cast("scale", torch.float16), "data type must be float32", "float16"),
    ("dtype-codes", "w4a16", "qdata", _cast("qdata", torch.int8), "data type must be uint8", "int8"),
    ("dtype-codebook", "gobo3a8", "codebook", _cast("codebook", torch.float32), "data type must be int8", "float32"),
    ("dtype-columns", "gobo4", "outlier_col", _cast("outlier_col", torch.int64), "data type must be int16", "int64"),
    ("shape", "w8a8", "qdata", _shape("qdata", lambda x: x[:, :-1]), f"shape must be [{N}, {K}]", f"[{N}, {K - 1}]"),
    ("shape-rows", "w4a8", "scale", _shape("scale", lambda x: x[1:]), f"shape must be [{N}]", f"[{N - 1}]"),
    ("shape-groups", "w4a16", "scale", _shape("scale", lambda x: x[:, :1]), f"shape must be [{N}, 3]", f"[{N}, 1]"),
    ("shape-codebook", "gobo3", "codebook", _shape("codebook", lambda x: x[:7]), "shape must be [8]", "[7]"),
    ("shape-rowptr", "gobo3", "outlier_rowptr", _shape("outlier_rowptr", lambda x: x[1:]), "shape must be [10]", "[9]"),
    ("deltas-too-few", "gobo3", "outlier_delta", _shape("outlier_delta", lambda x: x[1:]), "shape must be [", "["),
    ("flat", "w4a16", "qdata", _shape("qdata", lambda x: x.flatten()), f"shape must be [{N}, 96]", f"[{N * 96}]"),
    ("scale-nan", "w8a8", "scale", _set("scale", 4, float("nan")), POSITIVE, "nan"),
    ("scale-inf", "w4a16", "scale", _set("scale", 4, float("inf")), POSITIVE, "inf"),
    ("scale-zero", "w4a8", "scale", _set("scale", 4, 0.0), POSITIVE, "0.0 at position 4"),
    ("scale-negative", "gobo4a8", "scale", _set("scale", 0, -1.0), POSITIVE, "-1.0"),
    ("code-minus-128", "w8a8", "qdata", _set("qdata", 5, -128), "codes must be -127 ... 127", "-128 at position 5"),
    ("code-minus-8", "w4a8", "qdata", _set("qdata", 2, 0x18), "codes must be -7 ... 7", "-8 at position 4"),
    ("code-minus-8-high", "w4a16", "qdata", _set("qdata", 2, 0x81), "codes must be -7 ... 7", "-8 at position 5"),
    ("group-scale-0", "w4a8", "group_scale", _set("group_scale", 7, 0), "every value must be 1 ... 18", "0 at"),
    ("group-scale-19", "w4a8-g32", "group_scale", _set("group_scale", 7, 19), "every value must be 1 ... 18", "19"),
    ("codebook-nan", "gobo3", "codebook", _set("codebook", 7, float("nan")), FINITE, "nan"),
    ("codebook-inf", "gobo4", "codebook", _set("codebook", 15, float("inf")), FINITE, "inf"),
    ("codebook-128", "gobo3a8", "codebook", _set("codebook", 0, -128), "values must be -127 ... 127", "-128"),
    ("codebook-order", "gobo3", "codebook", _swap_centroids, "values must ascend", "at position 3"),
    ("codebook-order-int8", "gobo4a8", "codebook", _swap_centroids, "values must ascend", "at position 3"),
    ("code-not-lowest", "gobo3a8", "qdata", _equal_centroids, "a code must be the lowest of those", "3 at position"),
    ("rowptr-start", "gobo3", "outlier_rowptr", _shift_rowptr, "must start at 0", "1"),
    ("rowptr-falls", "gobo3", "outlier_rowptr", _lower_rowptr, "must not decrease", f"at position {N - 2}"),
    ("rowptr-end", "gobo4a8", "outlier_rowptr", _long_rowptr, "must end at ", ""),
    ("column-negative", "gobo3", "outlier_col", _set("outlier_col", 0, -1), f"columns must be 0 ... {K - 1}", "-1"),
    ("column-k", "gobo4", "outlier_col", _set("outlier_col", -1, K), f"columns must be 0 ... {K - 1}", str(K)),
    ("columns-fall", "gobo3a8", "outlier_col", _swap_columns, "columns must ascend within a row", "at position"),
    ("column-twice", "gobo3", "outlier_col", _repeat_column, "columns must ascend within a row", "at position"),
    ("delta-nan", "gobo3", "outlier_delta", _set("outlier_delta", 1, float("nan")), FINITE, "nan"),
    ("delta-inf", "gobo4a8", "outlier_delta", _set("outlier_delta", 1, float("inf")), FINITE, "inf"),
]


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("k", [128, 384])
def test_valid_tensors_pass(name: str, k: int) -> None:
    tensors = _tensors(name, k)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    check_plain_tensors(SCHEMES[name], (N, k), tensors, PREFIX)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("name", ["w8a8", "gobo3", "gobo4a8"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (1, 1023)], ids=str)
def test_valid_tensors_of_odd_sizes_pass(name: str, shape: tuple[int, int]) -> None:
    tensors = quantize(random_weight(*shape), SCHEMES[name]).tensors
    check_plain_tensors(SCHEMES[name], shape, tensors)


@pytest.mark.parametrize(
    ("scheme", "tensor", "damage", "rule", "value"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES]
)
def test_a_broken_rule_is_named(scheme: str, tensor: str, damage: Damage, rule: str, value: str) -> None:
    tensors = _tensors(scheme)
    check_plain_tensors(SCHEMES[scheme], (N, K), tensors, PREFIX)  # what follows is the damage's doing
    damage(tensors)
    with pytest.raises(CheckpointError) as caught:
        check_plain_tensors(SCHEMES[scheme], (N, K), tensors, PREFIX)
    error = caught.value
    assert error.tensor == PREFIX + tensor
    assert error.rule.startswith(rule)
    assert value in str(error.value)
    assert str(error) == f"checkpoint: {error.tensor}: {error.rule}, got {error.value}"


@pytest.mark.parametrize(("name", "k", "spare"), [("gobo3", 17, 5), ("gobo3a8", 1023, 3), ("gobo4", 17, 4)])
def test_spare_bits_must_be_zero(name: str, k: int, spare: int) -> None:
    """They would change a file's hash without changing the model, or hide something in it."""
    for bit in (8 - spare, 7):  # the lowest spare bit and the highest
        tensors = _tensors(name, k)
        check_plain_tensors(SCHEMES[name], (N, k), tensors, PREFIX)
        tensors["qdata"][N - 1, -1] |= 1 << bit
        with pytest.raises(CheckpointError) as caught:
            check_plain_tensors(SCHEMES[name], (N, k), tensors, PREFIX)
        assert caught.value.tensor == PREFIX + "qdata"
        assert caught.value.rule == f"the {spare} spare bits of a row must be 0"
        assert str(caught.value.value).endswith(f"at position {N - 1}")


def test_wide_matrices_have_32_bit_columns() -> None:
    k = 32_769
    tensors = quantize(random_weight(1, k), SCHEMES["gobo3"]).tensors
    check_plain_tensors(SCHEMES["gobo3"], (1, k), tensors)
    tensors["outlier_col"] = tensors["outlier_col"].to(torch.int16)
    with pytest.raises(CheckpointError, match=r"outlier_col: data type must be int32, got int16"):
        check_plain_tensors(SCHEMES["gobo3"], (1, k), tensors)


@pytest.mark.parametrize("name", ["gobo3", "gobo4a8"])
def test_a_matrix_without_outliers_passes(name: str) -> None:
    tensors = quantize(torch.full((4, 8), 0.5), SCHEMES[name]).tensors
    assert tensors["outlier_col"].numel() == 0
    check_plain_tensors(SCHEMES[name], (4, 8), tensors)
    tensors["outlier_rowptr"][2:] = 1  # an outlier that is not there: out of bounds for a kernel
    with pytest.raises(CheckpointError, match="must end at 0, got 1"):
        check_plain_tensors(SCHEMES[name], (4, 8), tensors)


def test_columns_may_fall_from_row_to_row() -> None:
    """Order is within a row only: a rule that looked at neighbours alone would refuse valid files."""
    tensors = quantize(torch.full((2, 8), 0.5), SCHEMES["gobo3"]).tensors
    tensors |= {
        "outlier_rowptr": torch.tensor([0, 1, 2], dtype=torch.int32),
        "outlier_col": torch.tensor([5, 0], dtype=torch.int16),
        "outlier_delta": torch.ones(2),
    }
    check_plain_tensors(SCHEMES["gobo3"], (2, 8), tensors)
    tensors["outlier_col"] = torch.tensor([5, 5], dtype=torch.int16)
    check_plain_tensors(SCHEMES["gobo3"], (2, 8), tensors)


def test_equal_float_centroids_need_no_lowest_code() -> None:
    """Only int8 centroids are ever expanded and packed again."""
    tensors = _tensors("gobo3")
    _equal_centroids(tensors)
    check_plain_tensors(SCHEMES["gobo3"], (N, K), tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_finite_and_positive(bad: float) -> None:
    for check in (check_finite, check_positive):
        check("x", torch.tensor([1.0, 2.0]))
        with pytest.raises(CheckpointError, match=r"checkpoint: x: every value must be finite.* at position 1"):
            check("x", torch.tensor([1.0, bad]))
    check_finite("x", torch.tensor([-1.0, 0.0]))
    check_finite("x", torch.zeros(0))
