"""GPUs as their data sheets have them: every figure stands once, in `qbert/hardware/*.toml`.

For machines that are not here: what this machine is says `qbert.target`, what it reaches is measured. The limits of a thread
block are those of NVIDIA's CUDA programming guide. All rates are dense (data sheets that print only the figure with 2:4
sparsity are halved) and at boost clock: no kernel reaches them, so a time predicted from them is a floor.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
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


HARDWARE = Path(__file__).parent / "hardware"  # a file for each machine; `qbert.cost.target` says what stands in one
_PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")


def _gpus() -> Iterator[Gpu]:
    for path in sorted(HARDWARE.glob("*.toml")):
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        if "gpu" in data:
            chip = data["gpu"]
            peaks: dict[str, float] = {}
            for precision in _PRECISIONS:
                rates = [rate["ops"] for rate in data["rate"] if _multiplies(rate, precision)]
                peaks |= {precision: max(rates)} if rates else {}
            yield Gpu(
                data["name"], data["description"], chip["driver_name"], chip["sm"], data["array"]["units"],
                chip["shared_memory"], data["memory"][0]["bandwidth"], peaks, data["source"],
            )  # fmt: skip


def _multiplies(rate: Mapping[str, Any], precision: str) -> bool:
    """Whether a rate is that of products of two matrices in a precision."""
    return all(precision == each or precision in each for each in (rate["weights"], rate["activations"]))


_NEWEST_FIRST = ("h100", "h200", "b200")
GPUS: dict[str, Gpu] = {
    gpu.name: gpu for gpu in sorted(_gpus(), key=lambda gpu: (gpu.name not in _NEWEST_FIRST, -gpu.sm, gpu.name))
}


def datasheet_of(driver_name: str) -> Gpu | None:
    """The GPU that the driver calls so; None where no figures are known: another variant has others."""
    return next((gpu for gpu in GPUS.values() if gpu.driver_name == driver_name), None)
