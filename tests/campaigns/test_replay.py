"""The disk after a power loss, by hand: what was not flushed is gone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.campaigns.replay import Disk, Operation

DATA = b"newer"


def on(folder: Path, *steps: tuple[str, int, str, str]) -> list[Operation]:
    """Operations on files 1, 2, ...; a write has all of `DATA`. 0 is the folder."""
    made = []
    for what, file, one, other in steps:
        size = len(DATA) if what == "write" else 0
        names = [str(folder / name) if name else "" for name in (one, other)]
        made.append(Operation(what, file, 0, size, 0, names[0] or str(folder), names[1]))
    return made


WRITTEN = [("create", 1, "part", ""), ("write", 1, "", "")]
FLUSHED = [*WRITTEN, ("fsync", 1, "part", "")]
RENAMED = ("rename", 0, "part", "file")
FOLDER = ("fsync", 0, "", "")


@pytest.mark.parametrize(
    ("steps", "how", "left"),
    [
        (WRITTEN, "nothing", {"file": b"old"}),
        (WRITTEN, "names", {"file": b"old", "part": bytes(5)}),
        ([*WRITTEN, RENAMED, FOLDER], "nothing", {"file": b""}),
        ([*FLUSHED, RENAMED], "nothing", {"file": b"old"}),
        ([*FLUSHED, RENAMED], "names", {"file": DATA}),
        ([*FLUSHED, RENAMED, FOLDER], "nothing", {"file": DATA}),
        ([("unlink", 0, "file", "")], "nothing", {"file": b"old"}),
        ([("unlink", 0, "file", ""), FOLDER], "nothing", {}),
    ],
)
def test_only_what_was_flushed_is_left(
    tmp_path: Path, steps: list[tuple[str, int, str, str]], how: str, left: dict[str, bytes]
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    disk = Disk(tmp_path)
    for operation in on(tmp_path, *steps):
        disk.apply(operation, DATA)
    disk.lose_power(how, random.Random(0))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left
