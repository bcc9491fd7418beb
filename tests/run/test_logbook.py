"""The record of a run that is killed, resumed, and cannot always write."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from fastmoco.run.logbook import Board, Logbook
from fastmoco.run.record import Record, read_records
from fastmoco.weights import files


def log(folder: Path, steps: list[int], done: int = 0) -> None:
    """A life of a run from `done` that records these steps, and is killed."""
    book = Logbook(folder, enabled=True, done=done, total=100)
    for step in steps:
        book.record(Record("train", {"loss": float(step)}, step), "")


def steps_in(folder: Path) -> list[int]:
    return [record.step for record in read_records(folder / "metrics.jsonl")]


def board(folder: Path, name: str = "loss") -> list[int]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


def test_every_step_once_after_two_kills(tmp_path: Path) -> None:
    log(tmp_path, [2, 4, 6])  # killed before its first checkpoint
    log(tmp_path, [2, 4, 6, 8, 10])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while it wrote
    log(tmp_path, [8, 10, 12], done=6)
    assert steps_in(tmp_path) == [2, 4, 6, 8, 10, 12]
    assert board(tmp_path) == [2, 4, 6, 8, 10, 12]


def test_only_what_was_dropped_is_lacking(tmp_path: Path) -> None:
    log(tmp_path, [2, 4])
    book = Logbook(tmp_path, enabled=True, done=2, total=9)
    assert not book.lacks("train", 2)
    assert book.lacks("train", 4)
    assert book.lacks("knn", 2)
    assert not Logbook(tmp_path, enabled=False, done=2, total=9).lacks("knn", 2)


def test_what_cannot_be_written_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    book = Logbook(tmp_path, enabled=True, done=0, total=9)
    book.record(Record("train", {"loss": 1.0}, 1), "")

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for step in (2, 3):
            book.record(Record("train", {"loss": 1.0}, step), "")
        assert steps_in(tmp_path) == [1]  # nothing half written
    book.record(Record("train", {"loss": 1.0}, 4), "")
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert board(tmp_path) == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_a_record_that_only_metrics_had_when_the_run_was_killed_is_on_the_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = Logbook(tmp_path, enabled=True, done=0, total=9)
    book.record(Record("train", {"loss": 1.0}, 6), "")
    with monkeypatch.context() as killed:
        killed.setattr(Board, "add", lambda *_: None)
        book.record(Record("knn", {"knn_top1": 0.5}, 6), "")
    with Logbook(tmp_path, enabled=True, done=6, total=6):
        pass
    assert board(tmp_path, "knn_top1") == [6]
    assert board(tmp_path) == [6]


def test_half_a_record_does_not_hide_the_next_on_the_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book, append = Logbook(tmp_path, enabled=True, done=0, total=9), files.append

    def torn(path: Path, data: bytes) -> NoReturn:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "EIO")))
            append(path, data[: len(data) // 2])
        raise AssertionError

    for step in (2, 4, 6):
        if step == 4:
            monkeypatch.setattr(files, "append", torn)
        book.record(Record("train", {"loss": 1.0}, step), "")
        monkeypatch.setattr(files, "append", append)
    assert board(tmp_path) == [2, 4, 6]


def test_records_are_on_the_disk_when_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: dict[int, int] = {}
    sync = os.fsync

    def noted(file: int) -> None:
        sync(file)
        flushed[os.fstat(file).st_ino] = os.fstat(file).st_size

    monkeypatch.setattr(os, "fsync", noted)
    log(tmp_path, [2, 4])
    found = [path.stat() for path in tmp_path.iterdir()]
    assert len(found) == 2
    assert {file.st_ino: file.st_size for file in found} == flushed
