"""Batches on the device: both views of every sample of a step, resumable at any step.

There is no state to save. A batch is a function of (seed, step, micro-batch) and of the files, so
training resumes from the step number alone, and any number of ranks draws the same global batches.

n local batch, S side of a view.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property

import torch

from fastmoco.config import Config, ConfigError
from fastmoco.data.backends.choose import build_engine
from fastmoco.data.backends.engine import Engine
from fastmoco.data.bad_samples import BadSamples
from fastmoco.data.batch import Batch
from fastmoco.data.order import EpochOrder
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.pixels.survey import Survey, survey
from fastmoco.data.plan import KeyRows, Plan
from fastmoco.data.reader import Reader
from fastmoco.data.sources.choose import open_source
from fastmoco.data.sources.fingerprint import Fingerprint, changes, fingerprint
from fastmoco.data.sources.source import Source
from fastmoco.data.sources.verify import verify


class Loader:
    """The batches of one rank. Use as a context manager, or call `close`."""

    def __init__(
        self, plan: Plan, engine: Engine, bad: BadSamples, reader: Reader | None = None
    ) -> None:
        self.plan, self._engine, self.bad_samples, self._reader = plan, engine, bad, reader
        source = reader.source if reader else None
        self.notes = source.notes if source else []
        """What the source passed over, one sentence each; `warnings` those to act on."""
        self.warnings = (source.warnings if source else []) + bad.sentences()
        self.num_samples = plan.order.num_samples
        self.steps_per_epoch = plan.steps_per_epoch
        self.backend, self.description = engine.backend, engine.description
        """One line: backend, processes, threads and prefetch depth that were chosen."""
        self.wait_s = 0.0
        """Seconds that the consumer has waited for data; host time, without device syncs."""
        self._next: int | None = None

    @cached_property
    def survey(self) -> Survey | None:
        """What a sample of the pictures looks like; None where there are no files."""
        return survey(self._reader.source, self._reader.rule) if self._reader else None

    @cached_property
    def fingerprint(self) -> Fingerprint | None:
        """What the data set consists of; None where there are no files."""
        return fingerprint(self._reader.source) if self._reader else None

    def changes_since(self, then: Fingerprint) -> str:
        """What differs from an earlier data set, see `fingerprint.changes`; empty if nothing."""
        now = self.fingerprint
        return changes(then, now, self._reader.source) if self._reader and now else ""

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
            batch = self._engine.next()
            self._next = micro_step + 1
            self.bad_samples.record(batch.replaced)
            self.wait_s += time.perf_counter() - began
            yield batch

    def close(self) -> None:
        """Ends reader processes; safe to call twice."""
        self._engine.close()
        self._next = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_loader(
    config: Config,
    source: Source | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device,
    key_rows: KeyRows | None = None,
    labelled: bool = False,
    listed: bool = True,
) -> Loader:
    """The loader that the configuration describes, for one rank.

    source: the images that it names, where they are open already.

    listed: bad samples are written into `run.dir`; False for those who only look at the data.

    labelled: one view of each image, and the incomplete last batch of an epoch too; see `Plan`.

    key_rows(micro_step) permutes the rows of the global micro-batch, identically on every rank, and
    must be picklable; without it the keys are views of the queries' samples. config: from
    `resolve_pixels`, unless `data.source` is synthetic. Raises `ConfigError`.
    """
    if source is None and config.data.source != "synthetic":
        source = open_source(config)
    samples = config.data.synthetic_samples if source is None else len(source.sizes)
    plan = make_plan(config, source, samples, rank, world_size, key_rows, labelled=labelled)
    bad = BadSamples(config, source, rank, listed=listed)
    reader: Reader | None = None
    if source is not None:
        reader = Reader(source, config.run.seed, PixelRule.of(config.data))
        if config.data.verify:
            found = verify(source, reader.rule)
            new = {sample: why for sample, why in found.items() if sample not in source.bad}
            reader.quarantine(new)
            bad.add(new, write=rank == 0)
    return Loader(plan, build_engine(config, plan, reader, device), bad, reader)


def make_plan(
    config: Config,
    source: Source | None,
    samples: int,
    rank: int = 0,
    world_size: int = 1,
    key_rows: KeyRows | None = None,
    *,
    labelled: bool = False,
) -> Plan:
    """Which samples and rows every micro-batch has. Raises `ConfigError` for too few samples."""
    global_batch = config.optim.global_batch_size
    if samples < global_batch and not labelled:
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
        steps_per_epoch=-(-samples // global_batch) if labelled else samples // global_batch,
        accumulate=config.optim.accumulate,
        local_batch=config.local_batch_size(world_size),
        rank=rank,
        world_size=world_size,
        key_rows=key_rows,
        views=1 if labelled else 2,
    )
