"""GPUs as their data sheets have them: every figure stands here once.

For machines that are not here: what this machine is says `qbert.target`, what it reaches is measured. The limits of a thread
block are those of NVIDIA's CUDA programming guide. All rates are dense (data sheets that print only the figure with 2:4
sparsity are halved) and at boost clock: no kernel reaches them, so a time predicted from them is a floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: what users type.
        description: with its variant, which the rates depend on.
        driver_name: how the driver calls it.
        sm: compute capability as major * 10 + minor.
        sm_count: multiprocessors.
        shared_memory: bytes that one thread block can use.
        bandwidth: bytes/s of the memory.
        peaks: FLOP/s (OP/s for int8) of matrix products by precision; fp32: on the CUDA cores.
        source: of the rates.
    """

    name: str
    description: str
    driver_name: str
    sm: int
    sm_count: int
    shared_memory: int
    bandwidth: float
    peaks: Mapping[str, float]
    source: str

    @property
    def limits(self) -> dict[str, Any]:
        """What choosing a kernel asks for: the fields of a `qbert.target.Target`."""
        return {
            "device": "cuda",
            "isa": "",
            **{each: getattr(self, each) for each in ("sm", "sm_count", "shared_memory")},
        }


def _gpu(names: tuple[str, str, str], block: tuple[int, int, int], gigabytes: float, source: str, **tera: float) -> Gpu:
    """From GB/s and TFLOPS (TOPS for int8)."""
    return Gpu(*names, *block, gigabytes * 1e9, {precision: each * 1e12 for precision, each in tera.items()}, source)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu(
            ("h100", "NVIDIA H100 SXM5 80 GB", "NVIDIA H100 80GB HBM3"), (90, 132, 232_448), 3350,
            "NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 SXM5; bandwidth: datasheet",
            fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4, fp8=1978.9, int8=1978.9,
        ),
        _gpu(
            ("h200", "NVIDIA H200 SXM 141 GB", "NVIDIA H200"), (90, 132, 232_448), 4800,
            "NVIDIA H200 datasheet: rates as H100 SXM5, 4.8 TB/s",
            fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4, fp8=1978.9, int8=1978.9,
        ),
        _gpu(
            ("a100", "NVIDIA A100 SXM4 80 GB", "NVIDIA A100-SXM4-80GB"), (80, 108, 166_912), 2039,
            "NVIDIA A100 80GB datasheet, SXM",
            fp32=19.5, tf32=156, bf16=312, fp16=312, int8=624,
        ),
        _gpu(
            ("l40s", "NVIDIA L40S 48 GB", "NVIDIA L40S"), (89, 142, 101_376), 864,
            "NVIDIA L40S datasheet, figures without sparsity",
            fp32=91.6, tf32=183, bf16=362.05, fp16=362.05, fp8=733, int8=733,
        ),
        _gpu(
            ("a10", "NVIDIA A10 24 GB", "NVIDIA A10"), (86, 72, 101_376), 600,
            "NVIDIA A10 datasheet, figures without sparsity",
            fp32=31.2, tf32=62.5, bf16=125, fp16=125, int8=250,
        ),
        _gpu(
            ("t4", "NVIDIA T4 16 GB", "Tesla T4"), (75, 40, 65_536), 320,
            "NVIDIA T4 datasheet",
            fp32=8.1, fp16=65, int8=130,
        ),
    )
}  # fmt: skip


def datasheet_of(driver_name: str) -> Gpu | None:
    """The GPU that the driver calls so; None where no figures are known: another variant has others."""
    return next((gpu for gpu in GPUS.values() if gpu.driver_name == driver_name), None)
