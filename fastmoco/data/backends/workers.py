"""The backends in worker processes, which read, decode and augment on the CPU.

`array` executes the table with array operations, `pil` with the reference itself. For a GPU
`array` decodes and crops only, and `fastmoco_kernels.photometric` does the rest there. A
micro-batch is cut into parts so that all workers share its latency, and they fill one ring of
shared memory.

n local batch, S side of a view.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmoco.config import AugmentConfig, Config, ConfigError
from fastmoco.data.backends.array import Canvas, Cropper
from fastmoco.data.backends.engine import Executor
from fastmoco.data.backends.float_views import FloatCanvas
from fastmoco.data.backends.pil import PilExecutor
from fastmoco.data.backends.processes import end, in_own_words, work_ahead
from fastmoco.data.backends.ring import Ring, slot_of
from fastmoco.data.batch import Batch
from fastmoco.data.decode import BadImage
from fastmoco.data.photometric_rows import photometric_rows
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.plan import Plan
from fastmoco.data.reader import Reader, Work, read_work
from fastmoco.data.table import Float32, Int64, ViewTable
from fastmoco.machine import limits
from fastmoco.machine.host import cores
from fastmoco_kernels import photometric

_PART = 64
"""Samples that one worker makes at a time."""

EXECUTORS: dict[str, Callable[[int, str], Executor]] = {"array": Canvas, "pil": PilExecutor}
"""Who makes the views, by `data.backend`; takes their side and the recipe.
Float views are made by `FloatCanvas`."""


class Part(NamedTuple):
    """What a worker says of the views that it has put into the ring."""

    rows: list[Float32]
    """Of queries and keys, see `photometric_rows`; empty where the views are finished."""
    replaced: Int64


class Parts(Dataset[Part]):
    """Item i fills part i % parts of micro-batch i // parts; there is no last one."""

    def __init__(
        self,
        reader: Reader,
        plan: Plan,
        augment: AugmentConfig,
        backend: str,
        crops_only: bool = False,
    ) -> None:
        self.reader, self.plan, self.augment, self.backend = reader, plan, augment, backend
        self.parts = -(-plan.local_batch // _PART)
        self.crops_only = crops_only
        side, rule = augment.image_size, reader.rule
        self.shape = (plan.views, plan.local_batch, side, side, rule.channels)
        """Of a micro-batch."""
        self.dtype = torch.float32 if rule.float_views else torch.uint8
        self.slots: Tensor
        """The ring's; set before workers start."""
        self._executor: Executor | None = None

    @property
    def batch_bytes(self) -> int:
        """Bytes of the views of a micro-batch."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, item: int) -> Part:
        micro_step, part = divmod(item, self.parts)
        size = -(-self.plan.local_batch // self.parts)
        mine = slice(part * size, (part + 1) * size)
        work, images = self._decoded(micro_step, mine)
        room = slot_of(self.slots, micro_step)[:, mine].numpy()
        tables = [ViewTable.unpack(packed) for packed in (work.rows_q, work.rows_k)]
        for views, encoded, table in zip(room, (work.queries, work.keys), tables, strict=False):
            for row, one in enumerate(encoded):
                views[row] = self._own_executor().execute(images[one.sample], table, row)
        if not self.crops_only:
            return Part([], work.replaced)
        return Part([photometric_rows(t, self.augment.recipe) for t in tables], work.replaced)

    def _decoded(self, micro_step: int, rows: slice) -> tuple[Work, dict[int, Any]]:
        """Reads and decodes; starts over without the samples that PIL does not decode."""
        executor, rule = self._own_executor(), self.reader.rule
        while True:
            work = read_work(self.reader, self.plan, self.augment, micro_step, rows)
            images: dict[int, Any] = {}
            bad: dict[int, str] = {}
            for one in itertools.chain(work.queries, work.keys):
                if one.sample in images or one.sample in bad:
                    continue
                if one.deep is not None:
                    images[one.sample] = one.deep
                    continue
                try:
                    images[one.sample] = executor.decode(one.data, rule)
                except BadImage as error:
                    bad[one.sample] = str(error)
            if not bad:
                return work, images
            self.reader.quarantine(bad)

    def _own_executor(self) -> Executor:
        """Made in the worker, once: its scratch memory belongs to one process."""
        if self._executor is None:
            side, recipe, rule = self.augment.image_size, self.augment.recipe, self.reader.rule
            if rule.float_views:
                self._executor = FloatCanvas(side, recipe, rule.channels, self.backend)
            elif self.crops_only:
                self._executor = Cropper(side, recipe)
            else:
                self._executor = EXECUTORS[self.backend](side, recipe)
        return self._executor


def leaves_colours(backend: str, device: torch.device, rule: PixelRule) -> bool:
    """Whether the device does what comes after the crop."""
    return backend == "array" and device.type == "cuda" and not rule.float_views


def within_limits(workers: int, ahead: int, parts: int, batch_bytes: int) -> tuple[int, int]:
    """Workers and parts in flight of each, as wanted or as few as this machine has room for.

    parts: of a micro-batch. batch_bytes: of one, in shared memory. Raises `ConfigError` where even
    one worker is too many.
    """
    while True:
        # Each worker has some pipes, the ring one file.
        memory, files = slots(workers, ahead, parts) * batch_bytes, 8 * workers + 1
        free, left = limits.shared_memory(), limits.files_left(files)
        short = free is not None and memory > free
        if not short and (left is None or files <= left):
            return workers, ahead
        if short and ahead > 1:
            ahead -= 1
        elif workers > 1:
            workers -= 1
        elif short:
            raise ConfigError(
                f"The loader needs {memory / 1e6:,.0f} MB of shared memory for the batches of this "
                f"run, and {limits.SHARED_MEMORY} has {(free or 0) / 1e6:,.0f} MB for this rank: "
                "start the container with a larger --shm-size, mount a larger one, or lower "
                "optim.global_batch_size."
            )
        else:
            raise ConfigError(
                f"The loader needs {files} more open files, and this process may open {left}: "
                "raise the limit with `ulimit -n`."
            )


def slots(workers: int, ahead: int, parts: int) -> int:
    """Micro-batches in the ring: those that workers may be at, and the one that is being taken.

    With the last part of micro-batch m, the trainer asks for the part workers * ahead behind it.
    """
    return -(-workers * ahead // parts) + 1


class WorkerEngine:
    """Micro-batches from worker processes, in order, starting anywhere."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        reader: Reader,
        device: torch.device,
        backend: str,
    ) -> None:
        self.backend, self.device = backend, device
        # On the CPU the encoders need the cores as well.
        share = cores() if device.type == "cuda" else max(1, cores() // 2)
        wanted, prefetch = config.data.workers or share, config.data.prefetch
        crops_only = leaves_colours(backend, device, reader.rule)
        self.dataset = Parts(reader, plan, config.augment, backend, crops_only)
        self.parts = self.dataset.parts
        self.timeout_s = config.run.timeout_s
        # Parts in flight per worker, so that `prefetch` whole micro-batches are on their way.
        ahead = max(2, -(-prefetch * self.parts // wanted))
        self.workers, self.ahead = within_limits(
            wanted, ahead, self.parts, self.dataset.batch_bytes
        )
        self.description = f"{backend}: {self.workers} worker processes, {prefetch} batches ahead"
        if (self.workers, self.ahead) != (wanted, ahead):
            self.description = (
                f"{backend}: {self.workers} worker processes with {self.ahead} parts of a batch in "
                f"work each, not {wanted} with {ahead}: shared memory or open files are few here"
            )
        if crops_only:
            self.description += "; colours and blur on the GPU"
        self.ring = Ring(
            slots(self.workers, self.ahead, self.parts), self.dataset.shape, self.dataset.dtype
        )
        self.dataset.slots = self.ring.slots
        if device.type == "cuda":
            self.ring.pin(device)
        self._items: Iterator[Part] = iter(())
        self._micro_step = 0

    def start(self, micro_step: int) -> None:
        """Begin at this micro-batch."""
        self.close()
        self.ring.settle()
        self._micro_step = micro_step
        self._items = work_ahead(
            self.dataset, micro_step * self.parts, self.workers, self.ahead, self.timeout_s
        )

    def next(self) -> Batch:
        """The next micro-batch.

        Raises `OneRankError` where no sample can replace a bad one or storage keeps failing, and
        `ChildProcessError` where a worker died or is silent for `run.timeout_s`.
        """
        self.ring.settle()
        with in_own_words(self._items):
            parts = [next(self._items) for _ in range(self.parts)]
        views = self.ring.taken(self._micro_step, self.device)
        self._micro_step += 1
        if self.dataset.crops_only:
            which = range(len(views))
            rows = np.concatenate([part.rows[view] for view in which for part in parts])
            views = photometric(views.flatten(0, 1), self._uploaded(rows)).view_as(views)
        im_k = views[1] if len(views) == 2 else views[0, :0]
        return Batch(views[0], im_k, np.concatenate([part.replaced for part in parts]))

    def _uploaded(self, rows: Float32) -> Tensor:
        """On the device; a copy from other than pinned memory would wait for it."""
        found = torch.from_numpy(rows)
        if self.device.type == "cuda":
            found = found.pin_memory().to(self.device, non_blocking=True)
        return found

    def close(self) -> None:
        """Ends the workers."""
        items, self._items = self._items, iter(())
        end(items)
