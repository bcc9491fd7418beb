"""How fast this machine multiplies fp32 matrices, and which share of that a step reaches."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.measure.rows import quantiles

SIDE = 2048


class Rate:
    """The rate of torch's product of two matrices of 2048 x 2048 on every core, in GFLOP/s.

    Measured in turns with the contestants, so that a busy machine is as busy for all of them.
    """

    def __init__(self) -> None:
        self._rates: list[float] = []

    def measure(self) -> None:
        """Time one product; the first call also one that is not counted."""
        left, right = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
        if not self._rates:
            left @ right
        began = time.perf_counter()
        left @ right
        self._rates.append(2e-9 * SIDE**3 / (time.perf_counter() - began))

    def skip(self) -> None:
        """In the place of `measure` where no such rate is of interest."""

    def summary(self) -> dict[str, Any]:
        """Field of a row: p20, p50, p80 in GFLOP/s; nothing if nothing was measured."""
        return {"product_gflops": quantiles(self._rates, 1)} if self._rates else {}

    def share(self, row: dict[str, Any], images: int) -> dict[str, Any]:
        """Field of a row whose steps of `images` images have known FLOPs: their share in percent.

        FLOPs are nominal, as torch counts them: padding is multiplied, Winograd saves nothing.
        """
        if not self._rates or "gflop_per_step" not in row:
            return {}
        gflops = row["gflop_per_step"] * row["p50_images_per_second"] / images
        return {"product_share_percent": round(100 * gflops / quantiles(self._rates, 1)[1], 1)}
