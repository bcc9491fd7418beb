"""In which order a whole file reaches the disk, and what is left where it does not."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fastmoco.machine import durable


def put(partial: Path) -> None:
    partial.write_text("new")


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be opened there")
def test_the_data_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    rename = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_ino))

    def renamed(*names: str) -> None:
        done.append("rename")
        rename(*names)

    monkeypatch.setattr(os, "replace", renamed)
    durable.replace(tmp_path / "file", put)
    written = (tmp_path / "file").stat().st_ino
    assert done == [written, "rename", tmp_path.stat().st_ino]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    (tmp_path / "file").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(OSError, match="Input/output"):
        durable.replace(tmp_path / "file", put)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names there")
def test_reading_waits_for_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "file").write_bytes(b"text")
    for name in ("pipe", "endless", "."):
        with pytest.raises(OSError, match=r"regular|directory"):
            durable.read_regular(tmp_path / name)
    assert durable.read_regular(tmp_path / "file") == b"text"


@pytest.mark.parametrize("name", ["none/a.txt", "folder", "file/a.txt"])
def test_what_could_not_be_written_is_said_before(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match=f"{name}'$"):
        durable.require_writable(tmp_path / name)
    durable.require_writable(tmp_path / "file")
    durable.require_writable(tmp_path / "new")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
