"""What a sanitizer is run over: every kernel is called, with the weight in the layout that it reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import every_kernel
from benchmarks.every_kernel import Case
from qbert.devices import GPUS
from qbert.formats import SCHEMES
from qbert.ops import cuda
from qbert.ops.operations import FLOAT_TABLE, OPERATIONS, Linear
from qbert.ops.reference import linear
from qbert.ops.table import KERNELS
from qbert.target import Target
from qbert.testing import schemes_of
from qbert.weight import Layout

H100 = Target(**GPUS["h100"].limits, native=True)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("scheme", "int8_out"), [("w8a8", False), ("w4a8", False), ("gobo4a8", True), ("gobo4", False), ("gobo3", False)]
)
@pytest.mark.parametrize("prefer", ["", "cuda", "triton"])
def test_each_kernel_gets_the_layout_that_it_reads(
    scheme: str, int8_out: bool, prefer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Layout] = {}

    def rows(name: str) -> Any:
        def compute(a: Linear) -> torch.Tensor:
            seen[name] = a.weight.layout
            return linear(a)

        of_backend = [row for row in KERNELS["linear"] if row.name.startswith(name)]
        return tuple(replace(row, call=compute) for row in of_backend)

    monkeypatch.setattr(every_kernel, "target_of", lambda device: replace(H100, prefer=prefer))
    for name in ("triton", "cuda"):
        monkeypatch.setattr(getattr(every_kernel, name), "KERNELS", rows(name))
    case = Case("linear", scheme, (3, 32, 128), int8_out)
    assert every_kernel.check(case, CPU, "cuda") == {"triton": None, "cuda": None}
    assert seen["cuda"] is (cuda.own_layout(SCHEMES[scheme]) or seen["triton"])


def test_only_where_another_kernel_steps_in_may_one_refuse_a_problem() -> None:
    w8a8, w4a8 = (Case("linear", scheme, (37, 200, 176)) for scheme in ("w8a8", "w4a8"))
    assert every_kernel.may_refuse(w8a8, "cuda")
    assert every_kernel.may_refuse(Case("add_norm", None, (37, 1, 768)), "cuda")
    assert not every_kernel.may_refuse(w8a8, "triton")
    assert not every_kernel.may_refuse(w4a8, "cuda")


def test_a_problem_that_a_kernel_does_not_take_is_said() -> None:
    rows = every_kernel.kernels_of("linear", "interpreter")
    case = Case("linear", "w8a8", (3, 32, 128))
    other = replace(rows["triton"], obstacle=lambda problem, target: "not today")  # type: ignore[type-var]
    assert every_kernel._wrong(case, "triton", other, H100, CPU) == every_kernel.NOT_TAKEN


def test_every_operation_scheme_and_result_is_there() -> None:
    cases = list(every_kernel.cases())
    assert len(set(cases)) == len(cases)
    assert {case.operation for case in cases} == set(OPERATIONS)
    for operation in OPERATIONS:
        assert {case.scheme for case in cases if case.operation == operation} >= set(schemes_of(operation))
    assert {case.int8_out for case in cases if case.operation == "attention"} == {True, False}
    assert {case.pattern for case in cases if case.operation == "attention"} == set(every_kernel.PATTERNS)
    assert all(SCHEMES[str(case.scheme)].activation for case in cases if case.operation == "linear" and case.int8_out)
    assert FLOAT_TABLE in {case.scheme for case in cases}


def test_every_operation_is_right_on_this_cpu() -> None:
    seen = set()
    for case in every_kernel.cases():
        if (case.operation, case.scheme) not in seen:
            seen.add((case.operation, case.scheme))
            assert every_kernel.check(case, CPU, "cpu") == {"operator": None}, case
