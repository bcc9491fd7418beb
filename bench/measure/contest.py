"""The one way to measure: contestants take turns, A B C, B C A, ..., and one works at a time.

Taking turns makes a noisy machine noisy for all of them. `in_turns` does only that. `contest` gives
every contestant a process of its own, and with it its own peak memory, threads and allocator.
`race` is for single operations in this process, whose outputs are compared with an oracle first.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from threading import Timer
from typing import Any, TypeVar
from unittest import mock

import torch

from bench.measure.nvml import SAMPLE_EVERY_S
from bench.measure.rows import spread
from fastmoco.config import ConfigError
from fastmoco.machine.gpu_meter import Meter, Sample
from fastmoco.run.metrics import peak_memory_gib

T = TypeVar("T")
CLOSING_S = 20


def in_turns(
    work: Mapping[str, Callable[[], T]],
    windows: int,
    *,
    after: Callable[[int], None] = lambda done: None,
) -> dict[str, list[T]]:
    """What each function returned in `windows` turns; `after` follows each with their number."""
    names = list(work)
    found: dict[str, list[T]] = {name: [] for name in names}
    for done in range(windows):
        shift = done % len(names)  # nobody always runs in the wake of the same one
        for name in [*names[shift:], *names[:shift]]:
            found[name].append(work[name]())
        after(done + 1)
    return found


@dataclass(frozen=True)
class Contestant:
    """One way to do a step: `factory` is a `module:function` that is called with `arguments`.

    It returns a `bench.steps.contestants.Bench` or what looks like one.
    """

    name: str
    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that must be set before torch is loaded."""


@dataclass(frozen=True)
class Window:
    """Some steps of one contestant, from one device synchronization to the next."""

    steps: int
    seconds: float
    cpu_seconds: float
    """Processor time of the contestant: it does not grow when others use the machine."""
    wait_s: float
    """Seconds in which the step waited for the loader."""
    page_faults: int = 0
    """Pages of memory that the kernel had to map, and zero, for the contestant."""
    gpu: Sequence[Sample] = ()
    """What was read of the GPU meanwhile."""


@dataclass
class Result:
    """Everything that was measured of one contestant."""

    windows: list[Window]
    facts: dict[str, Any]

    def images_per_second(self, images_per_step: int) -> list[float]:
        """Of each window."""
        return [w.steps * images_per_step / w.seconds for w in self.windows]


def contest(
    contestants: Sequence[Contestant],
    *,
    windows: int,
    steps: int,
    warmup: int,
    meter: Meter | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Result]:
    """`windows` windows of `steps` steps of each contestant, after `warmup` steps of each.

    Who is fed by a loader runs by itself, for loaders work ahead while others have their turn.
    `meter` reads the GPU during the windows.

    Raises `ConfigError` or `RuntimeError` that names a contestant when one fails.
    """
    if not contestants:
        return {}
    with ExitStack() as stack:
        # Built one after the other, so that none disturbs the next.
        running = [stack.enter_context(Process(contestant)) for contestant in contestants]
        for process in running:
            process.ask(timed, warmup)
        work = {process.name: partial(process.window, steps, meter) for process in running}
        found = in_turns(work, windows, after=progress)
        return {p.name: Result(found[p.name], p.ask(facts)) for p in running}


class Process:
    """A contestant in a process of its own, which answers one request after the other."""

    def __init__(self, contestant: Contestant) -> None:
        self.name = contestant.name
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))
        with mock.patch.dict(os.environ, contestant.environment):
            begun = self._pool.submit(_build, contestant.factory, contestant.arguments)
        try:
            self._answer(begun)
        except BaseException:
            self._pool.shutdown()
            raise

    def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function of the contestant returns there."""
        return self._answer(self._pool.submit(_call, function, arguments))

    def window(self, steps: int, meter: Meter | None) -> Window:
        """Ask for `steps` steps and read the meter while they run."""
        asked = self._pool.submit(_call, timed, (steps,))
        samples: list[Sample] = []
        while meter and not wait([asked], SAMPLE_EVERY_S).done:
            samples.append(meter())
        answer: Window = self._answer(asked)
        if meter:  # a short window has a sample, too
            samples.append(meter())
        return replace(answer, gpu=samples)

    def _answer(self, asked: Future[T]) -> T:
        try:
            return asked.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                f"The process of {self.name} was killed; all contestants are held in memory at "
                "once, so that is usually too little memory: name fewer in --only, or take a "
                "smaller optim.global_batch_size."
            ) from error
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from error
        except Exception as error:
            raise RuntimeError(f"{self.name} failed: {error}") from error

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenProcessPool):
            wait([self._pool.submit(_close)])
        self._pool.shutdown()


_here: list[Any] = []
"""The contestant of this process."""


def _build(factory: str, arguments: Mapping[str, Any]) -> None:
    module, function = factory.split(":")
    _here.append(getattr(import_module(module), function)(**arguments))


def _call(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    return function(_here[0], *arguments)


def _close() -> None:
    late = Timer(CLOSING_S, os._exit, (1,))
    late.daemon = True
    late.start()
    _here.pop().close()
    late.cancel()


def timed(machine: Any, steps: int) -> Window:
    """Let a contestant do its steps."""
    waited, used = machine.wait_s, resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    machine.run(steps)
    synchronize(machine.device)
    seconds, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    busy = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    # Minor faults: pages that were mapped without reading a disk.
    faults = now.ru_minflt - used.ru_minflt
    return Window(steps, seconds, busy, machine.wait_s - waited, faults)


def facts(machine: Any) -> dict[str, Any]:
    """What a contestant knows about its step, and its peak memory."""
    peak = peak_memory_gib(machine.device)
    return {"peak_memory_gib": peak and round(peak, 3), **machine.facts()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Way:
    """One way to compute something in this process."""

    name: str
    run: Callable[[], Any]
    error: Callable[[Any], float]
    """Distance of an output of `run` from the oracle."""
    allowed: float
    """Largest `error` with which it is admitted to the timing."""


Race = tuple[str, dict[str, Any], list[Way]]
"""Name of an operation, its case, and the ways to compute it."""


def race(
    ways: Sequence[Way], device: torch.device, windows: int = 20, warmup: int = 3
) -> dict[str, dict[str, Any]]:
    """Check every way, then time single calls in turns. Fields of a row by name.

    `p20_ms`, `p50_ms`, `p80_ms` over `n` calls, the `error` found before, and `peak_extra_bytes`.
    Raises `ValueError` when an output is further from its oracle than allowed.
    """
    known: dict[str, dict[str, Any]] = {}
    for way in ways:
        for _ in range(warmup):
            output = way.run()
        error = way.error(output)
        if not error <= way.allowed:
            raise ValueError(f"{way.name}: error {error:.2e} > {way.allowed:.0e}")
        del output
        known[way.name] = {"error": error, "peak_extra_bytes": peak_extra_bytes(way.run, device)}
    work = {way.name: partial(_milliseconds, way.run, device) for way in ways}
    found = in_turns(work, windows)
    return {name: spread(times, unit="ms") | known[name] for name, times in found.items()}


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def peak_extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors alive at once during one call, beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak
