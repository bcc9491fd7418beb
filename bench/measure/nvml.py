"""Power, clock, utilization and energy of a GPU while a contestant works.

The process that waits reads them, so the one that is timed is not disturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmoco.machine.gpu_meter import Meter, Sample, build_meter

__all__ = ["SAMPLE_EVERY_S", "Meter", "Sample", "build_meter", "summary"]
SAMPLE_EVERY_S = 0.05


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
