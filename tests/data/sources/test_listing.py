"""What counts as an image, alike for training and class folders; what does not is said."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config import Config, ConfigError, DataConfig, OptimConfig, RunConfig
from fastmoco.data.loader import build_loader
from fastmoco.data.sources.folder import open_folder
from fastmoco.data.sources.listing import Passed, is_hidden_path, read_file, suffix_of, walk
from fastmoco.evaluate.labelled_images import LabelledImages, index_class_folders

LIMIT = 10**8
FORMATS = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp"}


def save(path: Path, form: str = "JPEG", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path, form)
    return path


def names(root: Path, **options: bool) -> list[str]:
    source = open_folder(str(root), LIMIT, **options)
    return [os.path.relpath(source.name(i), root) for i in range(len(source.sizes))]


LEFT_BEHIND = [
    *("a/._1.jpg", "a/.hidden.jpg", ".cache/1.jpg", "__MACOSX/a/._1.jpg", "__MACOSX/1.jpg"),
    *("a/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "@eaDir/1.jpg", "#recycle/1.jpg", "lost+found/1.jpg"),
]


def test_what_systems_leave_behind_never_counts(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/2.jpg", *LEFT_BEHIND):
        save(tmp_path / name)
    for name in ("a/.DS_Store", "b/Thumbs.db", "a/desktop.ini"):
        save(tmp_path / name)  # even where the content is a picture
    for any_name in (False, True):
        assert names(tmp_path, any_name=any_name) == ["a/1.jpg", "b/2.jpg"]
        assert open_folder(str(tmp_path), LIMIT, any_name=any_name).notes == []
        paths, labels, classes = index_class_folders(tmp_path, any_name=any_name)
        assert [path.relative_to(tmp_path) for path in paths] == [Path("a/1.jpg"), Path("b/2.jpg")]
        assert (labels, classes) == ([0, 1], ["a", "b"])
    assert all(is_hidden_path(name) for name in LEFT_BEHIND)
    assert not any(is_hidden_path(name) for name in ("./a/1.jpg", "../1.jpg", "/a//1.jpg"))


def test_missing_and_wrong_suffixes_are_counted_or_found_by_content(tmp_path: Path) -> None:
    for number, form in enumerate(FORMATS):
        save(tmp_path / "a" / f"{number}f8c0ffee", form, number)
        save(tmp_path / "b" / f"{number}.{FORMATS[form]}", "PNG", number)  # a wrong suffix
        save(tmp_path / "b" / f"{number}.wrong", form, number)
    save(tmp_path / "b" / "6.jfif")
    save(tmp_path / "b" / "7.avif", "AVIF")
    (tmp_path / "b" / "note.txt").write_text("BMW and P5 are no pictures")
    (tmp_path / "a" / "0empty").touch()
    by_name = [f"b/{n}.{suffix}" for n, suffix in enumerate([*FORMATS.values(), "jfif", "avif"])]
    assert names(tmp_path) == by_name
    source = open_folder(str(tmp_path), LIMIT)
    assert source.notes == ["not counted as images: 7 none, 6 .wrong, 1 .txt"]
    assert not source.bad
    by_content = sorted(
        [*(f"a/{n}f8c0ffee" for n in range(6)), *(f"b/{n}.wrong" for n in range(6)), *by_name]
    )
    found = open_folder(str(tmp_path), LIMIT, any_name=True)
    assert names(tmp_path, any_name=True) == by_content
    assert found.notes == ["not counted as images: 1 none, 1 .txt"]
    assert not found.bad
    for sample, name in enumerate(by_content):  # names, sizes and folders still belong together
        assert found.read(sample) == (tmp_path / name).read_bytes()
        assert tuple(found.sizes[sample]) == (16, 12)
    assert found.shard_sizes.tolist() == [0, 6, 14]
    paths, _, _ = index_class_folders(tmp_path, any_name=True)
    assert [str(path.relative_to(tmp_path)) for path in paths] == by_content


def test_arrays_beside_pictures_are_their_masks(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/1.npy", "a/2.NPY", "b/1.npy", "b/2.npy"):
        save(tmp_path / name)
    for any_name in (False, True):
        assert names(tmp_path, any_name=any_name) == ["a/1.jpg", "b/1.npy", "b/2.npy"]
        paths, _, _ = index_class_folders(tmp_path, any_name=any_name)
        assert [path.name for path in paths] == ["1.jpg", "1.npy", "2.npy"]
        (note,) = open_folder(str(tmp_path), LIMIT, any_name=any_name).notes
        assert note == "not counted as images: 2 .npy beside other pictures"


def test_a_folder_without_a_known_suffix_says_what_it_holds_and_what_to_do(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"{number:032x}")
    (tmp_path / "list.txt").touch()
    with pytest.raises(ConfigError, match=r"3 none, 1 \.txt\); data\.any_name true counts"):
        open_folder(str(tmp_path), LIMIT)
    assert len(open_folder(str(tmp_path), LIMIT, any_name=True).sizes) == 3


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *(("a.JPG", ".jpg"), ("a.b/c", "none"), ("a.tar.gz", ".gz"), ("a.jp2", ".jp2")),
        *(("IMG 2019.05.17 holiday", "none"), ("0.3fa94cd1e0", "none"), ("x.7z", ".7z")),
    ],
)
def test_suffixes(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix


@pytest.mark.timeout(60)  # what is read by mistake waits for ever
def test_what_is_no_regular_file_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a" / "1.jpg")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    os.symlink("/dev/zero", tmp_path / "a" / "zero.jpg")
    os.symlink("circle.jpg", tmp_path / "a" / "circle.jpg")
    os.symlink("circle", tmp_path / "a" / "circle")
    os.symlink(tmp_path, tmp_path / "a" / "again")
    (tmp_path / "a" / "folder.jpg").mkdir()
    (tmp_path / "a" / "empty.jpg").touch()
    monkeypatch.chdir(tmp_path / "a")  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
    with open(tmp_path / "a" / "sparse.jpg", "wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        file.truncate(1 << 40)  # more than any memory
    assert names(tmp_path) == ["a/1.jpg", "a/circle.jpg", "a/empty.jpg", "a/sparse.jpg"]
    source = open_folder(str(tmp_path), LIMIT)
    assert {n: why.partition(":")[0] for n, why in source.bad.items()} == {
        1: "OSError",
        2: "empty file",
        3: "OSError",
    }
    assert "symbolic links" in source.bad[1]
    assert "sparse" in source.bad[3]
    told = " ".join(source.warnings)
    assert "3 names are no regular files and are left out" in told
    for part in ("pipe.jpg (a FIFO)", "zero.jpg (a device)", "socket.jpg (a socket)"):
        assert part in told
    assert f"1 links lead nowhere: {tmp_path / 'a' / 'circle'}" in told
    images = LabelledImages(tmp_path, resize=8, image_size=8)
    images.load(0, len(images))
    assert [images.paths[i].name for i in images.bad] == ["circle.jpg", "empty.jpg", "sparse.jpg"]
    assert images.warnings == source.warnings
    for name in ("pipe.jpg", "zero.jpg", "folder.jpg", "sparse.jpg"):
        with pytest.raises(OSError):  # noqa: PT011
            read_file(str(tmp_path / "a" / name))


def test_a_folder_without_permission_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is simulated, since root may list everything."""
    for name in ("a/1.jpg", "shut/2.jpg", "shut/deep/3.jpg", "z/4.jpg"):
        save(tmp_path / name)
    listed = os.scandir

    def refusing(place: str | int) -> object:  # a number: pytest deletes the folder
        if isinstance(place, str) and Path(place).name == "shut":
            raise PermissionError(13, "Permission denied", place)
        return listed(place)

    monkeypatch.setattr(os, "scandir", refusing)
    passed = Passed()
    assert [folder for folder, _, _ in walk(str(tmp_path), passed)] == ["", "a", "z"]
    assert passed.shut == [str(tmp_path / "shut")]
    source = open_folder(str(tmp_path), LIMIT)
    assert source.warnings == [
        f"1 folders may not be listed and are left out: {tmp_path / 'shut'}."
    ]
    passed = Passed()
    paths, labels, classes = index_class_folders(tmp_path, passed=passed)
    assert ([path.name for path in paths], labels) == (["1.jpg", "4.jpg"], [0, 2])
    assert (classes, passed.shut) == (["a", "shut", "z"], [str(tmp_path / "shut")])
    with pytest.raises(ConfigError, match="shut cannot be listed: Permission denied"):
        open_folder(str(tmp_path / "shut"), LIMIT)


def test_the_loader_passes_on_what_was_left_out(tmp_path: Path) -> None:
    for number in range(8):
        save(tmp_path / "images" / f"{number}.jpg")
    (tmp_path / "images" / "8.jpg").touch()
    (tmp_path / "images" / "9.pdf").touch()
    os.mkfifo(tmp_path / "images" / "pipe")
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run")),
        data=DataConfig(root=str(tmp_path / "images"), workers=1, max_bad_share=0.5),
        optim=OptimConfig(global_batch_size=4),
    )
    with build_loader(config, device=torch.device("cpu")) as loader:
        assert loader.notes == ["not counted as images: 1 .pdf"]
        assert "1 names are no regular files" in loader.warnings[0]
        assert loader.warnings[1].startswith("1 of 9 images cannot be used")
        assert "8.jpg (empty file)" in loader.warnings[1]
