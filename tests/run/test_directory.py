"""A run directory has one owner, from before anything is computed until the end of the run."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image

from fastmoco.config import Config, ConfigError, DataConfig, KnnConfig, RunConfig
from fastmoco.machine.owner import Owner, read_mark
from fastmoco.run.directory import check_run_directory, claimed, resolved


def test_a_folder_in_which_another_run_trains_is_refused(tmp_path: Path) -> None:
    config = Config(run=RunConfig(dir=str(tmp_path)))
    check_run_directory(config)
    with Owner(tmp_path):
        with pytest.raises(ConfigError, match=f"belongs to process {os.getpid()} "):
            check_run_directory(config)
        with pytest.raises(ConfigError, match="belongs to process"), claimed(config, True):
            pass
    check_run_directory(config)


def test_a_run_owns_its_folder_while_it_trains(tmp_path: Path) -> None:
    with claimed(Config(run=RunConfig(dir=str(tmp_path))), True):
        mark = read_mark(tmp_path)
        assert mark is not None
        assert mark.process == os.getpid()
    assert read_mark(tmp_path) is None


def test_what_a_failing_disk_keeps_of_the_first_write_goes_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    config = Config(run=RunConfig(dir=str(tmp_path)))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", fails)
        with pytest.raises(ConfigError, match="cannot be written"):
            check_run_directory(config)
    assert list(tmp_path.iterdir())
    monkeypatch.setattr(os, "getpid", lambda: 1)  # another process
    check_run_directory(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.yaml", "bad_samples.jsonl"])
def test_what_is_no_file_where_a_file_belongs_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} is no regular file"):
        check_run_directory(Config(run=RunConfig(dir=str(tmp_path))))


def test_a_run_does_not_draw_pictures_into_its_training_images(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (9, 8)).save(photos / "one.png")
    inside = tmp_path / "link"
    inside.symlink_to(photos)
    for folder in (photos, photos / "runs", inside / "runs"):
        config = Config(
            run=RunConfig(dir=str(folder)),
            data=DataConfig(root=str(photos)),
            knn=KnnConfig(every=0),
        )
        with pytest.raises(ConfigError, match=r"lies in data\.root .* set run\.dir"):
            resolved(config)
    beside = Config(
        run=RunConfig(dir=f"{photos}-runs"),
        data=DataConfig(root=str(photos)),
        knn=KnnConfig(every=0),
    )
    assert resolved(beside)[1] is not None
