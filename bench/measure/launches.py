"""How often a step launches work on the GPU and how often the host waits for it.

`Watch` counts operations as torch dispatches them, on any device, fake ones included. `launches_of`
counts the calls to the CUDA runtime and driver that torch.profiler records, so that compiled
regions, Triton kernels and CUDA graphs count as the driver sees them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

RANGE = "one step"
# Calls by the beginnings of their names: runtime and driver, with or without _v2, Ex or ExC.
LAUNCHES = (
    *("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel"),
    *("cudaGraphLaunch", "cuGraphLaunch"),
)
WAITS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
)
# These wait by themselves; their asynchronous forms begin with the same letters.
COPIES = ("cudaMemcpy", "cuMemcpy")
# Operations that bring a value or a number of elements to the host, by their ATen names.
SYNCHRONIZING = {
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.equal",
    "aten.is_nonzero",
    "aten.masked_select",
    "aten._unique2",
}


class Watch(TorchDispatchMode):
    """Counts operations by name and collects those for which the host waits.

    These are: a value that is read (`.item()`), a number of elements that depends on values (masks,
    `nonzero`), a copy to the host, and a copy to the device that is not both asynchronous and from
    page-locked memory. Where everything is on the CPU there are no copies to see. A custom op is
    one operation. Compiled code does not run under a dispatch mode.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.host_syncs: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func).removesuffix(".default")
        self.counts[name] += 1
        waits = _copies_to_host(name, args, out) or _copies_from_pageable(name, args, kwargs, out)
        if name in SYNCHRONIZING or waits or _selects(name, args):
            self.host_syncs.append(name)
        return out


def _copies_to_host(name: str, args: tuple[Any, ...], out: Any) -> bool:
    if name == "aten.copy_":
        return bool(args[0].device.type == "cpu" and args[1].device.type == "cuda")
    if not isinstance(out, Tensor) or out.device.type != "cpu":
        return False
    return any(isinstance(a, Tensor) and a.device.type == "cuda" for a in args)


def _copies_from_pageable(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> bool:
    if name == "aten.copy_":
        there, source, asynchronous = args[0], args[1], args[2:3] == (True,)
    elif name == "aten._to_copy":
        there, source, asynchronous = out, args[0], False
    else:
        return False
    asynchronous = asynchronous or kwargs.get("non_blocking", False)
    crosses = bool(source.device.type == "cpu" and there.device.type == "cuda")
    return crosses and not (asynchronous and _is_pinned(source))


def _is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor lies in page-locked memory; a fake one carries that as an attribute."""
    if isinstance(tensor, FakeTensor) or "pinned" in tensor.__dict__:
        return bool(tensor.__dict__.get("pinned", False))
    return tensor.is_pinned()


def _selects(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a mask decides how many elements there will be."""
    if not name.startswith(("aten.index.", "aten.index_put")):
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def count(events: Iterable[Any]) -> dict[str, int]:
    """Launches and waits of the host inside the range `RANGE`, as fields of a row.

    `events` are those of `torch.profiler`. Calls outside the range are the profiler's own. Empty
    when the profiler saw no launch: it cannot record the device on this machine.
    """
    # The range exists once more on the device, where it ends after the host has gone on.
    events = [event for event in events if event.device_type.name == "CPU"]
    whole = [event.time_range for event in events if event.name == RANGE]
    if not whole:
        return {}
    begin, end = min(r.start for r in whole), max(r.end for r in whole)
    inside = [e.name for e in events if begin <= e.time_range.start <= end]
    launches = sum(name.startswith(LAUNCHES) for name in inside)
    if not launches:
        return {}
    return {
        "kernel_launches": launches,
        "host_syncs": sum(name.startswith(WAITS) or _waits(name) for name in inside),
    }


def _waits(name: str) -> bool:
    return name.startswith(COPIES) and "Async" not in name


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
