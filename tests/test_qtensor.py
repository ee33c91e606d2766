"""The file format's specs, and the arithmetic of bytes and bits."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from qbert.formats import SCHEMES, Scheme
from qbert.layout import Layout, layouts_of, qdata_shape
from qbert.qtensor import QuantizedTensor, _wait_for, column_dtype, plain_specs
from qbert.quantizers import quantize
from qbert.testing import random_weight

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
    assert QuantizedTensor(SCHEMES["w8a8"], (0, 8), Layout.PLAIN, empty).bits_per_weight == 0.0


def test_a_gpu_has_a_layout_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("synchronized"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    _wait_for(torch.device("cpu"))
    assert waited == []
    _wait_for(torch.device("cuda", 0))
    assert waited == ["synchronized"]
