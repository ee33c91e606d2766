"""The ceilings of this very device, measured: bytes a second of a large copy, operations a second of large products.

    python -m benchmarks.ceilings --target cuda --json out.json

They are what the device's own library reaches on random data at the clocks it really has, not a datasheet's figure, so a share
of them says what is left to gain here. On a CPU the int8 ceiling is what the matrix instruction in use reaches with its
operands in registers, because no library there multiplies int8 as fast as the instruction can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal

import torch
import typer
from rich.table import Table
from torch import Tensor

from qbert.devices import datasheet_of
from qbert.target import bytes_beyond_caches, native_cpu, physical_cores
from qbert.timing import Candidate, Rules, Sample, Unavailable, measure, one_line

from . import options
from .bounds import COPY, Bounds
from .recorder import Recorder, device_name, device_of, run_command, table_console
from .results_schema import CeilingRow

# Rows, columns and depth of the square products: large enough that edges and launches do not count.
SIZES: dict[str, int] = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
SECONDS = 0.5  # of rounds for each ceiling
_PEAK_TRIES = 3
_GIGA, _TERA = 1e9, 1e12

Build = Callable[[torch.device, int], Callable[[], object]]


def measure_ceilings(
    device: torch.device | str = "cpu",
    *,
    size: int | None = None,
    copy_bytes: int | None = None,
    seconds: float = SECONDS,
) -> Iterator[CeilingRow]:
    """One row a ceiling, each as soon as it is there; what this device cannot do has a reason.

    Args:
        size: of the square products; copy_bytes: of the copy. By default large ones for the kind of device.
        seconds: of rounds for each.
    """
    device = torch.device(device)
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    datasheet = _datasheet(device)
    for quantity, row in _rows(device, kind, size or SIZES[kind], copy_bytes or _copy_bytes(kind), seconds):
        row.datasheet = datasheet.get(quantity)
        yield row


def device_bounds(recorder: Recorder, device: torch.device) -> Bounds:
    """The device's ceilings: those that the recorder's file has already, else measured now and added to it."""
    known = recorder.stored(CeilingRow)
    if not known:
        known = list(measure_ceilings(device))
        recorder.extend(known)
    return Bounds.of(known)


def _copy_bytes(kind: str) -> int:
    """Far beyond the caches, those of large servers, too."""
    return max(COPY_BYTES[kind], 2 * bytes_beyond_caches()) if kind == "cpu" else COPY_BYTES[kind]


def _rows(
    device: torch.device, kind: Literal["cpu", "cuda"], size: int, copy_bytes: int, seconds: float
) -> Iterator[tuple[str, CeilingRow]]:
    row = CeilingRow(device=kind, quantity=COPY, how=f"copy of {copy_bytes >> 20} MiB, bytes read and written")
    yield COPY, _timed(row, device, _copy, copy_bytes, 2.0 * copy_bytes, seconds)
    products: Mapping[str, tuple[str, Build]] = _CUDA_PRODUCTS if kind == "cuda" else _CPU_PRODUCTS
    for precision, (how, build) in products.items():
        row = CeilingRow(device=kind, quantity=precision, how=f"{how}, {size} x {size} x {size}")
        yield precision, _timed(row, device, build, size, 2.0 * size**3, seconds)
    if kind == "cpu":
        yield "int8", _instruction_peak()


def _timed(row: CeilingRow, device: torch.device, build: Build, size: int, amount: float, seconds: float) -> CeilingRow:
    """Fills in the rate, or why there is none."""
    try:
        samples = measure({row.quantity: Candidate(build(device, size), graph=False)}, device, Rules(seconds))
    except (RuntimeError, NotImplementedError, AttributeError, Unavailable) as error:
        row.reason = one_line(error)
        return row
    sample: Sample | None = samples.get(row.quantity)
    if sample is None:
        row.reason = samples.failures[row.quantity]
    else:
        row.time, row.per_second = sample, amount / sample.median
    return row


# ---- what is run ----------------------------------------------------------------------------------------------------


def _copy(device: torch.device, size: int) -> Callable[[], object]:
    source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source).copy_(source)
    return lambda: target.copy_(source)


def _float(dtype: torch.dtype) -> Build:
    def build(device: torch.device, size: int) -> Callable[[], object]:
        left, right, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
        return lambda: torch.mm(left, right.t(), out=out)

    return build


def _fp32(device: torch.device, size: int) -> Callable[[], object]:
    return _with_tf32(_float(torch.float32)(device, size), allowed=False)


def _tf32(device: torch.device, size: int) -> Callable[[], object]:
    return _with_tf32(_float(torch.float32)(device, size), allowed=True)


def _with_tf32(call: Callable[[], object], *, allowed: bool) -> Callable[[], object]:
    def run() -> object:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return run


def _int8(device: torch.device, size: int) -> Callable[[], object]:
    left, right = (_codes(device, size) for _ in range(2))
    return lambda: torch._int_mm(left, right.t())


def _codes(device: torch.device, size: int) -> Tensor:
    return torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)


def _fp8(device: torch.device, size: int) -> Callable[[], object]:
    left, right = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


# Precision -> what is run, in words and as a call. Weights are (n, k), as a linear has them.
_CPU_PRODUCTS: dict[str, tuple[str, Build]] = {
    "fp32": ("torch.mm float32", _float(torch.float32)),
    "bf16": ("torch.mm bfloat16", _float(torch.bfloat16)),
}
_CUDA_PRODUCTS: dict[str, tuple[str, Build]] = {
    "bf16": ("torch.mm bfloat16", _float(torch.bfloat16)),
    "int8": ("torch._int_mm", _int8),
    "fp8": ("torch._scaled_mm e4m3, fast accumulation", _fp8),
    "fp16": ("torch.mm float16", _float(torch.float16)),
    "tf32": ("torch.mm float32, tf32 allowed", _tf32),
    "fp32": ("torch.mm float32, tf32 off", _fp32),
}


def _instruction_peak() -> CeilingRow:
    row = CeilingRow(
        device="cpu", quantity="int8", how="the best int8 instruction with operands in registers, all threads"
    )
    products = getattr(native_cpu(), "peak_products_per_second", None)
    if products is None:
        row.reason = "needs the C++ extension"
    else:
        row.per_second = max(2 * float(products(torch.get_num_threads())) for _ in range(_PEAK_TRIES))
    return row


def _datasheet(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    found = datasheet_of(torch.cuda.get_device_name(device))
    return {COPY: found.bandwidth, **found.peaks} if found else {}


# ---- the command ----------------------------------------------------------------------------------------------------


def table(rows: list[CeilingRow], title: str) -> Table:
    """Rates beside the datasheet's."""
    shown = Table(title=title, title_justify="left")
    for header in ("ceiling", "measured", "datasheet", "share", "±", "how"):
        shown.add_column(header, justify="left" if header in ("ceiling", "how") else "right")
    for row in rows:
        share = f"{row.per_second / row.datasheet:.0%}" if row.per_second and row.datasheet else "-"
        spread = f"{row.time.spread:.1%}" if row.time else "-"
        rates = (rate(row.quantity, each) for each in (row.per_second, row.datasheet))
        shown.add_row(row.quantity, *rates, share, spread, row.reason or row.how)
    return shown


def rate(quantity: str, per_second: float | None) -> str:
    """With its unit."""
    if per_second is None:
        return "-"
    return f"{per_second / _GIGA:.1f} GB/s" if quantity == COPY else f"{per_second / _TERA:.2f} TOP/s"


def main(
    target: options.Target = "cpu",
    seconds: Annotated[float, typer.Option(help="of rounds for each ceiling")] = SECONDS,
    size: Annotated[int | None, typer.Option(help="rows of the square products")] = None,
    copy_mib: Annotated[int | None, typer.Option(help="size of the copy")] = None,
    threads: options.Threads = None,
    json_path: options.JsonFile = None,
) -> None:
    """Measures bandwidth and matrix rates of this device."""
    device = device_of(target)
    torch.set_num_threads(threads or physical_cores())
    settings: dict[str, str | int | float | bool | list[str] | None] = {"target": target, "seconds": seconds}
    recorder = Recorder("ceilings", settings, json_path, device)
    for row in measure_ceilings(device, size=size, copy_bytes=copy_mib and copy_mib << 20, seconds=seconds):
        recorder.add(row)
    table_console().print(table(recorder.of(CeilingRow), f"ceilings of {device_name(recorder.machine)}"))


if __name__ == "__main__":
    run_command(main)
