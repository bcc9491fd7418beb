"""The backends in worker processes, which read, decode and augment on the CPU.

`array` executes the table with array operations, `pil` with the reference itself. For a GPU
`array` decodes and crops only, and `fastmoco_kernels.photometric` does the rest there. A
micro-batch is cut into parts so that all workers share its latency. Workers are forked and use
neither CUDA nor the network. They end with their parent, which torch's loader watches.

n local batch, S side of a view.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastmoco.config import AugmentConfig, Config, ConfigError
from fastmoco.data.backends.array import Canvas, Cropper
from fastmoco.data.backends.engine import Executor
from fastmoco.data.backends.float_views import FloatCanvas
from fastmoco.data.backends.lifetime import outlast_the_trainer
from fastmoco.data.backends.pil import PilExecutor
from fastmoco.data.batch import Batch
from fastmoco.data.decode import BadImage
from fastmoco.data.photometric_rows import photometric_rows
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.plan import Plan
from fastmoco.data.reader import Encoded, Reader, Work, read_work
from fastmoco.data.table import Float32, Int64, ViewTable
from fastmoco.machine import limits
from fastmoco.machine.host import cores
from fastmoco_kernels import photometric

# Samples that one worker makes at a time. A micro-batch of one part reaches the consumer without
# a copy; joining parts costs the main process 0.7 ms per sample of 224 pixels.
_PART = 64

EXECUTORS: dict[str, Callable[[int, str], Executor]] = {"array": Canvas, "pil": PilExecutor}
"""Who makes the views, by `data.backend`; takes their side and the recipe.
Float views are made by `FloatCanvas`."""


class Part(NamedTuple):
    """What a worker delivers of a micro-batch."""

    im_q: Tensor
    im_k: Tensor
    rows: list[Float32]
    """Of queries and keys, see `photometric_rows`; empty where the views are finished."""
    replaced: Int64


class Parts(Dataset[Part]):
    """Item i is part i % parts of micro-batch i // parts; there is no last one."""

    def __init__(
        self,
        reader: Reader,
        plan: Plan,
        augment: AugmentConfig,
        parts: int,
        backend: str,
        crops_only: bool = False,
    ) -> None:
        self.reader, self.plan, self.augment, self.parts = reader, plan, augment, parts
        self.backend, self.crops_only = backend, crops_only
        self._executor: Executor | None = None

    @property
    def part_bytes(self) -> int:
        """Bytes of the two views of all samples of a part."""
        rule, side = self.reader.rule, self.augment.image_size
        values = 2 * -(-self.plan.local_batch // self.parts) * side * side * rule.channels
        return values * (4 if rule.float_views else 1)

    def __getitem__(self, item: int) -> Part:
        micro_step, part = divmod(item, self.parts)
        size = -(-self.plan.local_batch // self.parts)
        work, images = self._decoded(micro_step, slice(part * size, (part + 1) * size))
        im_q = self._views(work.queries, work.rows_q, images)
        im_k = self._views(work.keys, work.rows_k, images)
        rows: list[Float32] = []
        if self.crops_only:
            tables = [ViewTable.unpack(packed) for packed in (work.rows_q, work.rows_k)]
            rows = [photometric_rows(table, self.augment.recipe) for table in tables]
        return Part(torch.from_numpy(im_q), torch.from_numpy(im_k), rows, work.replaced)

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

    def _views(self, encoded: list[Encoded], rows: Any, images: dict[int, Any]) -> NDArray[Any]:
        side, table, rule = self.augment.image_size, ViewTable.unpack(rows), self.reader.rule
        kind = np.float32 if rule.float_views else np.uint8
        views = np.empty((len(encoded), side, side, rule.channels), dtype=kind)
        executor = self._own_executor()
        for row, one in enumerate(encoded):
            views[row] = executor.execute(images[one.sample], table, row)
        return views

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


class _From(Sampler[int]):
    """start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _as_it_is(part: Any) -> Any:
    """Instead of torch's conversion, which makes a shared file of every small array."""
    return part


def leaves_colours(backend: str, device: torch.device, rule: PixelRule) -> bool:
    """Whether the device does what comes after the crop."""
    return backend == "array" and device.type == "cuda" and not rule.float_views


def _in_worker(_: int) -> None:
    outlast_the_trainer()
    # NumPy's products of float views, else on as many threads as there are cores, in each worker.
    threadpool_limits(1, user_api="blas")


def within_limits(workers: int, ahead: int, parts: int, part_bytes: int) -> tuple[int, int]:
    """Workers and parts in flight of each, as wanted or as few as this machine has room for.

    parts: of a micro-batch, of which two may be in the trainer's hands beside those in flight.
    part_bytes: of one, in shared memory. Raises `ConfigError` where even one worker is too many.
    """
    while True:
        held = workers * ahead + 2 * parts
        # Each tensor of a part is an open file of the trainer, and each worker has some pipes.
        memory, files = held * part_bytes, 2 * held + 8 * workers
        free, left = limits.shared_memory(), limits.files_left(files)
        short = free is not None and memory > free
        if not short and (left is None or files <= left):
            return workers, ahead
        if ahead > 1:
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
        self.parts = -(-plan.local_batch // _PART)
        crops_only = leaves_colours(backend, device, reader.rule)
        self.dataset = Parts(reader, plan, config.augment, self.parts, backend, crops_only)
        self.timeout_s = config.run.timeout_s
        # Parts in flight per worker, so that `prefetch` whole micro-batches are on their way.
        ahead = max(2, -(-prefetch * self.parts // wanted))
        self.workers, self.ahead = within_limits(wanted, ahead, self.parts, self.dataset.part_bytes)
        self.description = f"{backend}: {self.workers} worker processes, {prefetch} batches ahead"
        if (self.workers, self.ahead) != (wanted, ahead):
            self.description = (
                f"{backend}: {self.workers} worker processes with {self.ahead} parts of a batch in "
                f"work each, not {wanted} with {ahead}: shared memory or open files are few here"
            )
        if crops_only:
            self.description += "; colours and blur on the GPU"
        self.copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.copies = torch.cuda.Stream(device)
        self._items: Any = None

    def start(self, micro_step: int) -> None:
        """Begin at this micro-batch."""
        self.close()
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=_From(micro_step * self.parts),
            num_workers=self.workers,
            prefetch_factor=self.ahead,
            worker_init_fn=_in_worker,
            collate_fn=_as_it_is,
            timeout=self.timeout_s,
            # Also in a process that was itself spawned, whose children would be spawned by default:
            # those import torch again, for seconds, and abort when they are told to end.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
        )
        self._items = iter(loader)

    def next(self) -> Batch:
        """The next micro-batch.

        Raises `BadImage` where no sample can replace a bad one, `ConfigError` where storage keeps
        failing, and `ChildProcessError` where a worker died or is silent for `run.timeout_s`.
        """
        try:
            parts = [next(self._items) for _ in range(self.parts)]
        except ConfigError as error:  # PyTorch puts the worker's traceback before it
            raise ConfigError(str(error).rpartition("ConfigError: ")[2].strip()) from None
        except RuntimeError as error:  # torch's words for both; any other is a fault of our own
            if not str(error).startswith(("DataLoader worker", "DataLoader timed out")):
                raise
            raise ChildProcessError(
                f"{str(error).splitlines()[0].rstrip('. ')}: look for too little memory, for other "
                f"programs that fill {limits.SHARED_MEMORY}, and for a disk that does not answer; "
                "the same command goes on."
            ) from error
        im_q, im_k, rows, replaced = zip(*parts, strict=True)
        if not self.dataset.crops_only:
            return Batch(self._upload(im_q), self._upload(im_k), np.concatenate(replaced))
        rows_q, rows_k = zip(*rows, strict=True)
        programme = self._upload(tuple(map(torch.from_numpy, (*rows_q, *rows_k))))
        views = photometric(self._upload((*im_q, *im_k)), programme)
        n = sum(map(len, im_q))
        return Batch(views[:n], views[n:], np.concatenate(replaced))

    def _upload(self, parts: tuple[Tensor, ...]) -> Tensor:
        """One tensor on the device; the copy overlaps with the work of the current stream."""
        if self.copies is None:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        rows = sum(len(part) for part in parts)
        pinned = torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype, pin_memory=True)
        torch.cat(parts, out=pinned)
        with torch.cuda.stream(self.copies):
            views = pinned.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.copies)
        views.record_stream(current)
        return views

    def close(self) -> None:
        """Ends the workers and frees their shared memory."""
        items, self._items = self._items, None
        if items is not None and hasattr(items, "_shutdown_workers"):
            items._shutdown_workers()
