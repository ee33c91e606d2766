"""Ceilings of a device: every quantity is a row, with a rate or with a reason."""

import pytest
import torch

from benchmarks import ceilings
from benchmarks.bounds import Bounds
from benchmarks.ceilings import measure_ceilings
from benchmarks.results_schema import Work
from qbert import timing
from qbert.analyze.targets import TARGETS


@pytest.fixture(autouse=True)
def _no_rests(monkeypatch):
    monkeypatch.setattr(timing, "come_to_rest", lambda: 0.0)


def test_a_cpu_has_a_row_for_every_ceiling():
    rows = {row.quantity: row for row in measure_ceilings("cpu", size=64, copy_bytes=1 << 16, seconds=0.0)}
    assert list(rows) == ["copy", "fp32", "bf16", "int8"]
    for row in rows.values():
        assert (row.per_second is None) == (row.reason is not None)
        assert row.how
        assert row.datasheet is None
    assert rows["copy"].per_second == pytest.approx(2 * (1 << 16) / rows["copy"].time.median)
    assert rows["fp32"].per_second == pytest.approx(2 * 64**3 / rows["fp32"].time.median)


def test_bounds_come_from_them():
    rows = list(measure_ceilings("cpu", size=64, copy_bytes=1 << 16, seconds=0.0))
    bounds = Bounds.of(rows)
    rate = {row.quantity: row.per_second for row in rows}
    assert bounds.seconds(Work(operations=rate["fp32"], precision="fp32", bytes=0)) == pytest.approx(1.0)
    assert bounds.seconds(Work(operations=1.0, precision="fp32", bytes=2 * rate["copy"])) == pytest.approx(2.0)
    assert bounds.seconds(Work(operations=1.0, precision="fp8", bytes=1.0)) is None
    assert bounds.share(Work(operations=rate["fp32"], precision="fp32", bytes=0), 4.0) == pytest.approx(0.25)


def test_what_a_device_cannot_do_is_a_reason(monkeypatch):
    def refuses(device, size):
        raise RuntimeError("no fp8 here")

    monkeypatch.setitem(ceilings._CPU_PRODUCTS, "fp8", ("x", refuses))
    monkeypatch.setitem(ceilings._CPU_PRODUCTS, "int8", ("x", lambda device, size: lambda: 1 / 0))
    monkeypatch.setattr(ceilings, "native_cpu", lambda: None)
    rows = list(measure_ceilings("cpu", size=16, copy_bytes=1 << 12, seconds=0.0))
    assert [row.reason for row in rows] == [
        None, None, None, "RuntimeError: no fp8 here", "ZeroDivisionError: division by zero", "needs the C++ extension",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-PCIE-40GB", None),
    ],
)
def test_a_datasheet_stands_beside_only_the_gpu_it_is_of(monkeypatch, name, target):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = ceilings._datasheet(torch.device("cuda"))
    assert found.get("bf16") == (TARGETS[target].peaks["bf16"] if target else None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_reaches_a_sensible_share_of_its_datasheet():
    for row in measure_ceilings("cuda", seconds=0.1):
        if row.per_second and row.datasheet:
            assert 0.3 < row.per_second / row.datasheet < 1.05, row
