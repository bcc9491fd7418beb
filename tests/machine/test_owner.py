"""Who may write into a run directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fastmoco.machine import durable, owner
from fastmoco.machine.owner import Mark, OwnedError, Owner, read_mark, require_free


def leave(folder: Path, mark: Mark) -> None:
    """The mark of somebody else."""
    (folder / owner.NAME).write_text(json.dumps(asdict(mark)))


def mine() -> Mark:
    started = owner.start_of(os.getpid())
    assert started is not None
    return Mark(owner.this_host(), os.getpid(), started, "noon", "t")


def test_a_second_owner_is_refused_until_the_first_has_left(tmp_path: Path) -> None:
    with Owner(tmp_path):
        with pytest.raises(OwnedError, match=f"process {os.getpid()} on "):
            require_free(tmp_path)
        with pytest.raises(OwnedError), Owner(tmp_path):
            pass
        assert read_mark(tmp_path) is not None
    assert list(tmp_path.iterdir()) == []
    with Owner(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names there")
def test_a_pipe_for_a_mark_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / owner.NAME)
    with Owner(tmp_path):
        assert read_mark(tmp_path) is not None


@pytest.mark.parametrize("target", ["nowhere", owner.NAME], ids=["a missing file", "itself"])
def test_a_link_that_leads_nowhere_gives_way(tmp_path: Path, target: str) -> None:
    (tmp_path / owner.NAME).symlink_to(target)
    with Owner(tmp_path) as now:
        assert now.holds()
        assert not (tmp_path / owner.NAME).is_symlink()


def test_a_killed_owner_gives_way(tmp_path: Path) -> None:
    code = "import sys, os, pathlib; from fastmoco.machine.owner import Owner\n"
    code += "with Owner(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert read_mark(tmp_path) is not None
    with Owner(tmp_path) as now:
        assert now.holds()


def test_what_a_process_leaves_that_is_killed_while_it_claims_is_swept(tmp_path: Path) -> None:
    code = "import sys, os, pathlib; from fastmoco.machine import owner\n"
    code += "owner._link = lambda *_: os.kill(os.getpid(), 9)\n"
    code += "with owner.Owner(pathlib.Path(sys.argv[1])): pass"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    durable.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc").exists(), reason="the system does not tell start times")
def test_a_process_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    leave(tmp_path, replace(mine(), started="1"))
    require_free(tmp_path)
    leave(tmp_path, mine())
    with pytest.raises(OwnedError):
        require_free(tmp_path)


def test_a_process_that_ended_and_was_not_waited_for_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()  # until it has closed its end
    while owner.start_of(child.pid) is not None:
        time.sleep(0.01)
    child.wait()


def test_an_owner_on_another_host_is_believed_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = replace(mine(), host="far away")
    leave(tmp_path, far)
    said: list[str] = []
    monkeypatch.setattr(owner, "SILENCE_S", 0.05)
    require_free(tmp_path, said.append)  # silent: dead
    assert "far away" in said[0]
    monkeypatch.setattr(owner, "SILENCE_S", 600.0)
    ended = threading.Event()

    def live() -> None:
        beat = 0
        while not ended.wait(0.01):
            beat += 1
            os.utime(tmp_path / owner.NAME, (beat, beat))  # its clock is years behind

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(OwnedError, match="on far, which"):
            require_free(tmp_path, said.append)
    finally:
        ended.set()
        thread.join()


def test_who_asks_now_and_then_sees_a_living_owner_and_its_end(tmp_path: Path) -> None:
    watch = owner.Watch(tmp_path)
    assert watch.owner() is None
    with Owner(tmp_path):
        mark = watch.owner()
        assert mark is not None
        assert mark.process == os.getpid()
    assert watch.owner() is None
    leave(tmp_path, replace(mine(), process=2**22 + 1))  # more than Linux numbers
    assert watch.owner() is None


def test_an_owner_on_another_host_is_watched_for_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("fastmoco.machine.owner.time.monotonic", lambda: now[0])
    far = replace(mine(), host="far away")
    leave(tmp_path, far)
    watch = owner.Watch(tmp_path)
    assert watch.owner() == far
    now[0] += owner.SILENCE_S - 1
    assert watch.owner() == far
    os.utime(tmp_path / owner.NAME, (1, 1))  # its clock is years behind
    now[0] += 2
    assert watch.owner() == far
    now[0] += owner.SILENCE_S + 1
    assert watch.owner() is None
    os.utime(tmp_path / owner.NAME, (2, 2))
    assert watch.owner() == far


NUMBER = json.dumps(asdict(mine()) | {"host": 7, "started": 7})


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"host": 1}', "[" * 100_000, NUMBER],
    ids=["empty", "cut", "a list", "no process", "deep", "numbers for names"],
)
def test_a_damaged_mark_binds_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / owner.NAME).write_text(content)
    with Owner(tmp_path) as now:
        assert now.holds()


def test_of_many_that_find_a_dead_owner_one_gets_the_folder(tmp_path: Path) -> None:
    leave(tmp_path, replace(mine(), started="1"))
    gate, done = threading.Barrier(8), threading.Event()
    got: list[bool] = []

    def claim() -> None:
        gate.wait()
        try:
            with Owner(tmp_path) as now:
                got.append(now.holds())
                done.wait()
        except OwnedError:
            got.append(False)
        if len(got) == 8:
            done.set()

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(got) < 8:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert got.count(True) == 1


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with Owner(tmp_path), pytest.raises(OwnedError), Owner(tmp_path):
        pass
