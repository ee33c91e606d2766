"""What a sanitizer is run over: every kernel is called, with the weight in the layout that it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import every_kernel
from qbert.devices import GPUS
from qbert.dispatch import COMPILED_LAYOUTS, TRITON_LAYOUTS
from qbert.layout import Layout
from qbert.ops import reference_of
from qbert.target import Target
from qbert.testing import schemes_of

H100 = Target(**GPUS["h100"].limits, native=True)


@pytest.mark.parametrize("operation", ["w8a8_linear", "w4a8_linear", "gobo_linear_requant", "gobo_a16_linear"])
@pytest.mark.parametrize("prefer", ["", "cuda", "triton"])
def test_each_kernel_gets_the_layout_that_it_reads(
    operation: str, prefer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Layout] = {}

    def kernel(name: str) -> Any:
        def compute(*arguments: Any) -> torch.Tensor:
            seen[name] = Layout(arguments[-1])
            return reference_of(operation)(*arguments)

        return compute

    target = Target(**{**H100.__dict__, "prefer": prefer})
    monkeypatch.setattr(every_kernel, "target_of", lambda device: target)
    monkeypatch.setattr(every_kernel, "TRITON", {operation: kernel("triton")})
    monkeypatch.setattr(every_kernel, "COMPILED", {operation: kernel("cuda")})
    found = every_kernel.check(operation, schemes_of(operation)[0], (3, 40, 128), torch.device("cpu"), "cuda")
    assert found == {"triton": None, "cuda": None}
    assert seen["triton"] in TRITON_LAYOUTS[operation]
    assert seen["cuda"] is COMPILED_LAYOUTS.get(operation, seen["triton"])


def test_only_where_another_kernel_steps_in_may_one_refuse_a_problem() -> None:
    assert every_kernel.may_refuse("w8a8_linear", "cuda")
    assert not every_kernel.may_refuse("w8a8_linear", "triton")
    assert not every_kernel.may_refuse("w4a8_linear", "cuda")
