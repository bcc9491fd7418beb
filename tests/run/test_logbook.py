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
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from fastmoco.machine import durable
from fastmoco.run.logbook import Logbook
from fastmoco.run.record import Record, read_records


@pytest.fixture(autouse=True)
def _first_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second are read by their number as text, where 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


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


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_no_record_is_missing_from_the_board_that_failed_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """Two records have one step: reopened at the second, the board drops the first as well."""
    book, flush = Logbook(tmp_path, enabled=True, done=0, total=9), durable.flush
    records = [Record("train", {"loss": 1.0}, 2), Record("knn", {"knn_top1": 0.5}, 2)]
    records += [Record("train", {"loss": 1.0}, step) for step in (4, 6)]
    for number, record in enumerate(records):

        def failing(path: Path, number: int = number) -> None:
            if number == lost:
                raise OSError(errno.EIO, "Input/output error")
            flush(path)

        with monkeypatch.context() as patched:
            patched.setattr(durable, "flush", failing)
            book.record(record, "")
    book.record(Record("train", {"loss": 1.0}, 8), "")
    assert board(tmp_path) == [2, 4, 6, 8]
    assert board(tmp_path, "knn_top1") == [2]


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
    files = [path.stat() for path in tmp_path.iterdir()]
    assert len(files) == 2
    assert {file.st_ino: file.st_size for file in files} == flushed
