"""The one way to measure: contestants take turns, A B C, B C A, ..., and one works at a time.

Taking turns makes a noisy machine noisy for all of them. `in_turns` does only that. `contest` gives
every contestant a process of its own, and with it its own peak memory, threads and allocator.
`race` is for single operations in this process, whose outputs are compared with an oracle first.
"""

from __future__ import annotations

import math
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar
from unittest import mock

import torch

from bench.measure.nvml import SAMPLE_EVERY_S, Meter, Sample
from bench.measure.rows import spread
from fastmoco.config import ConfigError
from fastmoco.run.metrics import peak_memory_gib

T = TypeVar("T")


def in_turns(
    work: Mapping[str, Callable[[], T]],
    windows: int,
    *,
    limit_s: float = math.inf,
    after: Callable[[int], None] = lambda done: None,
) -> dict[str, list[T]]:
    """What each function returned in `windows` turns; `after` follows each with their number.

    After `limit_s` seconds no further turn begins: every contestant has had as many as the others.
    """
    names, began = list(work), time.perf_counter()
    found: dict[str, list[T]] = {name: [] for name in names}
    for done in range(windows):
        shift = done % len(names)  # nobody always runs in the wake of the same one
        for name in [*names[shift:], *names[:shift]]:
            found[name].append(work[name]())
        after(done + 1)
        if time.perf_counter() - began > limit_s:
            break
    return found


class Machine(Protocol):
    """What a contestant's factory returns."""

    device: torch.device
    wait_s: float
    """Seconds so far in which the step waited for the loader."""

    def run(self, steps: int) -> None:
        """Do `steps` steps; may return before the device has finished."""
        ...

    def facts(self) -> dict[str, Any]:
        """What else is known about a step, such as its host synchronizations."""
        ...

    def close(self) -> None:
        """End every process of its own."""
        ...


@dataclass(frozen=True)
class Contestant:
    """One way to do a step: `factory` is a `module:function` that is called with `arguments`."""

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
    limit_s: float = math.inf,
    meter: Meter | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Result]:
    """`windows` windows of `steps` steps of each contestant, after `warmup` steps of each.

    Who is fed by a loader runs by itself, for loaders work ahead while others have their turn.
    `meter` reads the GPU during the windows. After `limit_s` seconds no further turn begins.

    Raises `RuntimeError` with the contestant's traceback when one fails.
    """
    if not contestants:
        return {}
    with _processes(contestants) as running:
        for process in running:
            process.ask("run", warmup)
        work = {process.name: partial(process.window, steps, meter) for process in running}
        found = in_turns(work, windows, limit_s=limit_s, after=progress)
        return {p.name: Result(found[p.name], p.ask("facts", 0)) for p in running}


class _Process:
    def __init__(self, contestant: Contestant) -> None:
        context = get_context("spawn")
        self.name = contestant.name
        self._here, there = context.Pipe()
        # A contestant may have children of its own (loader workers), so it is no daemon.
        self.process = context.Process(target=_serve, args=(there, contestant))
        with mock.patch.dict(os.environ, contestant.environment):
            self.process.start()
        there.close()

    def ask(self, what: str, steps: int) -> Any:
        with self._alive():
            self._here.send((what, steps))
        return self.answer()

    def window(self, steps: int, meter: Meter | None) -> Window:
        """Ask for `steps` steps and read the meter while they run."""
        with self._alive():
            self._here.send(("run", steps))
        samples: list[Sample] = []
        while meter and not self._here.poll(SAMPLE_EVERY_S):
            samples.append(meter())
        answer = self.answer()
        if meter:  # a short window has a sample, too
            samples.append(meter())
        return replace(Window(*answer), gpu=samples)

    def answer(self) -> Any:
        with self._alive():
            value, trace = self._here.recv()
        if trace:
            raise RuntimeError(f"{self.name} failed:\n{trace}")
        return value

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Raise `ConfigError` in the place of what a pipe to a dead process raises."""
        try:
            yield
        except (EOFError, OSError) as error:
            raise ConfigError(
                f"The process of {self.name} was killed; all contestants are held in memory at "
                "once, so that is usually too little memory: name fewer in --only, or take a "
                "smaller optim.global_batch_size."
            ) from error

    def close(self) -> None:
        self._here.close()  # the contestant's next recv ends it
        self.process.join(20)
        if self.process.is_alive():
            self.process.terminate()


@contextmanager
def _processes(contestants: Sequence[Contestant]) -> Iterator[list[_Process]]:
    running: list[_Process] = []
    try:
        for contestant in contestants:
            running.append(_Process(contestant))
            running[-1].answer()  # built: one after the other, so that none disturbs the next
        yield running
    finally:
        for process in running:
            process.close()


def _serve(connection: Connection, contestant: Contestant) -> None:
    """What a contestant's process runs: answer requests until the other end closes."""
    machine: Machine | None = None
    try:
        module, function = contestant.factory.split(":")
        machine = getattr(import_module(module), function)(**contestant.arguments)
        assert machine is not None
        connection.send((None, ""))
        while True:
            what, steps = connection.recv()
            answer = _timed(machine, steps) if what == "run" else _facts(machine)
            connection.send((answer, ""))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:
        connection.send((None, traceback.format_exc()))
    finally:
        if machine is not None:
            machine.close()


def _timed(machine: Machine, steps: int) -> tuple[int, float, float, float, int]:
    """Fields of a `Window`."""
    waited, used = machine.wait_s, resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    machine.run(steps)
    synchronize(machine.device)
    seconds, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    busy = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    # Minor faults: pages that were mapped without reading a disk.
    return steps, seconds, busy, machine.wait_s - waited, now.ru_minflt - used.ru_minflt


def _facts(machine: Machine) -> dict[str, Any]:
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
    ways: Sequence[Way],
    device: torch.device,
    windows: int = 20,
    warmup: int = 3,
    limit_s: float = 120.0,
) -> dict[str, dict[str, Any]]:
    """Check every way, then time single calls in turns. Fields of a row by name.

    `p20_ms`, `p50_ms`, `p80_ms` over `n` calls, the `error` found before, and `peak_extra_bytes`.
    Raises `ValueError` when an output is further from its oracle than allowed.
    """
    facts: dict[str, dict[str, Any]] = {}
    for way in ways:
        for _ in range(warmup):
            output = way.run()
        error = way.error(output)
        if not error <= way.allowed:
            raise ValueError(f"{way.name}: error {error:.2e} > {way.allowed:.0e}")
        del output
        facts[way.name] = {"error": error, "peak_extra_bytes": peak_extra_bytes(way.run, device)}
    work = {way.name: partial(_milliseconds, way.run, device) for way in ways}
    found = in_turns(work, windows, limit_s=limit_s)
    return {name: _times(times) | facts[name] for name, times in found.items()}


def _times(milliseconds: Sequence[float]) -> dict[str, Any]:
    found = spread(milliseconds)
    return {f"{name}_ms": found[name] for name in ("p20", "p50", "p80")} | {"n": found["n"]}


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
