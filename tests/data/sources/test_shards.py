"""Shards on the disk: how many are open, and what is no shard any more."""

from __future__ import annotations

import io
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmoco.config import ConfigError
from fastmoco.data.sources import shards
from fastmoco.data.sources.index import Index, save_index
from fastmoco.data.sources.measure import in_parallel
from fastmoco.data.sources.shards import ShardSource, open_shards
from tests.support.data.images import png

LIMIT = 10**8


def picture(number: int) -> bytes:
    return png(np.full((3, 4 + number, 3), number, np.uint8))


def write(path: Path, names: list[str], *, first: int = 0) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names, first):
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


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """More shards than are open at a time; every picture has bytes of its own."""
    monkeypatch.setattr(shards, "in_parallel", lambda many: in_parallel(many=False))  # starts soon
    for number in range(100):
        write(tmp_path / f"{number:03d}.tar", [f"{number}.png"], first=number)
    return tmp_path


def test_a_file_stays_open_while_it_is_read(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number would be that of another file, which a thread opens meanwhile."""
    source, read, meanwhile = open_shards(str(many), LIMIT), os.pread, list(range(1, 100))

    def slow(file: int, length: int, offset: int) -> bytes:
        while meanwhile:
            source.read(meanwhile.pop())
        return read(file, length, offset)

    monkeypatch.setattr(os, "pread", slow)
    assert source.read(0) == picture(0)


def test_threads_read_the_bytes_of_their_own_picture(many: Path) -> None:
    source, interval = open_shards(str(many), LIMIT), sys.getswitchinterval()
    before = set(os.listdir("/proc/self/fd"))
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(16) as pool:
            asked = [n % 100 for n in range(0, 7 * 3001, 7)]
            found = list(pool.map(source.read, asked))
    finally:
        sys.setswitchinterval(interval)
    truth = [picture(number) for number in range(100)]
    assert [n for n, data in zip(asked, found, strict=True) if data != truth[n]] == []
    assert len(set(os.listdir("/proc/self/fd")) - before) <= shards._OPEN_FILES + 1
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(99) == truth[99]
    del source, copy
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1


def test_threads_that_ask_for_names_get_those_of_their_own_shard(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sizes = open_shards(str(many), LIMIT), vars(ShardSource)["shard_sizes"].fget
    meanwhile = [50]

    def slow(self: ShardSource) -> object:
        if meanwhile:
            source.name(meanwhile.pop())
        return sizes(self)

    monkeypatch.setattr(ShardSource, "shard_sizes", property(slow))
    assert source.name(1).endswith("001.tar:1.png")


def test_a_shard_that_is_replaced_during_a_run_is_not_read(tmp_path: Path) -> None:
    """Its offsets are those of other members; one that is open already stays what it was.

    Nor do processes read it that are spawned to pack or to verify.
    """
    for number in range(2):
        write(tmp_path / f"{number}.tar", ["1.png"])
    source = open_shards(str(tmp_path), LIMIT)
    assert source.read(0) == picture(0)
    for number in range(2):
        (tmp_path / f"{number}.tar").unlink()
        write(tmp_path / f"{number}.tar", ["0.png", "1.png"])
    assert source.read(0) == picture(0)
    for one in (source, pickle.loads(pickle.dumps(source))):
        with pytest.raises(OSError, match=r"1\.tar was changed after it was indexed"):
            one.read(1)


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


@pytest.mark.parametrize(
    ("arrays", "facts"),
    [
        ({"offsets": None}, {}),
        ({"offsets": np.zeros(1, np.int64)}, {}),
        ({"offsets": np.full(2, -512, np.int64)}, {}),
        ({"offsets": np.full(2, 1 << 63, np.uint64)}, {}),
        ({"sizes": np.full((2, 2), -1, np.int32)}, {}),
        ({"sizes": np.full((2, 3), 1, np.int32)}, {}),
        ({}, {"bad": [1]}),
        ({}, {"bad": {"x": "no number"}}),
        ({}, {"bad": {"7": "no sample"}}),
        ({}, {"others": 5}),
        ({}, {"others": {".txt": "many"}}),
        ({}, {"beside": "x"}),
        ({}, {"end": 5}),
    ],
)
def test_an_index_that_came_with_a_shard_and_is_none_is_not_used(
    arrays: dict[str, Any], facts: dict[str, Any], tmp_path: Path
) -> None:
    """It fits the shard by its checksum, so that anybody may have made it."""
    right: dict[str, Any] = {
        "sizes": np.array([[4, 3], [5, 3]], np.int32),
        "offsets": np.array([512, 1536], np.int64),
        "lengths": np.array([9, 9], np.uint32),  # not those of the pictures
    }
    lengths = []
    for name, odd, more in (("right", {}, {}), ("wrong", arrays, facts)):
        shard = write(tmp_path / f"{name}.tar", ["0.png", "1.png"])
        known = {"bad": {}, "end": "", "others": {}, "beside": 0, "stamp": [], **more}
        whole = {name: array for name, array in {**right, **odd}.items() if array is not None}
        index = Index(whole, {**known, "packed": shards.head_of(shard)})
        save_index(index, shards.index_beside(shard))
        source = open_shards(str(shard), LIMIT)
        lengths.append([len(source.read(0)), len(source.read(1))])
        assert not source.bad
    assert lengths == [[9, 9], [len(picture(0)), len(picture(1))]]
