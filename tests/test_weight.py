"""Stored matrices: the file format's specs, the arithmetic of bytes and bits, and what a backend makes of a weight once."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch

from qbert.formats import SCHEMES, Scheme
from qbert.quantizers import quantize
from qbert.testing import random_problem, random_weight, to_device
from qbert.weight import Layout, Weight, codec, plain_specs
from qbert.weight.layout import layouts_of, qdata_shape
from qbert.weight.tensor import OUTLIER_TENSORS, _wait_for, column_dtype, tensor_names

SCHEME = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)


def _width(scheme: Scheme, k: int) -> int:
    return max(1, k // 128) * 128 if scheme.group_size else k


@SCHEME
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 1023)], ids=str)
def test_specs_are_what_quantizers_make(scheme: Scheme, shape: tuple[int, int]) -> None:
    n, k = shape[0], _width(scheme, shape[1])
    weight = quantize(random_weight(n, k), scheme)
    specs = plain_specs(scheme, (n, k), weight.outliers)
    assert weight.layout is Layout.PLAIN
    assert weight.shape == (n, k)
    assert list(weight.tensors) == list(specs)  # the order counts: operators take embedding tables by position
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weight.tensors.items()}
    assert found == {name: (spec.dtype, spec.shape) for name, spec in specs.items()}
    assert all(tensor.is_contiguous() for tensor in weight.tensors.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("w8a8", {"qdata": (torch.int8, (6, 256)), "scale": (torch.float32, (6,))}),
        ("w4a16", {"qdata": (torch.uint8, (6, 128)), "scale": (torch.bfloat16, (6, 4))}),
        (
            "w4a8-g32",
            {"qdata": (torch.uint8, (6, 128)), "scale": (torch.float32, (6,)), "group_scale": (torch.uint8, (6, 8))},
        ),
        (
            "gobo3",
            {
                "qdata": (torch.uint8, (6, 96)),
                "codebook": (torch.float32, (8,)),
                "outlier_rowptr": (torch.int32, (7,)),
                "outlier_col": (torch.int16, (5,)),
                "outlier_delta": (torch.float32, (5,)),
            },
        ),
        (
            "gobo4a8",
            {
                "qdata": (torch.uint8, (6, 128)),
                "codebook": (torch.int8, (16,)),
                "scale": (torch.float32, (1,)),
                "outlier_rowptr": (torch.int32, (7,)),
                "outlier_col": (torch.int16, (5,)),
                "outlier_delta": (torch.float32, (5,)),
            },
        ),
    ],
)
def test_specs_written_by_hand(name: str, expected: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """The file format: a change here breaks every file that exists."""
    specs = plain_specs(SCHEMES[name], (6, 256), outliers=5)
    assert {key: (spec.dtype, spec.shape) for key, spec in specs.items()} == expected


@pytest.mark.parametrize(
    ("k", "dtype"), [(1, torch.int16), (32768, torch.int16), (32769, torch.int32), (65536, torch.int32)]
)
def test_columns_are_16_bits_where_the_last_one_fits(k: int, dtype: torch.dtype) -> None:
    assert column_dtype(k) == dtype
    assert torch.tensor(k - 1).to(dtype).item() == k - 1


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("w8a8", 8 + 32 / 256),
        ("w8", 8 + 32 / 256),
        ("w4a16", 4 + 16 / 64),
        ("w4-g32", 4 + 16 / 32),
        ("w4a8", 4 + 8 / 64 + 32 / 256),
        ("w4a8-g128", 4 + 8 / 128 + 32 / 256),
    ],
)
def test_bits_per_weight_of_integer_schemes(name: str, bits: float) -> None:
    assert quantize(random_weight(6, 256), SCHEMES[name]).bits_per_weight == bits


@pytest.mark.parametrize(
    ("name", "code_bits", "dictionary_bytes"),
    [("gobo3", 3, 32), ("gobo4", 4, 64), ("gobo3a8", 3, 12), ("gobo4a8", 4, 20)],
)
def test_bits_per_weight_of_dictionaries_count_everything(name: str, code_bits: int, dictionary_bytes: int) -> None:
    weight = quantize(random_weight(6, 256), SCHEMES[name])
    assert weight.outliers > 0
    stored = 6 * 256 * code_bits // 8 + dictionary_bytes + 7 * 4 + weight.outliers * (2 + 4)
    assert weight.stored_bytes == weight.nbytes == stored
    assert weight.bits_per_weight == 8 * stored / (6 * 256)


@SCHEME
def test_stored_bytes_do_not_depend_on_the_layout(scheme: Scheme) -> None:
    plain = quantize(random_weight(6, 256), scheme)
    for layout in layouts_of(scheme):
        moved = plain.to_layout(layout)
        assert moved.layout is layout
        assert moved.stored_bytes == plain.nbytes
        assert moved.bits_per_weight == plain.bits_per_weight
        codes_bytes = math.prod(qdata_shape(layout, scheme.weight, 6, 256))
        assert moved.nbytes == plain.nbytes - plain.tensors["qdata"].numel() + codes_bytes


@SCHEME
def test_to_layout_goes_between_any_two(scheme: Scheme) -> None:
    plain = quantize(random_weight(6, 256), scheme)
    for first in layouts_of(scheme):
        for second in layouts_of(scheme):
            weight = plain.to_layout(first).to_layout(second)
            for name, tensor in plain.to_layout(second).tensors.items():
                assert torch.equal(weight.tensors[name], tensor), (first, second, name)


def test_same_layout_is_the_same_object() -> None:
    weight = quantize(random_weight(2, 64), SCHEMES["w4a8"])
    assert weight.to_layout(Layout.PLAIN) is weight


def test_bits_of_an_empty_matrix_are_a_number() -> None:
    empty = {name: torch.empty(spec.shape) for name, spec in plain_specs(SCHEMES["w8a8"], (0, 8)).items()}
    assert Weight(SCHEMES["w8a8"], (0, 8), Layout.PLAIN, empty).bits_per_weight == 0.0


def test_a_gpu_has_a_layout_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("synchronized"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    _wait_for(torch.device("cpu"))
    assert waited == []
    _wait_for(torch.device("cuda", 0))
    assert waited == ["synchronized"]


@SCHEME
def test_a_weight_is_its_tensors_in_order(scheme: Scheme) -> None:
    """Rows are not visible in every layout's codes: they are what the other tensors say."""
    weight = quantize(random_weight(6, 256), scheme)
    assert tensor_names(scheme) == tuple(weight.tensors)
    for layout in layouts_of(scheme):
        moved = weight.to_layout(layout)
        again = Weight.of(list(moved.tensors.values()), scheme, layout, 256)
        assert (again.scheme, again.shape, again.layout) == (scheme, (6, 256), layout)
        assert (again.n, again.k) == (6, 256)
        assert all(again.tensors[name] is tensor for name, tensor in moved.tensors.items())


@SCHEME
def test_another_number_of_tensors_is_an_error(scheme: Scheme) -> None:
    tensors = list(quantize(random_weight(6, 256), scheme).tensors.values())
    for wrong in (tensors[:-1], [*tensors, tensors[-1]], []):
        with pytest.raises(ValueError, match="zip"):
            Weight.of(wrong, scheme, Layout.PLAIN, 256)


@SCHEME
def test_parts_that_a_scheme_has_are_by_name_and_others_are_none(scheme: Scheme) -> None:
    weight = quantize(random_weight(6, 256), scheme)
    assert weight.qdata is weight.tensors["qdata"]
    assert weight.device == torch.device("cpu")
    for name in ("scale", "group_scale", "codebook"):
        assert getattr(weight, name) is weight.tensors.get(name)
    assert (weight.sparse is not None) == scheme.has_dictionary == (weight.outliers > 0)
    if weight.sparse is not None:
        assert weight.sparse == tuple(weight.tensors[name] for name in OUTLIER_TENSORS)
        assert weight.outliers == weight.sparse.delta.numel()
    assert weight.matrices == 1


def test_matrices_are_the_dictionaries_of_a_stack() -> None:
    stacked = random_problem("linear", 1, 6, 128, scheme="gobo4a8", matrices=3).weight
    assert (stacked.matrices, stacked.n) == (3, 6)
    assert stacked.to_layout(Layout.INT4_PANELS).matrices == 3


def test_what_is_prepared_is_made_once_for_each_maker_and_each_weight() -> None:
    made: list[tuple[str, Weight]] = []

    def one(weight: Weight) -> str:
        made.append(("one", weight))
        return "first"

    def nothing(weight: Weight) -> None:
        made.append(("nothing", weight))

    weight = quantize(random_weight(6, 256), SCHEMES["w4a8"])
    assert [weight.prepared(one) for _ in range(3)] == ["first"] * 3
    assert [weight.prepared(nothing) for _ in range(3)] == [None] * 3
    assert made == [("one", weight), ("nothing", weight)]
    moved = weight.to_layout(Layout.BYTES)
    assert moved.prepared(one) == "first"
    assert made[-1] == ("one", moved)


def test_what_is_prepared_is_not_part_of_a_weight() -> None:
    """Addresses of its tensors would follow a copy into another process, or stay behind when it is moved."""
    weight = quantize(random_weight(6, 256), SCHEMES["gobo3"])
    weight.prepared(lambda weight: object())
    for copied in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), to_device(weight, "cpu")):
        assert not copied._prepared
        assert (copied.scheme, copied.shape, copied.layout) == (weight.scheme, weight.shape, weight.layout)
        assert all(torch.equal(copied.tensors[name], tensor) for name, tensor in weight.tensors.items())
    assert "_prepared" not in repr(weight)


@SCHEME
def test_decoded_is_the_same_in_every_layout_and_type(scheme: Scheme) -> None:
    weight = quantize(random_weight(6, 256), scheme)
    exact = codec.decode(weight, torch.float64)
    assert exact.dtype == torch.float64
    for layout in layouts_of(scheme):
        moved = weight.to_layout(layout)
        assert torch.equal(codec.decode(moved, torch.float64), exact)
        assert torch.equal(codec.decode(moved), codec.decode(weight))
        # code * scale is one rounding of float32, centroid * scale + delta two.
        torch.testing.assert_close(codec.decode(moved).double(), exact, rtol=2**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gobo3", "gobo4"])
def test_outliers_come_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Whatever the type: centroid + difference is the weight in float32 and no wider, and one rounding makes it narrower."""
    original = random_weight(40, 256)
    weight = quantize(original, SCHEMES[name])
    assert weight.sparse is not None
    at = codec.outlier_positions(weight.sparse)
    assert weight.outliers > 10
    assert torch.equal(codec.decode(weight, dtype)[at], original[at].to(dtype))


@pytest.mark.parametrize(
    "scheme", [each for each in SCHEMES.values() if each.activation is None], ids=lambda each: each.name
)
def test_decoded_rows_are_rows_of_the_decoded(scheme: Scheme) -> None:
    weight, chosen = quantize(random_weight(9, 256), scheme), torch.tensor([8, 0, 3, 3, 1])
    for layout in layouts_of(scheme):
        moved = weight.to_layout(layout)
        for ids in (chosen, chosen.to(torch.int32), chosen[:0]):
            assert torch.equal(codec.decode_rows(moved, ids), codec.decode(weight)[ids.long()])
