"""Power, clock and utilization of a GPU while a contestant works, as torch reads them from NVML.

The process that waits reads them, so the one that is timed is not disturbed. What a GPU does not
report is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

SAMPLE_EVERY_S = 0.05
Sample = dict[str, float]
"""Fields of a row at one moment."""
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
        say(f"NVML is not usable ({missing}): rows have no power, clock and energy.")
        return None
    return partial(_read, known, device)


def _read(names: Sequence[str], device: torch.device) -> Sample:
    return {name: float(FIELDS[name](device)) for name in names}


def summary(samples: Sequence[Sample], seconds: float, images: int) -> dict[str, Any]:
    """Means over the samples of windows of `seconds` that trained on `images` samples together.

    With power there is also the energy, its mean times the seconds.
    """
    found: dict[str, Any] = {
        name: round(sum(sample[name] for sample in samples) / len(samples), 1)
        for name in (samples[0] if samples else ())
    }
    if "power_w" in found:
        found["energy_from"] = "sampled power"
        kwh = found["power_w"] * seconds / images * 1e6 / 3.6e6
        found["kwh_per_million_images"] = float(f"{kwh:.4g}")
    return found
