"""The benchmark of the index measures what it says, on a folder of a few hundred files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import index
from bench.index import FOLDERS, main, write_folder
from fastmoco.data.header import image_size


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
    where = {"dirty": False, "date": "today"}
    monkeypatch.setattr("bench.case.environment", lambda device: where)
    monkeypatch.setenv("FASTMOCO_CACHE", "")  # restored afterwards: the benchmark sets its own
    files = FOLDERS + 7
    assert (
        main(["--files", str(files), "--rounds", "1", "--place", str(tmp_path), "--publish"]) == 0
    )
    found = {row["contender"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert [path.name for path in tmp_path.iterdir()] == ["index.jsonl"]  # nothing is left
    assert len(found) == 4
    cached, first = found["start on the cached index"], found["first start"]
    assert cached["case"] == {"files": files, "folders": FOLDERS}
    assert cached["p50"] < first["p50"]
    assert cached["index_bytes"] == first["index_bytes"] > 30 * files
