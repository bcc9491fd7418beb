"""Shards on the disk: how many are open, and what is no shard any more."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmoco.config import ConfigError
from fastmoco.data.sources import shards
from fastmoco.data.sources.shards import open_shards
from tests.support.data.images import png

LIMIT = 10**8


def picture(number: int) -> bytes:
    return png(np.full((3, 4 + number, 3), number, np.uint8))


def write(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(picture(number))
            tar.addfile(member, io.BytesIO(picture(number)))
    return path


def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_FILES", 3)
    for number in range(7):
        write(tmp_path / f"{number}.tar", [f"{number}.png", f"{number}b.png"])
    source = open_shards(str(tmp_path), LIMIT)
    before = set(os.listdir("/proc/self/fd"))
    for sample in (*range(14), *range(13, -1, -1)):
        assert source.read(sample) == picture(sample % 2)
        # One more is the listing of the folder itself.
        assert len(set(os.listdir("/proc/self/fd")) - before) <= 3 + 1


def test_a_shard_that_is_replaced_during_a_run_is_not_read(tmp_path: Path) -> None:
    """Its offsets are those of other members; one that is open already stays what it was."""
    for number in range(2):
        write(tmp_path / f"{number}.tar", ["1.png"])
    source = open_shards(str(tmp_path), LIMIT)
    assert source.read(0) == picture(0)
    for number in range(2):
        (tmp_path / f"{number}.tar").unlink()
        write(tmp_path / f"{number}.tar", ["0.png", "1.png"])
    assert source.read(0) == picture(0)
    with pytest.raises(OSError, match=r"1\.tar was changed after it was indexed"):
        source.read(1)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_shard_that_would_never_end_is_refused(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    """Also where the index of the shard that was there lies beside it."""
    shard = write(tmp_path / "0.tar", ["1.png"])
    open_shards(str(tmp_path), LIMIT)
    shard.unlink()
    make(shard)
    for root in (shard, tmp_path):
        with pytest.raises(ConfigError, match=r"is a (FIFO|device), not a regular|holds no \.tar"):
            open_shards(str(root), LIMIT)
