"""The benchmark of the index measures what it says, on a folder of a few hundred files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import index
from bench.index import main, write_folder
from fastmoco.data.decode import image_size


def test_files_are_small_distinct_images(tmp_path: Path) -> None:
    assert write_folder(tmp_path, 3, 5) == 5
    files = [path.read_bytes() for path in sorted(tmp_path.rglob("*.JPEG"))]
    assert len(set(files)) == 5
    assert all(len(data) < 4096 for data in files)
    assert len({image_size(data, 10**6) for data in files}) == 1


def test_rows_of_a_small_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "index.jsonl"
    monkeypatch.setattr(index, "ROWS", rows)
    monkeypatch.setattr(index, "FOLDERS", 20)
    monkeypatch.setattr(index, "BATCH", 8)
    where = {"dirty": False, "date": "today"}
    monkeypatch.setattr("bench.measure.case.environment", lambda device: where)
    monkeypatch.setenv("FASTMOCO_CACHE", "")  # restored afterwards: the benchmark sets its own
    in_new_process = index.in_new_process
    caches: list[Any] = []

    def watched(work: Callable[[str], dict[str, Any]], root: str) -> dict[str, Any]:
        """The first in a process of its own, as all are; what the cache holds before and after."""
        before = indices()
        result = work(root) if caches else in_new_process(work, root)
        caches.append((before, indices()))
        return result

    def indices() -> list[tuple[str, int, int]]:
        every = Path(os.environ["FASTMOCO_CACHE"]).rglob("*")
        files = [f for f in every if f.is_file() and f.suffix != ".lock"]
        return [(f.name, f.stat().st_ino, f.stat().st_mtime_ns) for f in sorted(files)]

    monkeypatch.setattr(index, "in_new_process", watched)
    files = 27
    assert (
        main(["--files", str(files), "--rounds", "1", "--place", str(tmp_path), "--publish"]) == 0
    )
    found = {row["contender"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert [path.name for path in tmp_path.iterdir()] == ["index.jsonl"]  # nothing is left
    assert len(found) == 4
    cached, first = found["start on the cached index"], found["first start"]
    assert cached["case"] == {"files": files, "folders": 20}
    assert cached["index_bytes"] == first["index_bytes"] > 30 * files
    nothing_yet, written = caches[0]
    assert not nothing_yet
    assert written
    assert caches[1] == caches[2] == (written, written)  # used as it is
    assert caches[3][1] != written  # after a file was added
