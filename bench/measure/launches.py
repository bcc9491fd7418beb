"""How often a step launches work on the GPU and how often the host waits for it.

Counted are the calls to the CUDA runtime and driver that torch.profiler records, so that compiled
regions, Triton kernels and CUDA graphs count as the driver sees them. On the CPU the tests count
what would wait (`tests/support/fake_cuda.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

RANGE = "one step"
# Calls of runtime and driver, with or without _v2, Ex or ExC.
LAUNCHES = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch)")
WAITS = re.compile(r"cu(da)?((Stream|Device|Ctx|Event)Synchronize|Memcpy(?!.*Async))")


def count(events: Iterable[Any]) -> dict[str, int]:
    """Launches and waits of the host inside the range `RANGE`, as fields of a row.

    `events` are those of `torch.profiler`. Calls outside the range are the profiler's own. Empty
    when the profiler saw no launch: it cannot record the device on this machine.
    """
    # The range exists once more on the device, where it ends after the host has gone on.
    events = [event for event in events if event.device_type.name == "CPU"]
    whole = [event.time_range for event in events if event.name == RANGE]
    inside = [
        event.name
        for event in events
        if any(span.start <= event.time_range.start <= span.end for span in whole)
    ]
    launches = sum(bool(LAUNCHES.match(name)) for name in inside)
    waits = sum(bool(WAITS.match(name)) for name in inside)
    return {"kernel_launches": launches, "host_syncs": waits} if launches else {}


def launches_of(step: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Fields of a row for one step on a CUDA device; empty on the CPU."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(RANGE):
            step()
        torch.cuda.synchronize(device)
    return count(profiler.events() or [])
