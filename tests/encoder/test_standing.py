"""What tells whether things in memory are still what they were, compiled and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qbert.ops import standing


@pytest.mark.parametrize("compiled", [False, True])
def test_places_types_and_lengths(compiled: bool) -> None:
    if compiled and standing._cpu is None:
        pytest.skip("the extension is not built")
    of: Any = standing._cpu if compiled else standing
    places, types, lengths = (
        getattr(of, f"{'' if compiled else '_'}same_{what}") for what in ("places", "types", "lengths")
    )
    value, other = [1], {"a": 1.5, "b": None}
    place: dict[str, Any] = {"x": value, **other}
    names = ["x", "a", "b", "gone"]
    assert places([place] * 4, names, [value, place["a"], None, None])
    assert not places([place] * 4, names, [[1], place["a"], None, None])
    assert not places([place] * 4, names, [value, place["a"], None, value])
    assert types([1, "a", value], [int, str, list])
    assert not types([True, "a", value], [int, str, list])
    assert lengths([value, other, {}], [1, 2, 0])
    assert not lengths([value, other, {}], [1, 2, 1])


@pytest.mark.parametrize("compiled", [False, True])
def test_every_byte_counts(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and standing._cpu is None:
        pytest.skip("the extension is not built")
    if not compiled:
        monkeypatch.setattr(standing, "_cpu", None)
    tensors = [torch.randn(size) for size in (1, 7, 8, 33)] + [
        torch.zeros(3, dtype=torch.int8),
        torch.ones(2).bfloat16(),
    ]
    held = standing.Bytes(tensors)
    assert held.same()
    for tensor in tensors:
        for index in range(tensor.numel()):
            before = tensor[index].clone()
            tensor.data[index] += 1
            assert not held.same()
            tensor.data[index] = before
            assert held.same()
    tensors[3].data = torch.zeros(33)  # other memory: the watch compares addresses, too
    assert held.same()
    assert standing.Bytes(()).same()
