"""The cached index: what was bad, lost or shut is looked at again; folder times may lie."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmoco.config import ConfigError, parse
from fastmoco.data.pixels.rule import RGB8
from fastmoco.data.sources import folder as folder_module
from fastmoco.data.sources import index as index_module
from fastmoco.data.sources import listing
from fastmoco.data.sources.choose import open_source
from fastmoco.data.sources.folder import FolderSource, open_folder, with_stamps
from fastmoco.data.sources.image_list import open_list
from fastmoco.data.sources.index import Index, load_index, save_index
from fastmoco.data.sources.source import Source
from fastmoco.data.sources.verify import verify
from fastmoco.run.directory import resolved

LIMIT = 10**8


@pytest.fixture
def jpeg(photos: Path) -> bytes:
    return sorted(photos.rglob("*.jpg"))[0].read_bytes()


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The roots of all scans of folders."""
    seen: list[str] = []
    scan = folder_module.scan_folder

    def counted(root: str, max_pixels: int, **options: object) -> object:
        seen.append(root)
        return scan(root, max_pixels, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(folder_module, "scan_folder", counted)
    return seen


def names(source: FolderSource) -> list[str]:
    return [os.path.basename(source.name(i)) for i in range(len(source.sizes))]


def test_a_file_repaired_in_place_is_good_without_a_scan(
    tmp_path: Path, jpeg: bytes, scans: list[str]
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(5):
        (root / f"{number}.jpg").write_bytes(b"" if number in (1, 3) else jpeg)
    before = open_folder(str(root), LIMIT)
    assert before.bad == {1: "empty file", 3: "empty file"}
    (root / "3.jpg").write_bytes(jpeg)
    after = open_folder(str(root), LIMIT)
    assert after.bad == {1: "empty file"}
    assert after.sizes[3].tolist() == after.sizes[0].tolist() != [0, 0]
    (root / "1.jpg").write_bytes(b"still no picture")
    assert open_folder(str(root), LIMIT).bad == {1: "not an image: starts with b'still no'"}
    (root / "1.jpg").write_bytes(jpeg)
    assert open_folder(str(root), LIMIT).bad == {}
    assert open_folder(str(root), LIMIT).fingerprint() != before.fingerprint()
    assert len(scans) == 1


def test_verify_decodes_repaired_files_again(
    tmp_path: Path, jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(4):
        (root / f"{number}.jpg").write_bytes(jpeg[: len(jpeg) // 2] if number < 2 else jpeg)
    assert sorted(verify(open_folder(str(root), LIMIT), RGB8)) == [0, 1]
    (root / "0.jpg").write_bytes(jpeg)
    source: Source = open_folder(str(root), LIMIT)
    assert not source.bad  # headers never showed it
    assert sorted(verify(source, RGB8)) == [1]
    from fastmoco.data.sources import verify as module

    monkeypatch.setattr(module, "decode_sample", lambda *_: pytest.fail("decodes again"))
    assert sorted(verify(source, RGB8)) == [1]


def test_a_disk_that_is_mounted_later_is_found(
    tmp_path: Path, jpeg: bytes, scans: list[str]
) -> None:
    disk, root = tmp_path / "disk", tmp_path / "root"
    root.mkdir()
    os.symlink(disk / "photos", root / "photos")
    os.symlink(disk / "photos" / "1.jpg", root / "one.jpg")
    listed = tmp_path / "list.txt"
    listed.write_text("disk/photos/1.jpg\ndisk/photos/2.jpg\n")
    with pytest.raises(ConfigError, match="none can be read"):
        open_list(str(listed), LIMIT)
    with pytest.raises(ConfigError, match="none can be read"):
        open_folder(str(root), LIMIT)
    (root / "own.jpg").write_bytes(jpeg)
    source = open_folder(str(root), LIMIT)
    assert (names(source), list(source.bad)) == (["one.jpg", "own.jpg"], [0])
    (disk / "photos").mkdir(parents=True)
    for name in ("1.jpg", "2.jpg"):
        (disk / "photos" / name).write_bytes(jpeg)
    assert not open_list(str(listed), LIMIT).bad
    source = open_folder(str(root), LIMIT)
    assert (names(source), source.bad) == (["one.jpg", "own.jpg", "1.jpg", "2.jpg"], {})


def test_one_missing_entry_of_a_list_is_looked_at_again(tmp_path: Path, jpeg: bytes) -> None:
    (tmp_path / "1.jpg").write_bytes(jpeg)
    listed = tmp_path / "list.txt"
    listed.write_text("1.jpg\n2.jpg\n3.jpg\n")
    assert sorted(open_list(str(listed), LIMIT).bad) == [1, 2]
    (tmp_path / "2.jpg").write_bytes(jpeg)
    missing = "line 3: FileNotFoundError: No such file or directory"
    assert open_list(str(listed), LIMIT).bad == {2: missing}


def test_a_folder_that_may_be_listed_later_is_found(
    tmp_path: Path, jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is simulated, since root may list everything."""
    for name in ("a/1.jpg", "shut/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(jpeg)
    listed = os.scandir

    def refusing(place: str) -> object:
        if Path(place).name == "shut":
            raise PermissionError(13, "Permission denied", place)
        return listed(place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        assert names(open_folder(str(tmp_path), LIMIT)) == ["1.jpg"]
    assert names(open_folder(str(tmp_path), LIMIT)) == ["1.jpg", "2.jpg"]


@pytest.mark.parametrize("why", ["zero", "all alike", "bucket"])
def test_folder_times_that_never_change_hide_nothing(
    tmp_path: Path, jpeg: bytes, scans: list[str], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    folders = [tmp_path, tmp_path / "a", tmp_path / "b"]
    stamp = {"zero": 0, "all alike": 1_700_000_000, "bucket": 0}[why]
    if why == "bucket":
        monkeypatch.setattr(listing, "file_system", lambda path: "fuse.gcsfuse")

    def freeze() -> None:
        for number, folder in enumerate(folders):
            time = 1_000_000_000 + number if why == "bucket" else stamp
            os.utime(folder, (time, time))

    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / "1.jpg").write_bytes(jpeg)
    freeze()
    for _ in range(2):
        assert len(open_folder(str(tmp_path), LIMIT).sizes) == 3
    assert len(scans) == 1  # counted, not read
    (folders[2] / "2.jpg").write_bytes(jpeg)
    freeze()
    assert len(open_folder(str(tmp_path), LIMIT).sizes) == 4
    (folders[1] / "1.jpg").unlink()
    freeze()
    assert len(open_folder(str(tmp_path), LIMIT).sizes) == 3
    assert len(scans) == 3


def test_the_file_system_of_this_folder_is_known() -> None:
    assert listing.file_system("/proc/self") == "proc"
    assert listing.file_system("/nowhere/at/all") == listing.file_system("/") != ""


def test_rescan_reads_anew_once_per_start(
    tmp_path: Path, jpeg: bytes, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg)
    open_folder(str(tmp_path), LIMIT)
    monkeypatch.setattr(index_module, "_BEGAN", index_module._BEGAN + 10**6)  # a later process
    open_folder(str(tmp_path), LIMIT)
    assert len(scans) == 1
    open_folder(str(tmp_path), LIMIT, rescan=True)
    assert len(scans) == 2
    monkeypatch.setattr(index_module, "_BEGAN", 0.0)  # another rank has just made one
    open_folder(str(tmp_path), LIMIT, rescan=True)
    assert len(scans) == 2


def test_rescan_reads_anew_in_every_run_of_a_process(
    tmp_path: Path, jpeg: bytes, scans: list[str]
) -> None:
    """And once in each, although a run opens its images several times."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg)
    options = ["--run.dir", str(tmp_path / "run"), "--data.root", str(tmp_path / "images")]
    config = parse([*options, "--data.rescan", "true", "--knn.every", "0"])
    for run in (1, 2, 3):
        resolved(config)
        open_source(config)
        assert len(scans) == run


def test_several_folders_by_a_pattern(tmp_path: Path, jpeg: bytes) -> None:
    for name in ("cam0/a/1.jpg", "cam1/2.jpg", "cam2/3.jpg", "other/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(jpeg)
    os.symlink(tmp_path / "cam0" / "a", tmp_path / "cam1" / "again")
    source = open_folder(f"{tmp_path}/cam{{0..2}}", LIMIT)
    expected = [tmp_path / name for name in ("cam0/a/1.jpg", "cam1/2.jpg", "cam2/3.jpg")]
    assert [source.name(i) for i in range(len(source.sizes))] == [str(p) for p in expected]
    assert source.read(2) == jpeg
    assert len(open_folder(f"{tmp_path}/cam[01]", LIMIT).sizes) == 2
    (tmp_path / "cam1" / "5.jpg").write_bytes(jpeg)
    assert len(open_folder(f"{tmp_path}/cam{{0..2}}", LIMIT).sizes) == 4
    with pytest.raises(ConfigError, match="cam3 does not exist"):
        open_folder(f"{tmp_path}/cam{{0..3}}", LIMIT)


def test_no_damaged_index_is_believed(tmp_path: Path) -> None:
    """A bit flipped anywhere but in the padding, every cut, and a hostile head with its sum."""
    arrays: dict[str, Any] = {"sizes": np.arange(6, dtype=np.int32).reshape(3, 2)}
    arrays["none"] = np.zeros(0, np.int64)
    path = tmp_path / "index"
    save_index(Index(arrays, {"bad": {"1": "empty"}}), path)
    whole = path.read_bytes()
    used = [at for at in range(len(whole)) if at < len(whole) - 40 and whole[at]]
    for at in used:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="index"):
            load_index(str(path))
    for size in (0, 5, 60, 200, len(whole) - 50):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"index|mmap"):
            load_index(str(path))
    layouts: list[Any] = [[], {"sizes": ["O", [3, 2], 0]}, {"sizes": ["<i4", [-3], 0]}]
    for layout in [*layouts, {"sizes": None}]:
        head = json.dumps({"facts": {}, "layout": layout, "sums": [0]}).encode()
        magic = whole[: whole.index(b"\n") + 1]
        sums = hashlib.sha256(head).digest() + len(head).to_bytes(8, "little")
        path.write_bytes(magic + sums + head + bytes(200))
        with pytest.raises(ValueError, match=r"index|holds no numbers"):
            load_index(str(path))


def test_a_bad_file_that_changed_during_its_scan_is_looked_at_again(
    tmp_path: Path, jpeg: bytes
) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg)
    (tmp_path / "1.jpg").write_bytes(b"")
    index = open_folder(str(tmp_path), LIMIT).index
    changed = (tmp_path / "1.jpg").stat().st_mtime_ns
    for began, stamp in ((changed + 1, [0, changed]), (changed, [])):
        stamps = with_stamps(str(tmp_path), index, began).facts["stamps"]
        assert list(stamps.values()) == [stamp]
