"""What the workers of the loader may take of the machine, and what is said where they fail."""

from __future__ import annotations

import os
import signal
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
from fastmoco.data.backends.workers import WorkerEngine, _in_worker, within_limits
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
        worker_init_fn=_in_worker,
        multiprocessing_context="fork",
    )
    with threadpool_limits(2, user_api="blas"):
        assert list(loader) == [1]
        assert ThreadsOfNumpy()[0] == 2


@pytest.mark.parametrize(
    ("free", "files", "found"),
    [
        (None, None, (4, 3)),  # as wanted
        (20 * 10, None, (4, 3)),  # 4 x 3 parts in work and 2 x 4 of two batches: to the byte
        (20 * 10 - 1, None, (4, 2)),
        (9 * 10, None, (1, 1)),
        (None, 72, (4, 3)),  # two files of each of 20 parts, and 8 of each worker
        (None, 71, (4, 2)),
        (12 * 10, 56, (4, 1)),  # 4 + 8 parts and 4 workers: 24 + 32 files
        (12 * 10, 55, (3, 1)),
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
    with pytest.raises(ConfigError, match=r"needs 173 MB .* has 64 MB .*--shm-size"):
        within_limits(4, 3, 4, 2 * 64 * 224 * 224 * 3)
    monkeypatch.setattr(limits, "shared_memory", lambda: None)
    monkeypatch.setattr(limits, "files_left", lambda needed: 5)
    with pytest.raises(
        ConfigError, match=r"26 more open files, and this process may open 5: .*ulimit"
    ):
        within_limits(1, 1, 4, 10)


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


def test_a_part_takes_the_bytes_of_its_views(tmp_path: Path) -> None:
    for channels, value in ((3, 1), (13, 4)):
        folder = tmp_path / str(channels)
        folder.mkdir()
        engine = engine_of(folder, channels)
        im_q, im_k, rows, _ = engine.dataset[0]
        assert not rows
        assert engine.parts == 2
        assert engine.dataset.part_bytes == im_q.nbytes + im_k.nbytes
        assert engine.dataset.part_bytes == 2 * 50 * 32 * 32 * channels * value


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
        (Silent(), 0.5, "timed out after 0.5 seconds"),
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
