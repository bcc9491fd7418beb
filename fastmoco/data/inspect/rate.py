"""Images per second of a loader, or of whatever else takes batches, measured for a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from fastmoco.config import Config
from fastmoco.data.loader import Loader, build_loader
from fastmoco.data.sources.measure import progress
from fastmoco.data.sources.source import Source

FOREVER = 10**9
"""Steps: more than any measurement takes."""
_MOST_CALLS = 50
_CPU_BATCH = 64


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


def loader_rate(config: Config, source: Source) -> tuple[float, str]:
    """Images per second of the loader of a run, two views of each, and what it consists of.

    config: as training resolves it. On the CPU in smaller batches, which change little.
    """
    device = torch.device(
        "cuda" if torch.cuda.is_available() and config.run.device != "cpu" else "cpu"
    )
    batch = config.optim.global_batch_size
    if device.type == "cpu":
        batch = min(batch, _CPU_BATCH)
    small = replace(
        config,
        data=replace(config.data, max_bad_share=1.0),
        optim=replace(config.optim, global_batch_size=batch, accumulate=1),
    )
    with build_loader(small, source, device=device, listed=False) as loader:
        batches = progress(loader.batches(0, FOREVER), lambda _: batch, "loader")
        return rate(partial(next, batches), batch, device), loader.description
