"""What the workers of the loader may take of the machine, and what is said where they fail."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from threadpoolctl import threadpool_info, threadpool_limits
from torch.utils.data import DataLoader, Dataset

from fastmoco.config import (
    AugmentConfig,
    Config,
    ConfigError,
    DataConfig,
    KnnConfig,
    OptimConfig,
    RunConfig,
)
from fastmoco.data.backends.processes import _in_process, end, work_ahead
from fastmoco.data.backends.ring import Ring, slot_of
from fastmoco.data.backends.workers import WorkerEngine, slots, within_limits
from fastmoco.data.loader import make_plan
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.reader import Reader
from fastmoco.data.sources.choose import open_source
from fastmoco.machine import limits


class ThreadsOfNumpy(Dataset[int]):
    """Most threads that a product of NumPy may take in the process which asks."""

    def __getitem__(self, index: int) -> int:
        np.ones((8, 8)) @ np.ones((8, 8))
        return max(
            int(one["num_threads"]) for one in threadpool_info() if one["user_api"] == "blas"
        )

    def __len__(self) -> int:
        return 1


def test_a_worker_multiplies_on_one_thread_and_the_trainer_on_all() -> None:
    loader = DataLoader(
        ThreadsOfNumpy(),
        batch_size=None,
        num_workers=1,
        worker_init_fn=_in_process,
        multiprocessing_context="fork",
    )
    with threadpool_limits(2, user_api="blas"):
        assert list(loader) == [1]
        assert ThreadsOfNumpy()[0] == 2


@pytest.mark.parametrize(
    ("free", "files", "found"),
    [
        (None, None, (4, 3)),  # as wanted
        (4 * 10, None, (4, 3)),  # 4 x 3 parts are of 3 batches, and one is taken: to the byte
        (4 * 10 - 1, None, (4, 2)),
        (2 * 10, None, (4, 1)),
        (None, 33, (4, 3)),  # the ring is a file, and a worker has 8
        (None, 32, (3, 3)),
        (3 * 10, 24, (2, 2)),  # for memory 4 x 2 parts, of 2 batches
    ],
)
def test_as_many_workers_as_there_is_room_for(
    free: int | None, files: int | None, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "shared_memory", lambda: free)
    monkeypatch.setattr(limits, "files_left", lambda needed: files)
    assert within_limits(4, 3, 4, 10) == found


def test_room_for_no_worker_is_said_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "files_left", lambda needed: None)
    monkeypatch.setattr(limits, "shared_memory", lambda: 64_000_000)
    with pytest.raises(ConfigError, match=r"needs 154 MB .* has 64 MB .*--shm-size"):
        within_limits(4, 3, 4, 2 * 256 * 224 * 224 * 3)
    monkeypatch.setattr(limits, "shared_memory", lambda: None)
    monkeypatch.setattr(limits, "files_left", lambda needed: 5)
    with pytest.raises(
        ConfigError, match=r"9 more open files, and this process may open 5: .*ulimit"
    ):
        within_limits(1, 1, 4, 10)


class Numbered(Dataset[int]):
    """Fills its slot with the number of the micro-batch, and counts."""

    def __init__(self, ring: torch.Tensor, parts: int) -> None:
        self.slots, self.parts = ring, parts
        self.done = torch.zeros(64, dtype=torch.int64).share_memory_()

    def __getitem__(self, item: int) -> int:
        micro_step, part = divmod(item, self.parts)
        slot_of(self.slots, micro_step)[0, part] = micro_step
        self.done[item] = 1
        return item


@pytest.mark.parametrize(
    ("count", "ahead", "parts"), [(1, 2, 1), (2, 2, 3), (2, 3, 4), (2, 3, 2), (1, 2, 5)]
)
def test_workers_that_are_as_far_ahead_as_they_may_overwrite_nothing(
    count: int, ahead: int, parts: int
) -> None:
    ring = Ring(slots(count, ahead, parts), (1, parts), torch.int64)
    numbered = Numbered(ring.slots, parts)
    loader = DataLoader(
        numbered,
        batch_size=None,
        sampler=range(64),
        num_workers=count,
        prefetch_factor=ahead,
        multiprocessing_context="fork",
    )
    items = iter(loader)
    for micro_step in range(4):
        for part in range(parts):
            assert next(items) == micro_step * parts + part
            asked_for = micro_step * parts + part + 1 + count * ahead
            while not bool(numbered.done[:asked_for].all()):  # the loader ends if a worker dies
                time.sleep(0.001)
        taken = ring.taken(micro_step, torch.device("cpu"))
        assert taken.tolist() == [[micro_step] * parts]


def test_a_batch_is_the_trainers_own_memory() -> None:
    ring = Ring(2, (1, 3), torch.uint8)
    slot_of(ring.slots, 5).fill_(5)
    taken = ring.taken(5, torch.device("cpu"))
    ring.slots.zero_()
    assert taken.tolist() == [[5, 5, 5]]


def engine_of(folder: Path, channels: int = 3, timeout_s: float = 600) -> WorkerEngine:
    """For batches of 100 views of 32 pixels of 100 images."""
    for number in range(100):
        if channels == 3:
            Image.new("RGB", (40, 40)).save(folder / f"{number}.png")
        else:
            np.save(folder / f"{number}.npy", np.zeros((40, 40, channels), np.uint16))
    deep = DataConfig(
        root=str(folder), workers=1, channels=channels, intensity=(0, 1), mean=(0,), std=(1,)
    )
    config = Config(
        run=RunConfig(timeout_s=timeout_s),
        data=DataConfig(root=str(folder), workers=1) if channels == 3 else deep,
        augment=AugmentConfig(image_size=32, saturation=0, hue=0, grayscale_p=0),
        optim=OptimConfig(global_batch_size=100),
        knn=KnnConfig(every=0),
    )
    source = open_source(config)
    reader = Reader(source, 0, PixelRule.of(config.data))
    return WorkerEngine(
        config, make_plan(config, source, 100), reader, torch.device("cpu"), "array"
    )


def test_the_ring_takes_the_bytes_of_its_batches(tmp_path: Path) -> None:
    for channels, value in ((3, 1), (13, 4)):
        folder = tmp_path / str(channels)
        folder.mkdir()
        engine = engine_of(folder, channels)
        assert engine.parts == 2
        assert (engine.workers, engine.ahead) == (1, 4)  # of 2 batches, and one is taken
        assert engine.ring.slots.nbytes == 3 * engine.dataset.batch_bytes
        assert engine.dataset.batch_bytes == 2 * 100 * 32 * 32 * channels * value
        rows, replaced = engine.dataset[1]
        assert not rows
        assert len(replaced) == 50


class Collects(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


class Pool:
    """Joins threads at its end, which a forked process does not have."""

    home = os.getpid()

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        if os.getpid() != self.home:
            threading.Event().wait()


def test_a_worker_ends_nothing_of_the_trainers() -> None:
    gc.disable()
    try:
        Pool()
        items = work_ahead(Collects(), 7, processes=1, ahead=1, timeout_s=20)
        try:
            assert next(items) == 7
        finally:
            end(items)
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0


class Dies(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


class Silent(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        time.sleep(3600)
        return index


@pytest.mark.parametrize(
    ("dataset", "timeout_s", "said"),
    [
        (Dies(), 600.0, "killed by signal|exited unexpectedly"),
        (Silent(), 0.5, r"timed out after 0\.5 seconds, in __getitem__ \(test_workers\.py:\d+\), "),
    ],
)
def test_a_worker_that_dies_or_is_silent_ends_the_wait(
    dataset: Dataset[int], timeout_s: float, said: str, tmp_path: Path
) -> None:
    engine = engine_of(tmp_path, timeout_s=timeout_s)
    engine.dataset = dataset  # type: ignore[assignment]
    engine.start(0)
    try:
        with pytest.raises(ChildProcessError, match=said):
            engine.next()
    finally:
        engine.close()
