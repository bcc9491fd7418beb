"""Batches on the device: both views of every sample of a step, resumable at any step.

There is no state to save. A batch is a function of (seed, step, micro-batch) and of the files, so
training resumes from the step number alone, and any number of ranks draws the same global batches.

n local batch, S side of a view.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco.config import Config, ConfigError
from fastmoco.data.bad_samples import BadSamples
from fastmoco.data.order import EpochOrder
from fastmoco.data.plan import KeyRows, Plan
from fastmoco.data.reader import Reader
from fastmoco.data.sources import Source, open_source
from fastmoco.data.verify import verify
from fastmoco.data.views import Views
from fastmoco.host import cores

_SYNTHETIC_BATCHES = 4
# The extra of this project with DALI for the CUDA that torch was built with.
DALI_EXTRAS = {"12": "dali-cuda12", "13": "dali"}


@dataclass(frozen=True)
class Batch:
    """Two augmented views of n samples."""

    im_q: Tensor
    """(n, S, S, 3) uint8 on the device."""
    im_k: Tensor
    """(n, S, S, 3) uint8 on the device."""


class Engine(Protocol):
    """An executor of the table that makes micro-batches ahead of time."""

    def start(self, micro_step: int) -> None:
        """Begin at this micro-batch, dropping whatever is on its way."""

    def next(self) -> Views:
        """The next micro-batch, on the device."""

    def close(self) -> None:
        """End every process and free all memory; may be called twice."""


class Loader:
    """The batches of one rank. Use as a context manager, or call `close`."""

    def __init__(
        self, plan: Plan, engine: Engine, bad: BadSamples, *, backend: str, description: str
    ) -> None:
        self.plan, self._engine, self.bad_samples = plan, engine, bad
        self.num_samples = plan.order.num_samples
        self.steps_per_epoch = plan.steps_per_epoch
        self.backend = backend
        self.description = description
        """One line: backend, processes, threads and prefetch depth that were chosen."""
        self.wait_s = 0.0
        """Seconds that the consumer has waited for data; host time, without device syncs."""
        self._next: int | None = None

    def batches(self, start_step: int, end_step: int) -> Iterator[Batch]:
        """The batches of steps start_step .. end_step - 1, `optim.accumulate` for each, in order.

        Going on where the last call ended keeps everything that is already on its way. Raises
        `ConfigError` when too large a share of the samples turns out to be bad.
        """
        first, last = (step * self.plan.accumulate for step in (start_step, end_step))
        for micro_step in range(first, last):
            began = time.perf_counter()
            if self._next != micro_step:
                self._engine.start(micro_step)
            self._next = None  # until this micro-batch has arrived
            views = self._engine.next()
            self._next = micro_step + 1
            self.bad_samples.record(views.replaced)
            self.wait_s += time.perf_counter() - began
            yield Batch(views.im_q, views.im_k)

    def close(self) -> None:
        """Ends reader processes; safe to call twice."""
        self._engine.close()
        self._next = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SyntheticEngine:
    """A few batches of noise that never leave the device: the speed of training without a loader.

    Row i of the global micro-batch is a function of (seed, i), so ranks agree as on real data.
    """

    def __init__(self, plan: Plan, side: int, device: torch.device) -> None:
        first = plan.rank * plan.local_batch
        self.pool = [
            Views(
                im_q=_noise(plan, side, first, 2 * number).to(device),
                im_k=_noise(plan, side, first, 2 * number + 1).to(device),
                replaced=np.zeros((0, 2), np.int64),
            )
            for number in range(_SYNTHETIC_BATCHES)
        ]
        self.micro_step = 0

    def start(self, micro_step: int) -> None:
        self.micro_step = micro_step

    def next(self) -> Views:
        self.micro_step += 1
        return self.pool[(self.micro_step - 1) % _SYNTHETIC_BATCHES]

    def close(self) -> None:
        pass


def _noise(plan: Plan, side: int, first: int, number: int) -> Tensor:
    """(n, S, S, 3) uint8."""
    rows = range(first, first + plan.local_batch)
    images: list[NDArray[np.uint8]] = [
        np.random.Generator(np.random.Philox(key=[plan.seed, row << 8 | number])).integers(
            0, 256, (side, side, 3), dtype=np.uint8
        )
        for row in rows
    ]
    return torch.from_numpy(np.stack(images))


def build_loader(
    config: Config,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device,
    key_rows: KeyRows | None = None,
) -> Loader:
    """The loader that the configuration describes, for one rank.

    key_rows(micro_step) permutes the rows of the global micro-batch, identically on every rank, and
    must be picklable; without it the keys are views of the queries' samples. Raises `ConfigError`.
    """
    synthetic = config.data.source == "synthetic"
    source = None if synthetic else open_source(config)
    samples = config.data.synthetic_samples if source is None else len(source.sizes)
    plan = make_plan(config, source, samples, rank, world_size, key_rows)
    bad = BadSamples(config, source, rank)
    reader: Reader | None = None
    if source is not None:
        reader = Reader(source, config.run.seed, config.data.max_pixels)
        if config.data.verify:
            found = verify(source, config.data.max_pixels)
            new = {sample: why for sample, why in found.items() if sample not in source.bad}
            reader.quarantine(new)
            bad.add(new, write=rank == 0)
    if reader is None:
        engine: Engine = SyntheticEngine(plan, config.augment.image_size, device)
        return Loader(plan, engine, bad, backend="synthetic", description="synthetic: no reader")
    backend = _backend(config, device)
    if backend == "dali":
        engine, description = _dali(config, plan, reader, device)
    else:
        engine, description = _workers(config, plan, reader, device, backend)
    return Loader(plan, engine, bad, backend=backend, description=description)


def make_plan(
    config: Config,
    source: Source | None,
    samples: int,
    rank: int = 0,
    world_size: int = 1,
    key_rows: KeyRows | None = None,
) -> Plan:
    """Which samples and rows every micro-batch has. Raises `ConfigError` for too few samples."""
    global_batch = config.optim.global_batch_size
    if samples < global_batch:
        raise ConfigError(
            f"optim.global_batch_size {global_batch} exceeds the {samples} samples of the data "
            f"set: choose at most {samples}."
        )
    window = 0 if source is None else config.data.shuffle_window
    order = EpochOrder(
        samples, config.run.seed, window, source.shard_sizes if source and window else ()
    )
    return Plan(
        order=order,
        seed=config.run.seed,
        steps_per_epoch=samples // global_batch,
        accumulate=config.optim.accumulate,
        local_batch=config.local_batch_size(world_size),
        rank=rank,
        world_size=world_size,
        key_rows=key_rows,
    )


def _backend(config: Config, device: torch.device) -> str:
    """`dali`, `array` or `pil`, without importing any."""
    if config.data.backend != "auto":
        missing = config.data.backend == "dali" and not has_dali()
        if missing:
            raise ConfigError(
                f"data.backend is dali, but DALI is not installed: {install_dali('dali')}, or set "
                "data.backend to array."
            )
        return config.data.backend
    # On the CPU DALI's operators take three times as long as array operations (bench/loader.py).
    return "dali" if device.type == "cuda" and has_dali() else "array"


def has_dali() -> bool:
    """Whether DALI is installed, without importing it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package `nvidia` at all
        return False


def install_dali(otherwise: str = "") -> str:
    """The command that installs DALI for torch's CUDA; DALI is made for Linux only.

    For another CUDA, or none, it installs the extra `otherwise`; where that is empty, so is this.
    """
    if sys.platform != "linux":
        return "it exists for Linux only" if otherwise else ""
    extra = DALI_EXTRAS.get((torch.version.cuda or "").split(".")[0], otherwise)
    return extra and f'pip install "fastmoco[{extra}]"'


def missing_dali(config: Config, device: torch.device) -> str:
    """What this run loses for want of DALI, and the command that installs it; empty if nothing."""
    served = config.data.backend != "auto" or config.data.source == "synthetic"
    if served or device.type != "cuda" or has_dali() or not (command := install_dali()):
        return ""
    return f"DALI is not installed, so the CPU does what this GPU could: decode, augment; {command}"


Built = tuple[Engine, str]


def _workers(
    config: Config, plan: Plan, reader: Reader, device: torch.device, backend: str
) -> Built:
    from fastmoco.data.workers import WorkerEngine

    # On the CPU the encoders need the cores as well.
    share = cores() if device.type == "cuda" else max(1, cores() // 2)
    workers = config.data.workers or share
    prefetch = config.data.prefetch
    engine = WorkerEngine(
        reader,
        plan,
        config.augment,
        backend=backend,
        workers=workers,
        prefetch=prefetch,
        device=device,
    )
    return engine, f"{backend}: {workers} worker processes, {prefetch} batches ahead"


def _dali(config: Config, plan: Plan, reader: Reader, device: torch.device) -> Built:
    from fastmoco.data.dali import DaliEngine

    # A reader process delivers more than 5,000 samples per second, about what one GPU consumes.
    readers = config.data.workers or (2 if cores() >= 8 else 1)
    # A GPU decodes itself: threads only parse headers and copy. More than 8 brought nothing.
    threads = config.data.threads or max(1, min(8, cores() - readers))
    prefetch = config.data.prefetch
    engine = DaliEngine(
        reader,
        plan,
        config.augment,
        readers=readers,
        threads=threads,
        prefetch=prefetch,
        device=device,
    )
    return engine, (
        f"dali on {device.type}: {readers} reader processes, {threads} threads, "
        f"{prefetch} batches ahead"
    )
