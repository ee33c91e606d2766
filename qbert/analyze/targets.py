"""Peak rates of machines, for the roofline: public figures of GPUs (`qbert.devices`), and measured ones of this machine."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from qbert.devices import GPUS
from qbert.errors import QBertError
from qbert.target import read_text
from qbert.timing import Rules, elapsed, measure

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


TARGETS: dict[str, RooflineTarget] = {
    name: RooflineTarget(
        name, gpu.description, gpu.peaks, gpu.peaks["fp32"], gpu.bandwidth, GPU_LAUNCH_S, f"{gpu.source}; launch: assumed"
    )
    for name, gpu in GPUS.items()
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
    lines = read_text("/proc/cpuinfo").splitlines()  # none where this is not Linux
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _best_seconds(device: torch.device, run: Callable[[], object]) -> float:
    """The shortest of the runs that fit into the time for one rate."""
    samples = measure({"rate": run}, device, Rules(_RATE_SECONDS, 0.0, _MIN_REPEATS, graphs="never"))
    if samples.failures:
        raise QBertError(f"cannot measure {device}: {samples.failures['rate']}")
    return min(samples["rate"].rounds)


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
    while elapsed(run, device) < _ENOUGH_S and size < _LAST_SIZE[device.type]:
        size *= 2
        run = product(size)
        run()
    return 2 * size**3 / _best_seconds(device, run)


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy, read and write together."""
    nbytes = _COPY_BYTES[device.type]
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
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
