"""Images per second of a loader, or of whatever else takes batches, measured for a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastmoco.data.loader import Loader

FOREVER = 10**9
"""Steps: more than any measurement takes."""
_MOST_CALLS = 50


def puller(loader: Loader) -> Callable[[], object]:
    """A function that takes the next batch."""
    batches = loader.batches(0, FOREVER)
    return lambda: next(batches)


def rate(
    once: Callable[[], object], images: int, device: torch.device, budget_s: float = 4.0
) -> float:
    """Images per second over about budget_s, after warm-up: two calls, or a slow one.

    once: takes `images` images.
    """
    began = time.perf_counter()
    once()
    _wait(device)
    if time.perf_counter() - began < budget_s:
        once()
        _wait(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < budget_s and count < _MOST_CALLS:
        once()
        count += 1
    _wait(device)
    return count * images / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
