"""Peak rates of machines, for the roofline: public figures of GPUs, and measured ones of this machine.

All figures are dense; datasheets that print only the figure with 2:4 sparsity are halved. They are peaks at boost clock:
no kernel reaches them, so a time predicted from them is a floor.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qbert.errors import QBertError

_TERA, _GIGA = 1e12, 1e9

# Bytes of one element in each precision that a user can choose for the float part of a model.
DTYPE_BYTES: dict[str, int] = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
DTYPE_NAMES: dict[torch.dtype, str] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class RooflineTarget:
    """What a machine can do at most.

    Attributes:
        name: what users type.
        description: the device.
        peaks: FLOP/s (OP/s for int8) of matrix products by precision: fp32, tf32, bf16, fp16, fp8, int8.
        vector_flops: FLOP/s of float32 arithmetic outside of the matrix units.
        bandwidth: bytes/s of the main memory.
        launch_s: seconds from one small kernel to the next when the host launches them one by one.
        source: where the figures come from.
    """

    name: str
    description: str
    peaks: Mapping[str, float]
    vector_flops: float
    bandwidth: float
    launch_s: float
    source: str

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in that precision.

        Raises:
            QBertError: the machine has no units for it, or no figure is known.
        """
        if precision not in self.peaks:
            raise QBertError(f"target {self.name} has no peak for {precision}; it has {', '.join(self.peaks)}")
        return self.peaks[precision]


# An assumption, not a datasheet figure: about 3 us a launch was seen below PyTorch's own dispatch costs in a profile of
# bitsandbytes (26 us kernels), and back-to-back empty kernels are commonly measured at 2 to 5 us. CUDA graphs hide most.
GPU_LAUNCH_S = 3e-6


def _gpu(
    name: str, description: str, *, bandwidth_gb: float, source: str, fp32: float, **tensor_tera: float
) -> RooflineTarget:
    """A GPU from its datasheet: TFLOPS (TOPS for int8) and GB/s; `fp32` is that of the CUDA cores."""
    peaks = {precision: tera * _TERA for precision, tera in {"fp32": fp32, **tensor_tera}.items()}
    return RooflineTarget(
        name, description, peaks, fp32 * _TERA, bandwidth_gb * _GIGA, GPU_LAUNCH_S, f"{source}; launch: assumed"
    )


TARGETS: dict[str, RooflineTarget] = {
    target.name: target
    for target in (
        _gpu(
            "h100", "NVIDIA H100 SXM5 80 GB", fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4, fp8=1978.9, int8=1978.9,
            bandwidth_gb=3350, source="NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 SXM5; bandwidth: datasheet",
        ),
        _gpu(
            "h200", "NVIDIA H200 SXM 141 GB", fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4, fp8=1978.9, int8=1978.9,
            bandwidth_gb=4800, source="NVIDIA H200 datasheet: rates as H100 SXM5, 4.8 TB/s",
        ),
        _gpu(
            "a100", "NVIDIA A100 SXM4 80 GB", fp32=19.5, tf32=156, bf16=312, fp16=312, int8=624,
            bandwidth_gb=2039, source="NVIDIA A100 80GB datasheet, SXM",
        ),
        _gpu(
            "l40s", "NVIDIA L40S 48 GB", fp32=91.6, tf32=183, bf16=362.05, fp16=362.05, fp8=733, int8=733,
            bandwidth_gb=864, source="NVIDIA L40S datasheet, figures without sparsity",
        ),
        _gpu(
            "a10", "NVIDIA A10 24 GB", fp32=31.2, tf32=62.5, bf16=125, fp16=125, int8=250,
            bandwidth_gb=600, source="NVIDIA A10 datasheet, figures without sparsity",
        ),
        _gpu(
            "t4", "NVIDIA T4 16 GB", fp32=8.1, fp16=65, int8=130,
            bandwidth_gb=320, source="NVIDIA T4 datasheet",
        ),
    )
}  # fmt: skip

HERE = "here"

# measure_here() doubles its matrices until one product takes this long, or until they are as large as they may get.
_ENOUGH_S = 0.05
_FIRST_SIZE = 256
_LAST_SIZE = {"cpu": 2048, "cuda": 8192}
_MIN_REPEATS = 3
_RATE_SECONDS = 0.3  # spent on each rate: on a shared machine the best of a few tries is not the peak
# Far beyond the caches: 128 MiB on a CPU, 512 MiB on a GPU.
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 29}
_LAUNCHES = 500


def get_target(name: str, device: torch.device) -> RooflineTarget:
    """The target of that name; ``here`` is measured on `device`.

    Raises:
        QBertError: unknown name.
    """
    if name == HERE:
        return measure_here(device)
    if name not in TARGETS:
        raise QBertError(f"unknown target {name!r}; allowed: {', '.join((HERE, *TARGETS))}")
    return TARGETS[name]


def measure_here(device: torch.device | None = None) -> RooflineTarget:
    """Rates of this machine by torch's own kernels, in a few seconds: large products, a copy, and a tiny operation.

    They are what torch reaches, not what the hardware could do: torch's int8 product on a CPU leaves AMX unused.

    Args:
        device: CPU or CUDA device; the CPU by default.
    """
    device = device or torch.device("cpu")
    if device.type not in _LAST_SIZE:
        raise QBertError(f"cannot measure device {device.type!r}; allowed: {', '.join(_LAST_SIZE)}")
    peaks = {name: _matmul_rate(device, _float_product(device, dtype)) for dtype, name in DTYPE_NAMES.items()}
    peaks["int8"] = _matmul_rate(device, _int8_product(device))
    return RooflineTarget(
        HERE,
        device_description(device),
        peaks,
        # Vector arithmetic runs on the units that do float32 products where there are no matrix units for them.
        peaks["fp32"],
        _copy_bandwidth(device),
        _launch_seconds(device),
        f"measured by torch {torch.__version__}: best product and best copy in {_RATE_SECONDS} s each",
    )


def device_description(device: torch.device) -> str:
    """Name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _best_seconds(device: torch.device, run: Callable[[], object]) -> float:
    """The shortest of the runs that fit into the time for one rate."""
    times: list[float] = []
    while len(times) < _MIN_REPEATS or sum(times) < _RATE_SECONDS:
        times.append(_seconds(device, run))
    return min(times)


Product = Callable[[int], Callable[[], object]]


def _float_product(device: torch.device, dtype: torch.dtype) -> Product:
    def prepare(size: int) -> Callable[[], object]:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return lambda: left @ right

    return prepare


def _int8_product(device: torch.device) -> Product:
    def prepare(size: int) -> Callable[[], object]:
        left, right = (torch.randint(-128, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(left, right.t())  # (n, k) transposed, as a linear's weight

    return prepare


def _matmul_rate(device: torch.device, product: Product) -> float:
    """FLOP/s (multiply-add is 2) of a square product, the largest size that stays quick."""
    size = _FIRST_SIZE
    run = product(size)
    run()
    while _seconds(device, run) < _ENOUGH_S and size < _LAST_SIZE[device.type]:
        size *= 2
        run = product(size)
        run()
    return 2 * size**3 / _best_seconds(device, run)


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy, read and write together."""
    nbytes = _COPY_BYTES[device.type]
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    copy.copy_(source)  # touches the pages
    return 2 * nbytes / _best_seconds(device, lambda: copy.copy_(source))


def _launch_seconds(device: torch.device) -> float:
    """Seconds from one tiny operation to the next."""
    one = torch.zeros(1, device=device)

    def launch_many() -> None:
        for _ in range(_LAUNCHES):
            one.add_(1)

    launch_many()
    return _best_seconds(device, launch_many) / _LAUNCHES
