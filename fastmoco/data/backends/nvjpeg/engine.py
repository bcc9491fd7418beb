"""The nvJPEG backend: reader processes, and a thread that makes views on a stream of its own.

The thread decodes a micro-batch on the GPU, and what the decoder is not given or refuses with PIL
on the host; crops and colours are `fastmoco_kernels`'. A picture that PIL refuses as well is
quarantined, and the micro-batch is read again without it. All other rows stay as they were.

n local batch, S side of a view, B views of a micro-batch (2 n, or n without keys).
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmoco.config import Config
from fastmoco.data.backends import processes
from fastmoco.data.backends.nvjpeg.decoder import decode_or_refuse
from fastmoco.data.backends.nvjpeg.reader import Deliveries, Delivery
from fastmoco.data.batch import Batch
from fastmoco.data.decode import JPEG_START, BadImage, decode
from fastmoco.data.photometric_rows import BOX
from fastmoco.data.plan import Plan
from fastmoco.data.reader import Reader
from fastmoco.data.table import Int64
from fastmoco.machine.host import cores
from fastmoco_kernels import crop_resize, photometric

PIXELS_AT_ONCE = 1 << 28
"""Of the pictures that are decoded together: they take three bytes each on the GPU."""
_REPAIRS = 20
_PATIENCE_S = 10.0


class Made(NamedTuple):
    """A micro-batch that the thread has finished, as far as the host is concerned."""

    views: Tensor
    """uint8 (B, S, S, 3)."""
    replaced: Int64
    ready: torch.cuda.Event | None


class NvjpegEngine:
    """Micro-batches whose pictures a GPU decodes, in order, starting anywhere."""

    backend = "nvjpeg"

    def __init__(self, config: Config, plan: Plan, reader: Reader, device: torch.device) -> None:
        self.reader, self.plan, self.side = reader, plan, config.augment.image_size
        self.dataset = Deliveries(reader, plan, config.augment)
        self.timeout_s = config.run.timeout_s
        # As for DALI: a process reads more than 5,000 samples per second.
        self.readers = config.data.workers or (2 if cores() >= 8 else 1)
        self.ahead = max(1, -(-config.data.prefetch // self.readers))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.description = (
            f"nvjpeg on {device.type}: {self.readers} reader processes, {config.data.prefetch} "
            "batches ahead; colours and blur there too"
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._items: Iterator[Delivery] = iter(())
        self._made: queue.Queue[Made | BaseException] = queue.Queue(1)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, micro_step: int) -> None:
        """Begin at this micro-batch."""
        self.close()
        self._made, self._stop = queue.Queue(1), threading.Event()
        # Without a time limit: then torch looks every 5 s whether the processes live.
        self._items = processes.work_ahead(self.dataset, micro_step, self.readers, self.ahead, 0)
        self._thread = threading.Thread(target=self._run, args=(micro_step,), daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next micro-batch. Raises as `processes.in_own_words`."""
        # Torch tells of a dead process in the main thread as well.
        with processes.in_own_words(self._items):
            try:
                made = self._made.get(timeout=self.timeout_s or None)
            except queue.Empty:
                raise ChildProcessError(
                    f"No batch came for {self.timeout_s:g} seconds"
                    f"{processes.silent_at(self._items)}: look for a disk that does not answer; "
                    "the same command goes on."
                ) from None
            if isinstance(made, BaseException):
                raise made
        if made.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made.ready)
            made.views.record_stream(current)
        n = self.plan.local_batch
        return Batch(made.views[:n], made.views[n:], made.replaced)

    def close(self) -> None:
        """Ends the thread and the reader processes."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)  # longer only where a reader is dead or silent
        items, self._items, self._thread = self._items, iter(()), None
        processes.end(items)

    def _run(self, first: int) -> None:
        """The thread: one micro-batch after another, until it is told to stop or one fails."""
        items, made, stop = self._items, self._made, self._stop
        try:
            with self._on_own_stream():
                for micro_step in itertools.count(first):
                    if stop.is_set():
                        return
                    with processes.in_own_words(items):
                        delivery = next(items)
                    _put(made, self._make(micro_step, delivery), stop)
        except BaseException as error:  # raised again by `next`
            _put(made, error, stop)

    @contextlib.contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):  # and its device, of this thread
                yield

    def _make(self, micro_step: int, delivery: Delivery) -> Made:
        for _ in range(_REPAIRS):
            if not self.reader.bad.keys().isdisjoint(delivery.samples):  # found in this process
                delivery = self.dataset[micro_step]
            if self._stream is not None:
                delivery = delivery._replace(data=delivery.data.pin_memory())
            crops, bad = self._crops(delivery)
            if not bad:
                rows = torch.from_numpy(delivery.rows).to(self.device)
                views = photometric(crops, rows)
                ready = self._stream.record_event() if self._stream else None
                return Made(views, delivery.replaced, ready)
            self.reader.quarantine(bad)
        raise RuntimeError(f"micro-batch {micro_step} had bad pictures {_REPAIRS} times")

    def _crops(self, delivery: Delivery) -> tuple[Tensor, dict[int, str]]:
        """The crops of a delivery, uint8 (B, S, S, 3), or else why which samples are bad."""
        boxes = torch.from_numpy(delivery.rows[:, BOX].astype(np.int64))
        which = torch.from_numpy(delivery.which)
        shape = (len(which), self.side, self.side, 3)
        crops = torch.empty(shape, dtype=torch.uint8, device=self.device)
        bad: dict[int, str] = {}
        for part in _parts(delivery.sizes):
            if self._stream is not None:
                self._stream.synchronize()  # see `decode_all`
            pictures = self._decoded(delivery, part, bad)
            views = ((which >= part.start) & (which < part.stop)).nonzero()[:, 0]
            if not bad and len(views):
                made = crop_resize(pictures, which[views] - part.start, boxes[views], self.side)
                crops[views.to(self.device)] = made
            del pictures  # before others are decoded
        return crops, bad

    def _decoded(self, delivery: Delivery, part: range, bad: dict[int, str]) -> list[Tensor]:
        """The pictures of a part, (3, H, W) on the device, but those that go into `bad`."""
        every, sample = delivery.pictures, delivery.samples
        data = {number: every[number] for number in part}
        jpegs = [
            number
            for number, one in data.items()
            if sample[number] not in self.reader.by_pil and _is_jpeg(one)
        ]
        found: dict[int, Tensor | None] = {}
        if jpegs:
            decoded = decode_or_refuse([data[number] for number in jpegs], self.device)
            found = dict(zip(jpegs, decoded, strict=True))
        pictures = []
        for number, one in data.items():
            picture, size = found.get(number), (3, *delivery.sizes[number])
            if picture is None or picture.shape != size:
                try:
                    picture = self._on_host(one, size).to(self.device)
                except BadImage as error:
                    bad[sample[number]] = str(error)
                    continue
                if number in found:
                    self.reader.by_pil.add(sample[number])
            pictures.append(picture)
        return pictures

    def _on_host(self, data: Tensor, size: tuple[int, int, int]) -> Tensor:
        """The picture as PIL decodes it, or has decoded it in a reader. Raises `BadImage`."""
        if _is_jpeg(data):
            pixels = torch.from_numpy(np.array(decode(data.numpy().tobytes(), self.reader.rule)))
        else:
            _, height, width = size
            pixels = data[len(data) - 3 * height * width :].view(height, width, 3)
        if pixels.shape != (*size[1:], 3):
            raise BadImage(f"decoded to {tuple(pixels.shape[:2])} pixels, not {size[1:]}")
        return pixels.permute(2, 0, 1)


def _is_jpeg(data: Tensor) -> bool:
    return data[:2].numpy().tobytes() == JPEG_START


def _parts(sizes: list[tuple[int, int]]) -> Iterator[range]:
    """The pictures in order, as many at a time as `PIXELS_AT_ONCE` allows, and at least one."""
    first = pixels = 0
    for number, (height, width) in enumerate(sizes):
        if number > first and pixels + height * width > PIXELS_AT_ONCE:
            yield range(first, number)
            first, pixels = number, 0
        pixels += height * width
    yield range(first, len(sizes))


def _put(
    made: queue.Queue[Made | BaseException], item: Made | BaseException, stop: threading.Event
) -> None:
    """Wait for room, but not for ever."""
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            made.put(item, timeout=0.1)
            return
