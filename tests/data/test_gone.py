"""Images whose disk goes away: one sentence with path and reason, and never a bad image."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import Config, OneRankError, parse
from fastmoco.data.backends.choose import has_dali
from fastmoco.data.decode import BadImage
from fastmoco.data.loader import build_loader
from fastmoco.data.reader import read_sample

TOTAL = 40


def source(fails: dict[int, int], bad: tuple[int, ...] = ()) -> Any:
    """Forty samples; those of `fails` raise with the errno that stands there."""

    def read(sample: int) -> bytes:
        if sample in fails:
            raise OSError(fails[sample], os.strerror(fails[sample]))
        return b"read"

    known = dict.fromkeys(bad, "empty")
    return SimpleNamespace(read=read, sizes=range(TOTAL), bad=known, name=lambda n: f"d/{n}.jpg")


@pytest.mark.parametrize("code", ["EIO", "ENOTCONN", "ESTALE", "ENOENT", "ENOTDIR", "EACCES"])
def test_one_file_is_bad_and_all_files_are_a_disk(code: str) -> None:
    number = getattr(errno, code)
    with pytest.raises(BadImage, match=os.strerror(number)):
        read_sample(source({7: number}), 7)
    half = dict.fromkeys(range(0, TOTAL, 2), number)
    with pytest.raises(BadImage):
        read_sample(source(half), 4)
    with pytest.raises(OneRankError) as caught:
        read_sample(source(dict.fromkeys(range(TOTAL), number)), 7)
    assert str(caught.value).startswith(f"d/7.jpg cannot be read ({os.strerror(number)}), nor can")


def test_what_is_known_to_be_bad_is_not_asked() -> None:
    with pytest.raises(BadImage):
        read_sample(source(dict.fromkeys(range(35), errno.ENOENT), bad=tuple(range(30))), 31)


def test_a_fault_of_files_is_none_of_the_disk() -> None:
    with pytest.raises(BadImage, match="Invalid argument"):
        read_sample(source(dict.fromkeys(range(TOTAL), errno.EINVAL)), 7)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "disk" / "images").mkdir(parents=True)
    for number in range(TOTAL):
        noise = np.random.default_rng(number).integers(0, 255, (24, 24, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "disk" / "images" / f"{number}.jpg")
    return parse(
        [
            *(f"--data.root={tmp_path}/disk/images", f"--run.dir={tmp_path}/run"),
            *("--optim.global_batch_size=8", "--augment.image_size=16", "--data.workers=1"),
        ]
    )


@pytest.mark.parametrize("left", ["nothing", "the mount point", "files that are no images"])
@pytest.mark.parametrize(
    "backend",
    [
        *("array", "pil"),
        pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="no DALI")),
    ],
)
def test_a_run_whose_images_vanish_says_which_and_why(
    config: Config, tmp_path: Path, backend: Any, left: str
) -> None:
    share = 1.0 if left == "files that are no images" else 0.01
    data = replace(config.data, backend=backend, max_bad_share=share)
    config = replace(config, data=data)
    disk = tmp_path / "disk"

    def goes_away() -> None:
        if left == "files that are no images":
            for path in (disk / "images").iterdir():
                path.write_bytes(b"no image")
            return
        disk.rename(tmp_path / "away")
        if left == "the mount point":
            disk.mkdir()

    with build_loader(config, device=torch.device("cpu")) as loader:
        batches = loader.batches(0, 1000)
        next(batches)
        goes_away()
        with pytest.raises(OneRankError) as caught:
            list(batches)
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith(f"{disk}/images/")
    if left == "files that are no images":
        assert ".jpg cannot be used (" in told
    else:
        assert ".jpg cannot be read (No such file or directory), nor can others" in told
        assert not (tmp_path / "run" / "bad_samples.jsonl").exists()
