"""The one way to measure: contestants take turns, A B C, B C A, ..., and one works at a time.

Taking turns makes a noisy machine noisy for all of them. `in_turns` does only that. `contest` gives
every contestant a process of its own, and with it its own peak memory, threads and allocator.
"""

from __future__ import annotations

import os
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
from tqdm import tqdm

from bench.measure.rows import Row, spread
from fastmoco.config import ConfigError
from fastmoco.machine.gpu_meter import Meter, Sample
from fastmoco.run.metrics import peak_memory_gib

T = TypeVar("T")
CLOSING_S = 20
# Rows of an H200 were read every 0.05 s, and the host that launched its step was slow: who asks the
# driver may hold up who launches. The power that NVML tells is a mean over a second anyway.
SAMPLE_EVERY_S = 0.5


def in_turns(work: Mapping[str, Callable[[], T]], windows: int) -> dict[str, list[T]]:
    """What each function returned in `windows` turns; a terminal shows how many are done."""
    names = list(work)
    found: dict[str, list[T]] = {name: [] for name in names}
    for done in tqdm(range(windows), "windows", leave=False, disable=None):
        shift = done % len(names)  # nobody always runs in the wake of the same one
        for name in [*names[shift:], *names[:shift]]:
            found[name].append(work[name]())
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
    gpu: Sequence[Sample] = ()
    """What was read of the GPU meanwhile."""


@dataclass
class Result:
    """Everything that was measured of one contestant."""

    windows: list[Window]
    facts: dict[str, Any]

    def row(self, images: int) -> Row:
        """Fields of a row about steps of so many images."""
        steps, seconds, cpu_s, wait_s = (
            sum(getattr(window, name) for window in self.windows)
            for name in ("steps", "seconds", "cpu_seconds", "wait_s")
        )
        rates = [w.steps * images / w.seconds for w in self.windows]
        return {
            **spread(rates, 3, "images_per_second"),
            "steps": steps,
            "cpu_s_per_step": round(cpu_s / steps, 4),
            "data_wait_percent": round(100 * wait_s / seconds, 2),
            **_of_gpu([sample for w in self.windows for sample in w.gpu], seconds, steps * images),
            **self.facts,
        }


def _of_gpu(samples: Sequence[Sample], seconds: float, images: int) -> Row:
    """Means of what was read, and with power the energy: its mean times the seconds."""
    names = samples[0] if samples else ()
    found: Row = {n: round(sum(s[n] for s in samples) / len(samples), 1) for n in names}
    if "power_w" in found:
        found["energy_from"] = "sampled power"
        kwh = found["power_w"] * seconds / images * 1e6 / 3.6e6
        found["kwh_per_million_images"] = float(f"{kwh:.4g}")
    return found


def contest(
    contestants: Sequence[Contestant],
    *,
    windows: int,
    steps: int,
    warmup: int,
    meter: Meter | None = None,
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
        found = in_turns(work, windows)
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
    waited, used, began = machine.wait_s, time.process_time(), time.perf_counter()
    machine.run(steps)
    synchronize(machine.device)
    seconds, busy = time.perf_counter() - began, time.process_time() - used
    return Window(steps, seconds, busy, machine.wait_s - waited)


def facts(machine: Any) -> dict[str, Any]:
    """What a contestant knows about its step, and its peak memory."""
    peak = peak_memory_gib(machine.device)
    return {"peak_memory_gib": peak and round(peak, 3), **machine.facts()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
