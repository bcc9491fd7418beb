"""The list of replaced samples: one line for each, over restarts, ranks and full disks."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from fastmoco.config import Config, DataConfig, RunConfig
from fastmoco.data import bad_samples
from fastmoco.data.bad_samples import BadSamples
from tests.support.tiny import ONE


def record(folder: Path, rank: int = 0, found: dict[int, str] | None = None) -> BadSamples:
    """What one start on one rank knows: samples that indexing found."""
    config = Config(run=RunConfig(dir=str(folder)), data=replace(DataConfig(), max_bad_share=1.0))
    source: Any = SimpleNamespace(bad=found or {}, sizes=range(9), name=lambda n: f"{n}.jpg")
    return BadSamples(config, source, rank)


def listed(folder: Path) -> list[int]:
    rows = (folder / "bad_samples.jsonl").read_text().splitlines()
    return [json.loads(row)["sample"] for row in rows if row.endswith("}")]


def test_a_restart_and_another_rank_add_no_second_line(tmp_path: Path) -> None:
    record(tmp_path, found={3: "cut short"}).add({5: "empty"}, write=True)
    again = record(tmp_path, found={3: "cut short"})
    again.add({5: "empty", 6: "empty"}, write=True)
    record(tmp_path, rank=1).add({6: "empty"}, write=True)
    assert listed(tmp_path) == [3, 5, 6]


def test_a_line_is_on_the_disk_when_the_sample_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_size))
    record(tmp_path, found={3: "cut short"})
    assert flushed == [(tmp_path / "bad_samples.jsonl").stat().st_size]


def test_half_a_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "bad_samples.jsonl").write_text('{"sample": 3, "na')
    record(tmp_path, found={3: "cut short"})
    assert listed(tmp_path) == [3]


@pytest.mark.parametrize("row", ["[]", '{"sample": []}', '{"sample": {}, "name": 1}', "[" * 99_999])
def test_foreign_lines_are_passed_over(tmp_path: Path, row: str) -> None:
    (tmp_path / "bad_samples.jsonl").write_text(row + "\n")
    record(tmp_path, found={3: "cut short"})
    assert '"sample": 3' in (tmp_path / "bad_samples.jsonl").read_text().splitlines()[-1]


def test_a_full_disk_ends_no_run_and_nothing_is_left_out_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    samples = record(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(bad_samples, "open", full, raising=False)
        samples.add({3: "cut short"}, write=True)
        assert samples.exchange(ONE) == ""
    assert samples.reasons == {3: "cut short"}
    assert samples.exchange(ONE) == ""
    assert listed(tmp_path) == [3]
    samples.add({4: "empty"}, write=True)
    assert listed(tmp_path) == [3, 4]
