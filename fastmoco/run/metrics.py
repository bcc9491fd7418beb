"""What a run measures: sums that stay on the device, and one flush that brings them to the host."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmoco.machine.collectives import all_reduce_mean_
from fastmoco.machine.host import cpu_seconds, peak_memory_bytes
from fastmoco.machine.ranks import World
from fastmoco.method.quality import FeatureSums, quality
from fastmoco.method.step import StepResult


@dataclass(frozen=True)
class Window:
    """Throughput between two flushes."""

    steps: int
    seconds: float
    step_ms_p50: float
    cpu_seconds: float
    """Processor time of this rank and its loader workers."""


class Clock:
    """Times steps without stalling the device: CUDA events on CUDA, host time on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Begin a new window now; call it right after a host synchronization."""
        self._start, self._cpu_start = time.perf_counter(), cpu_seconds()
        self._marks: list[float | torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Note the end of a step."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def window(self) -> Window:
        """The window since `restart`; the device must have been synchronized."""
        steps = sorted(
            a.elapsed_time(b)
            if isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event)
            else (float(b) - float(a)) * 1e3  # type: ignore[arg-type]
            for a, b in zip(self._marks[:-1], self._marks[1:], strict=True)
        )
        p50 = steps[len(steps) // 2] if steps else math.nan
        seconds, busy = time.perf_counter() - self._start, cpu_seconds() - self._cpu_start
        return Window(len(steps), seconds, p50, busy)


@dataclass(frozen=True)
class Trouble:
    """The steps since the last flush whose loss or gradient was not finite."""

    steps: int = 0
    since: int = 0
    """Steps from the first of them to the flush, itself included."""
    in_a_row: int = 0
    """How many came one after another until the flush, over earlier flushes as well."""


class Metrics:
    """Loss, pretext accuracy and quality of the features of the good steps since the last flush.

    `add` only enqueues work on the device; `flush` is the one host synchronization of the loop.
    `dim` is C, the feature dimension.
    """

    def __init__(self, world: World, dim: int) -> None:
        self._world = world
        self._sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        # Bad steps, steps since the first of them, bad ones in a row: the same on every rank.
        self._bad = torch.zeros(3, dtype=torch.float64, device=world.device)
        self._features = FeatureSums(dim, world.device)
        self._count = 0
        self.trouble = Trouble()
        """As of the last flush."""

    def add(self, result: StepResult) -> None:
        """Count one step: mean loss, share of queries with the positive on top, features."""
        top1, top5 = (result.rank == 0).float().mean(), (result.rank < 5).float().mean()
        values, bad = torch.stack([result.loss, top1, top5]), result.not_finite
        self._sums += torch.where(bad, 0.0, values)
        self._features.add(result.q, result.k, ~bad)
        steps, since, in_a_row = self._bad
        begun = since > 0
        self._bad = torch.stack([steps + bad, since + (begun | bad), (in_a_row + 1) * bad])
        self._count += 1

    def flush(self) -> dict[str, float]:
        """Means since the last flush, over all ranks.

        `loss`, `pretext_top1`, `pretext_top5` and what `fastmoco.method.quality` lists. NaN for the
        three where no step was good.
        """
        good = self._count - self._bad[0] if self._count else 1
        sums = torch.cat([self._sums / good, self._bad, self._features.flat])
        all_reduce_mean_([sums], self._world)
        sums = sums.cpu()  # the host waits for the device here
        loss, top1, top5, *bad = sums[:6].tolist()
        self.trouble = Trouble(*map(round, bad))
        self._sums.zero_()
        self._bad[:2] = 0
        self._features.flat.zero_()
        self._count = 0
        spread = quality(self._world.size * sums[6:])
        return {"loss": loss, "pretext_top1": top1, "pretext_top5": top5, **spread}


class QueueChange:
    """How far the keys of the queue are from those that they replaced; K rows, C columns.

    Compares a thousand rows once per turnover, when each of them was due to be overwritten.
    """

    def __init__(self, queue: Tensor, keys_per_step: int, done: int) -> None:
        self._rows = queue[:: max(1, len(queue) // 1024)]
        self._keys_per_step, self._size = keys_per_step, len(queue)
        self._before, self._done = self._rows.clone(), done

    def measure(self, done: int) -> dict[str, float]:
        """`queue_change`, the mean Euclidean distance, or nothing where it is not yet time.

        Reads one number from the device; call it where the host waits anyway.
        """
        if not self._size or (done - self._done) * self._keys_per_step < self._size:
            return {}
        change = float((self._rows - self._before).norm(dim=1).mean())
        self._before, self._done = self._rows.clone(), done
        return {"queue_change": change}


def peak_memory_gib(device: torch.device) -> float | None:
    """Most memory held so far: of the device's allocator on CUDA, of the process on the CPU.

    None where the system does not tell (Windows).
    """
    cuda = device.type == "cuda"
    held = torch.cuda.max_memory_allocated(device) if cuda else peak_memory_bytes()
    return None if held is None else held / 2**30
