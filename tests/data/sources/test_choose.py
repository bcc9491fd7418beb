"""Which folders are training images, bank and test set; a class called train is a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fastmoco.config import Config, ConfigError, DataConfig, KnnConfig
from fastmoco.data.sources.choose import recognized, resolve_folders, shared_images


def resolved(root: Path, folders: Sequence[str], *, every: int = 0, test_root: str = "") -> Config:
    for name in folders:
        (root / name).mkdir(parents=True, exist_ok=True)
    knn = KnnConfig(every=every, test_root=test_root)
    return resolve_folders(Config(data=DataConfig(root=str(root)), knn=knn))


@pytest.mark.parametrize(
    ("folders", "train", "test"),
    [
        (("train", "val"), "train", "val"),
        (("Train", "Test"), "Train", "Test"),
        (("TRAIN", "VALID"), "TRAIN", "VALID"),
        (("training", "validation"), "training", "validation"),
        (("training", "testing", "other"), "training", "testing"),
        (("train", "val", "test"), "train", "test"),
    ],
)
def test_splits_are_recognized_by_their_neighbours(
    tmp_path: Path, folders: Sequence[str], train: str, test: str
) -> None:
    config = resolved(tmp_path, folders, every=1)
    assert config.data.root == config.knn.train_root == str(tmp_path / train)
    assert config.knn.test_root == str(tmp_path / test)
    told = recognized(config)
    assert told[0].startswith(f"{train}/ is the split to train on, beside {test}/")
    assert told[1] == f"kNN bank {tmp_path / train}, test {tmp_path / test}"
    assert shared_images(config) == []
    assert resolved(tmp_path, folders).data.root == str(tmp_path / train)  # without kNN too
    named = resolved(tmp_path / train, (), every=1)  # the split itself
    assert (named.data.root, named.knn.test_root) == (config.data.root, config.knn.test_root)


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    config = resolved(tmp_path, ("bicycle", "bus", "train", "truck"))
    assert config.data.root == str(tmp_path)
    assert recognized(config) == ["train/ counts as a class, as no test or val folder is beside it"]
    with pytest.raises(ConfigError, match="neither a test nor a val folder"):
        resolved(tmp_path, (), every=1)


def test_a_link_in_a_circle_is_no_split(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    config = resolved(tmp_path / "circle", (), every=1, test_root=str(tmp_path / "circle"))
    assert config.data.root == str(tmp_path / "circle")
    assert len(shared_images(config)) == 1


def test_a_folder_is_a_split_beside_a_test_set_of_any_name(tmp_path: Path) -> None:
    config = resolved(tmp_path, ("train", "held"), every=1, test_root=str(tmp_path / "held"))
    assert config.data.root == str(tmp_path / "train")
    elsewhere = resolved(tmp_path, (), every=1, test_root=str(tmp_path / "held" / "deep"))
    assert elsewhere.data.root == str(tmp_path)


def test_files_and_two_training_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train").touch()  # a file is no split
    assert resolved(tmp_path / "a", ("test",)).data.root == str(tmp_path / "a")
    with pytest.raises(ConfigError, match="holds Train and training: name the training images"):
        resolved(tmp_path / "b", ("Train", "training", "val"))


def test_testing_on_training_images_is_said(tmp_path: Path) -> None:
    config = resolved(tmp_path, ("cat", "dog", "test"), every=1)
    assert config.knn.test_root == str(tmp_path / "test")
    assert "are trained on as well" in shared_images(config)[0]
