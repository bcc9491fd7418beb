"""The cache of objects: what killed processes, other hosts and other users leave in it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastmoco.config import ConfigError
from fastmoco.data.sources.remote import cache as cache_module
from fastmoco.data.sources.remote.cache import Cache
from fastmoco.data.sources.remote.store import Object
from fastmoco.machine.owner import start_of

OTHER_HOST = "half.0123456789ab-1-2-3"
ONE = Object("s3://b/1.tar", 95, "")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Of 100 bytes; what is fetched are zeros."""
    monkeypatch.setattr(cache_module, "fetch", lambda one, into: into.write(bytes(one.size)))
    return Cache(tmp_path, limit=100)


def left(cache: Cache, name: str, *, age_s: float = 0.0) -> Path:
    """Half of an object that a writer left."""
    half = cache.folder / f"{name}.part"
    half.write_bytes(bytes(90))
    changed = half.stat().st_mtime - age_s
    os.utime(half, (changed, changed))
    return half


def of_process(number: int, started: str) -> str:
    """The name that a process of this machine gives to its part."""
    machine, _, _, thread = cache_module._writer().split("-")
    return f"half.{machine}-{number}-{started}-{thread}"


def test_half_an_object_of_a_killed_process_takes_no_room(cache: Cache) -> None:
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    half = left(cache, of_process(killed.pid, start_of(killed.pid) or ""))
    killed.kill()
    killed.wait()
    assert cache.path(ONE).stat().st_size == 95
    assert not half.exists()


@pytest.mark.timeout(60)
def test_a_process_that_has_the_number_of_a_killed_one_does_not_hold_its_part(cache: Cache) -> None:
    half = left(cache, of_process(os.getpid(), "1"))
    assert cache.path(ONE).exists()
    assert not half.exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["", OTHER_HOST])
def test_a_part_that_is_written_is_waited_for(name: str, cache: Cache) -> None:
    """By a process of this machine, or by one of another, of which only the file tells."""
    half = left(cache, name or of_process(os.getpid(), start_of(os.getpid()) or ""))
    fetched = threading.Thread(target=cache.path, args=(ONE,), daemon=True)
    fetched.start()
    fetched.join(0.3)
    assert fetched.is_alive()
    assert half.exists()
    half.rename(half.with_suffix(".tar"))  # it is whole, and may be thrown out
    fetched.join()
    assert cache.path(ONE).stat().st_size == 95


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name",
    [OTHER_HOST, f"half.{os.getpid()}", "half", "é..-1"],
    ids=["another host", "an older form", "no writer", "odd"],  # the same in every worker
)
def test_a_part_that_nobody_writes_any_more_is_given_up(name: str, cache: Cache) -> None:
    """Also one with the number of a process alone, as earlier versions wrote, and odd names."""
    half = left(cache, name, age_s=2 * cache_module.SILENCE_S)
    assert cache.path(ONE).exists()
    assert not half.exists()


def test_a_part_that_another_host_gave_up_is_fetched_again(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []

    def fetch(one: Object, into: object) -> None:
        times.append(one)
        if len(times) == 1:
            next(cache.folder.glob("*.part")).unlink()

    monkeypatch.setattr(cache_module, "fetch", fetch)
    assert cache.path(ONE).stat().st_size == 95
    assert len(times) == 2


def test_an_object_that_another_user_fetched_is_read(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = cache.path(ONE)

    def refused(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "utime", refused)
    assert cache.path(ONE) == place


def test_folders_in_the_cache_are_left_alone(cache: Cache) -> None:
    (cache.folder / "mine.tar").mkdir()
    (cache.folder / "mine.tar" / "file").touch()
    assert Cache(cache.folder, limit=95).path(ONE).exists()
    assert (cache.folder / "mine.tar" / "file").exists()


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "-1", "0", "1e400", "much", "1e-12"])
def test_a_size_that_is_none_is_a_sentence(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTMOCO_REMOTE_GB", text)
    with pytest.raises(ConfigError, match=f"FASTMOCO_REMOTE_GB is {text}, which is no size in GB"):
        _ = Cache(tmp_path).limit


def test_a_cache_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(ConfigError, match=r"The cache .*file.* cannot be written \("):
            Cache(folder)
