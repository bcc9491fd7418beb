"""The download helper on stand-ins for torchvision's data sets: CI has no internet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.data.download import prepare
from fastmoco.data.sources.folder import open_folder


class Fake(list[Any]):
    """Six tiny pictures of two classes, and unlabelled ones where asked for."""

    classes = ("cat", "dog")

    def __init__(self, root: Path, train: bool = True, split: str = "", download: bool = False):
        assert download
        assert root.is_dir()
        rng = np.random.default_rng(0)
        labels = [0, 1, 0, 1, 0, 1] + ([-1, -1] if "unlabeled" in split else [])
        pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in labels]
        super().__init__(zip(pictures, labels, strict=True))


def fake_imagenette(root: Path, split: str, size: str, download: bool) -> None:
    for part in ("train", "val"):
        folder = root / "imagenette2-320" / part / "n01"
        folder.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "a.JPEG")


FAKES = SimpleNamespace(CIFAR10=Fake, STL10=Fake, Imagenette=fake_imagenette)


@pytest.mark.parametrize(("name", "train"), [("cifar10", 6), ("stl10", 8), ("imagenette", 1)])
def test_layout(tmp_path: Path, name: str, train: int) -> None:
    out = prepare(name, tmp_path / "new" / name, FAKES)
    assert len(open_folder(str(out / "train"), 10**6).sizes) == train
    assert (out / "test").is_dir()
    assert [path.name for path in out.parent.iterdir()] == [name]  # nothing else left behind
    if name == "cifar10":
        first = np.asarray(Image.open(out / "train" / "cat" / "000000.png"))
        assert np.array_equal(first, np.asarray(Fake(tmp_path, download=True)[0][0]))


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no\nnetwork")

    with pytest.raises(ConfigError, match=r"could not be downloaded.*no network"):
        prepare("cifar10", tmp_path / "out", SimpleNamespace(CIFAR10=broken))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        prepare("cifar10", tmp_path / "there", FAKES)
