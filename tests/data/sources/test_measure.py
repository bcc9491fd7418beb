"""Scanning a folder: what is listed and in which order, what is noticed later, who works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.data.decode import BadImage, image_size
from fastmoco.data.sources import folder as folders
from fastmoco.data.sources import listing, measure
from fastmoco.data.sources.folder import open_folder
from fastmoco.machine import host
from tests.support.runs.sessions import all_ended, members

LIMIT = 10**8


def picture(photos: Path) -> bytes:
    return next(photos.rglob("*.jpg")).read_bytes()


def test_walk_lists_what_os_walk_does_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.jpeg", "a/x/3.png", "a/4.webp", "5.tif", "a/y/z/6.gif", "c/n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in (".hidden/1.jpg", "lost+found/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "b" / "dangling.jpg")
    found = list(listing.walk(str(tmp_path)))
    assert [(folder, names) for folder, _, names in found] == [
        ("", ["5.tif"]),
        ("a", ["4.webp"]),
        ("a/x", ["3.png"]),
        ("a/y", []),
        ("a/y/z", ["6.gif"]),
        ("b", ["1.jpeg", "2.JPG", "dangling.jpg"]),
        ("c", []),
    ]
    for folder, changed, _ in found:
        assert changed == (tmp_path / folder).stat().st_mtime_ns


def test_a_file_added_right_after_the_listing_is_noticed(photos: Path, tmp_path: Path) -> None:
    """Else two changes in one tick of the kernel's clock would stamp the folder alike."""
    (tmp_path / "first.jpg").write_bytes(picture(photos))
    for _, changed, _ in listing.walk(str(tmp_path)):
        assert time.time_ns() - changed > 10_000_000  # the longest tick of a Linux kernel
    assert len(open_folder(str(tmp_path), LIMIT).sizes) == 1
    (tmp_path / "second.jpg").write_bytes(picture(photos))
    assert len(open_folder(str(tmp_path), LIMIT).sizes) == 2


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_size_that_stands_far_behind_the_start_is_found(tmp_path: Path, kind: str) -> None:
    """Behind a colour profile of 200 KB, and in a TIFF behind the pixels: 64 KiB do not suffice."""
    options: dict[str, Any] = {"icc_profile": bytes(200_000)} if kind == "JPEG" else {}
    options = options or {"compression": "tiff_lzw"}
    noise = np.random.default_rng(0).integers(0, 256, (190, 210, 3), np.uint8)
    path = tmp_path / f"1.{kind.lower()}"
    Image.fromarray(noise).save(path, kind, **options)
    with pytest.raises(BadImage):
        image_size(path.read_bytes()[: measure.HEAD], LIMIT)
    assert measure.probe_file(str(path), LIMIT) == (210, 190, "")


def test_a_folder_that_cannot_be_listed_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "1.jpg").write_bytes(picture(photos))
    shut = tmp_path / "shut"
    shut.mkdir()
    listed = os.scandir

    def refusing(place: str) -> object:
        if place == str(shut):
            raise OSError(5, "Input/output error", place)
        return listed(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ConfigError, match=r"shut cannot be listed: Input/output error") as caught:
        open_folder(str(tmp_path), LIMIT)
    assert "\n" not in str(caught.value)


def test_an_error_that_is_about_no_folder_is_not_called_one(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1.jpg").write_bytes(picture(photos))

    def no_process(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(folders, "measure", no_process)
    with pytest.raises(BlockingIOError):
        open_folder(str(tmp_path), LIMIT)


def test_a_failure_drops_the_work_that_nobody_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "machine_cores", lambda: 2)
    begun = 0

    def probe(paths: Sequence[str]) -> list[measure.Found]:
        nonlocal begun
        begun += 1
        time.sleep(0.05)
        raise ValueError("the first chunk fails while others wait")

    with pytest.raises(ValueError, match="first chunk"):
        measure.measure(probe, ["x"] * (100 * measure.CHUNK), 1)
    assert begun <= 20  # of the 64 that were handed out


def test_a_scan_uses_the_cores_of_the_container_and_of_every_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "affinity", lambda: list(range(64)))
    monkeypatch.setattr(host, "_quota", lambda cgroup: 8.0)
    for ranks in ("1", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        with measure.in_parallel(many=False) as pool:
            assert pool._max_workers == 8  # type: ignore[attr-defined]


def test_work_is_taken_when_its_turn_comes_and_returned_in_order() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 500:
            taken += 1
            yield taken

    with ThreadPoolExecutor(4) as pool:
        for number, result in enumerate(measure.in_order(pool, lambda x: x * x, items()), start=1):
            assert result == number * number
            assert taken < number + 70
    assert taken == 500


def test_progress_counts_images_on_a_terminal_and_is_silent_in_a_short_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [[0] * 512, [0] * 512, [0] * 100]
    assert list(measure.progress(parts, len, "index", 1124)) == parts
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(measure.progress(parts, len, "index", 1124))
    assert "1.12k/1.12k" in capsys.readouterr().err


SLOW = """
import time
from fastmoco.data.sources import measure as scan

def probe(paths):
    return [(1, 1, "")] * len(paths)

def paths():  # so slowly that the processes wait for work most of the time
    for number in range(1_000_000):
        time.sleep(0.001)
        if number == 4 * scan.CHUNK:
            print("begin", flush=True)
        yield "x"

if __name__ == "__main__":
    scan.measure(probe, paths(), 1_000_000)
"""


BUSY = """
import time
from fastmoco.data.sources import measure as scan

def probe(paths):
    print("begin", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    scan.measure(probe, ["x"] * 1_000_000, 1_000_000)
"""


HALF = """
import os, signal, sys, time
from multiprocessing.connection import Connection
from fastmoco.config import ConfigError
from fastmoco.data.sources import measure as scan

def half(connection, data):
    print("begin", flush=True)
    os.write(connection.fileno(), bytes(data)[:len(data) // 2])
    {then}

def work(number):
    if number == 3:  # the others have results of their own to send
        Connection._send = half
    return bytes(20_000)

if __name__ == "__main__":
    try:
        with scan.in_parallel(many=True, workers=2) as pool:
            for _ in scan.in_order(pool, work, range(1000)):
                pass
    except ConfigError as error:
        sys.exit(str(error))
"""


def test_a_process_that_dies_as_it_sends_a_result_ends_the_work(tmp_path: Path) -> None:
    """A message of which no more comes, and a lock that its sender held."""
    program = tmp_path / "program.py"
    program.write_text(HALF.format(then="os.kill(os.getpid(), signal.SIGKILL)"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    found = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert (found.returncode, found.stderr) == (1, measure.DIED + "\n")


def test_processes_may_be_seen_to_end_after_their_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = measure._end_together
    shut, watched = threading.Event(), threading.Event()
    faults = []

    def late(*given: Any) -> None:
        shut.wait()
        try:
            watch(*given)
        except BaseException as fault:
            faults.append(fault)
        watched.set()

    monkeypatch.setattr(measure, "_end_together", late)
    with pytest.raises(KeyboardInterrupt), measure.in_parallel(many=True, workers=1):
        raise KeyboardInterrupt
    shut.set()
    assert watched.wait(60)
    assert not faults


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("code", [SLOW, BUSY, HALF.format(then="time.sleep(600)")])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_processes_of_a_scan_end_with_it(tmp_path: Path, code: str, how: int) -> None:
    """Waiting for work, or in the middle of some; after Ctrl-C, and where it is killed."""
    program = tmp_path / "program.py"
    program.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "begin\n"
        # Ctrl-C reaches the whole group.
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
        assert all_ended(process.pid, 60)
        _, errors = process.communicate()
        assert process.returncode == -how
        assert errors.count("Traceback") <= 1, errors
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)
