"""Power, clocks, utilization and energy of one GPU, read through NVML (package nvidia-ml-py).

A meter reads from the process that waits, so the one that is timed is not disturbed. Energy is the
difference of the driver's own counter where the GPU has one (Volta and later), else the mean of
the sampled power times the seconds; a row says which. What a GPU does not report is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

SAMPLE_EVERY_S = 0.05


@dataclass(frozen=True)
class Sample:
    """One reading; None for what this GPU does not report."""

    power_w: float | None
    sm_clock_mhz: float | None
    memory_clock_mhz: float | None
    gpu_utilization_percent: float | None
    """Share of the driver's last sampling period (up to a second) in which a kernel ran."""


@dataclass(frozen=True)
class Usage:
    """Everything read during one window."""

    samples: tuple[Sample, ...]
    counted_j: float | None
    """Joules by the driver's counter; None where the GPU has none."""


@dataclass
class Meter:
    """Reads one GPU: `begin`, any number of `sample`, `end`."""

    nvml: Any
    handle: Any
    _samples: list[Sample] = field(default_factory=list)
    _counter_j: float | None = None

    def begin(self) -> None:
        """A window begins."""
        self._samples = []
        self._counter_j = self._energy_j()

    def sample(self) -> None:
        """Read once; call about every `SAMPLE_EVERY_S`."""
        nvml, handle = self.nvml, self.handle
        power = self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        sm = self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        memory = self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM))
        busy = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        self._samples.append(Sample(power, sm, memory, busy))

    def end(self) -> Usage:
        """The window's end is read too, so that a short one has a sample."""
        self.sample()
        after = self._energy_j()
        known = after is not None and self._counter_j is not None
        return Usage(tuple(self._samples), after - self._counter_j if known else None)  # type: ignore[operator]

    def _energy_j(self) -> float | None:
        return self._ask(lambda: self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000)

    def _ask(self, question: Callable[[], float]) -> float | None:
        try:
            return float(question())
        except self.nvml.NVMLError:  # this GPU or driver does not report it
            return None


def build_meter(device: torch.device, say: Callable[[str], None]) -> Meter | None:
    """The meter of a CUDA device; None on the CPU and, after one sentence, without NVML."""
    if device.type != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        # NVML counts GPUs without regard to CUDA_VISIBLE_DEVICES, so the index would not do.
        uuid = torch.cuda.get_device_properties(device).uuid
        return Meter(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except Exception as error:  # nvml reports every absence by an exception class of its own
        say(
            f"NVML is not usable ({type(error).__name__}): rows have no power, clocks and energy. "
            "The package is nvidia-ml-py."
        )
        return None


def summary(usages: Sequence[Usage], seconds: float, images: int) -> dict[str, Any]:
    """Fields of a row for windows that took `seconds` and trained on `images` samples together.

    Power, clocks and utilization are means over all samples; energy is that of all windows.
    """
    samples = [sample for usage in usages for sample in usage.samples]
    found: dict[str, Any] = {}
    for name in Sample.__dataclass_fields__:
        values = [value for s in samples if (value := getattr(s, name)) is not None]
        if values:
            found[name] = round(sum(values) / len(values), 1)
    counted = [usage.counted_j for usage in usages]
    joules: float | None = None
    if counted and None not in counted:
        joules, found["energy_from"] = sum(j for j in counted if j is not None), "counter"
    elif "power_w" in found:
        joules, found["energy_from"] = found["power_w"] * seconds, "sampled power"
    if joules is not None:
        found["kwh_per_million_images"] = float(f"{joules / images * 1e6 / 3.6e6:.4g}")
    return found
