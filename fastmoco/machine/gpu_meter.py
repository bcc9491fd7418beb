"""Power, clock and utilization of a GPU, as torch reads them from NVML.

Reading does not wait for the device. What a GPU does not report is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

Sample = dict[str, float]
"""Readings at one moment, by name."""
Meter = Callable[[], Sample]
FIELDS: dict[str, Callable[[torch.device], float]] = {
    "power_w": lambda device: torch.cuda.power_draw(device) / 1000,
    "sm_clock_mhz": lambda device: torch.cuda.clock_rate(device),
    "gpu_utilization_percent": lambda device: torch.cuda.utilization(device),
}


def build_meter(device: torch.device, say: Callable[[str], None]) -> Meter | None:
    """Reads the GPU once per call; None on the CPU and, after one sentence, where nothing reads."""
    if device.type != "cuda":
        return None
    known, missing = [], ""
    for name, read in FIELDS.items():
        try:
            read(device)
            known.append(name)
        except Exception as error:  # NVML reports every absence by an exception class of its own
            missing = type(error).__name__
    if not known:
        say(f"NVML is not usable ({missing}): power, clock and energy are not recorded.")
        return None
    return partial(_read, known, device)


def _read(names: Sequence[str], device: torch.device) -> Sample:
    return {name: float(FIELDS[name](device)) for name in names}
