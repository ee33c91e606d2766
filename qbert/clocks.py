"""What holds a GPU's clocks: their state, power, temperature and what throttles them. Read, never set."""

from __future__ import annotations

import importlib
import subprocess

import torch
from pydantic import BaseModel, ConfigDict


class GpuState(BaseModel):
    """What the driver said at one moment. None: it did not.

    Attributes:
        throttling: why the clocks were held down; empty: they were not, or only because the GPU was idle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    watts: float | None = None
    celsius: float | None = None
    throttling: tuple[str, ...] = ()


# Bits of NVML's "clocks event reasons"; that the GPU idled is none.
_THROTTLING = {
    0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "software thermal",
    0x40: "hardware thermal", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip
_SMI_FIELDS = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"


def gpu_state(device: torch.device | str = "cuda") -> GpuState:
    """Clocks, power and temperature now, by NVML or `nvidia-smi`; read, never set. Empty where neither answers."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    for read in (_state_by_nvml, _state_by_smi):
        try:
            return read(uuid)
        except (
            Exception
        ):  # no library, no program, no rights, a field that this GPU does not have: figures stay unknown
            continue
    return GpuState()


def _state_by_nvml(uuid: str) -> GpuState:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    gpu = nvml.nvmlDeviceGetHandleByUUID(uuid)
    return GpuState(
        sm_mhz=nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        memory_mhz=nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        watts=nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        celsius=nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        throttling=_reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)),
    )


def _state_by_smi(uuid: str) -> GpuState:
    answer = query_smi(uuid, _SMI_FIELDS)
    if answer is None:
        return GpuState()
    sm, memory, watts, celsius, reasons = answer
    return GpuState(
        sm_mhz=int(sm), memory_mhz=int(memory), watts=float(watts), celsius=float(celsius),
        throttling=_reasons(int(reasons, 16)),
    )  # fmt: skip


def _reasons(bits: int) -> tuple[str, ...]:
    return tuple(name for bit, name in _THROTTLING.items() if bits & bit)


def query_smi(uuid: str, fields: str) -> list[str] | None:
    """Fields of `nvidia-smi --query-gpu` (read only), or None where there is no such program or it does not answer."""
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = [each.strip() for each in answer.strip().split(",")]
    return found if len(found) == len(fields.split(",")) else None
