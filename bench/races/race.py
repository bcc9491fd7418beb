"""A race: one operation computed in several ways, which take turns after each was checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from bench.measure.contest import in_turns
from bench.measure.rows import Row, spread

Outputs = Sequence[Tensor]
COLD_BYTES = 400 << 20
WARMUP = 3


@dataclass(frozen=True)
class Race:
    """An operation, its ways, and what is right."""

    op: str
    case: Row
    ways: Mapping[str, Callable[..., Outputs]]
    """Functions of `inputs`."""
    truth: Outputs
    allowed: float
    """Largest `distance` from `truth` with which a way is timed."""
    inputs: Sequence[Tensor] = ()
    """Every call gets other copies, which come from memory as in a step."""


def run(asked: Race, device: torch.device, windows: int = 20) -> dict[str, Row]:
    """Check every way, then time single calls in turns. Fields of a row by name.

    `p20_ms`, `p50_ms`, `p80_ms` over `n` calls, the `error` found before, and `peak_extra_bytes`;
    on CUDA also `device_ms`, what the kernels of one call take. A single call waits for its host,
    which a CUDA graph does not.
    Raises `ValueError` when an output is further from the truth than allowed.
    """
    copies = cold_copies(asked.inputs)

    def call(way: Callable[..., Outputs]) -> Outputs:
        return way(*next(copies))

    known: dict[str, Row] = {}
    for name, way in asked.ways.items():
        for _ in range(WARMUP):
            output = call(way)
        error = distance(output, asked.truth)
        if not error <= asked.allowed:
            raise ValueError(f"{name}: error {error:.2e} > {asked.allowed:.0e}")
        del output
        extra = peak_extra_bytes(partial(call, way), device)
        known[name] = {"error": error, "peak_extra_bytes": extra}
        if device.type == "cuda":
            known[name]["device_ms"] = round(device_milliseconds(partial(call, way)), 4)
    calls = {n: partial(_milliseconds, partial(call, w), device) for n, w in asked.ways.items()}
    found = in_turns(calls, windows)
    return {name: spread(times, unit="ms") | known[name] for name, times in found.items()}


def cold_copies(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of the tensors in turns for ever, so many that no cache holds all."""
    size = sum(tensor.nbytes for tensor in tensors) or COLD_BYTES
    copies = max(2, -(-COLD_BYTES // size))
    return cycle([[tensor.clone() for tensor in tensors] for _ in range(copies)])


def distance(got: Outputs, truth: Outputs) -> float:
    """The largest error of an output, on average and relative to its average size.

    On average, for beside the kink of a ReLU single gradients are right either way.
    """
    pairs = zip(got, truth, strict=True)
    return max(float((g.double() - w).abs().mean() / w.double().abs().mean()) for g, w in pairs)


def forward_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | None = None
) -> Outputs:
    """The output of a function and, by autograd, its gradients by each input."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def device_milliseconds(call: Callable[[], object]) -> float:
    """Milliseconds of all kernels and copies on the device that one call launches."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in profiler.key_averages())) / 1e3


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors alive at once during one call, beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak
