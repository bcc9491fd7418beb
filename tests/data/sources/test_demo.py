"""The demo set: the same files everywhere, whole or absent; geometry tells classes best."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.data.sources import demo
from fastmoco.data.sources.demo import CLASSES, PALETTES, ensure_demo, palette, render
from fastmoco.evaluate.knn import knn_accuracy


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.jpg"))
    }


def test_same_files_whatever_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PER_CLASS", {"train": 2, "test": 1})
    one = ensure_demo(tmp_path / "one", processes=1)
    ensure_demo(tmp_path / "two", processes=2)
    files = digests(tmp_path / "one")
    assert files == digests(tmp_path / "two")
    assert sorted(p.name for p in one.train.iterdir()) == sorted(CLASSES)
    assert len(files) == len(set(files.values())) == 12 * 3, "a picture occurs twice"
    with Image.open(one.test / "spirals" / "0000.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 96))
        buffer = io.BytesIO()
        Image.fromarray(render("spirals", "test", 0)).save(buffer, "JPEG", quality=92)
        assert buffer.getvalue() == (one.test / "spirals" / "0000.jpg").read_bytes()


def test_size_of_the_full_set() -> None:
    assert len(CLASSES) >= 10
    assert len(CLASSES) * demo.PER_CLASS["train"] >= 4000
    assert len(CLASSES) * demo.PER_CLASS["test"] >= 1000


def test_every_family_has_its_own_habit() -> None:
    assert tuple(demo.HABITS) == CLASSES
    assert len({habit.palette for habit in demo.HABITS.values()}) == len(CLASSES)


def finished(folder: Path, word: str) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        (folder / split / "word").write_text(word)


def test_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderings: list[Path] = []

    def count(folder: Path, _: int) -> None:
        renderings.append(folder)
        finished(folder, "mine")

    monkeypatch.setattr(demo, "_render_all", count)
    first = ensure_demo(tmp_path / "demo")
    assert ensure_demo(tmp_path / "demo") == first
    assert len(renderings) == 1
    assert (first.train / "word").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_the_first_of_two_racing_processes_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(folder: Path, _: int) -> None:
        finished(folder, "mine")
        finished(tmp_path / "demo", "theirs")

    monkeypatch.setattr(demo, "_render_all", overtaken)
    folders = ensure_demo(tmp_path / "demo")
    assert (folders.train / "word").read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_rendering_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path, _: int) -> None:
        (folder / "train").mkdir()
        raise error

    monkeypatch.setattr(demo, "_render_all", broken)
    expected = ConfigError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        ensure_demo(tmp_path / "demo")
    assert isinstance(error, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def flipped(picture: Path) -> None:
    data = bytearray(picture.read_bytes())
    data[len(data) // 2] ^= 1
    picture.write_bytes(data)


def replaced_by_a_folder(picture: Path) -> None:
    picture.unlink()
    picture.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        replaced_by_a_folder,
        Path.unlink,
        lambda picture: picture.write_bytes(b""),
        lambda picture: (picture.parent / "9999.jpg").write_bytes(picture.read_bytes()),
        lambda picture: (picture.parents[2] / demo.DIGEST).write_text(""),
    ],
    ids=["flipped", "folder", "gone", "empty", "one more", "digest"],
)
def test_a_damaged_set_in_the_cache_is_rendered_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    def rendered(folder: Path, _: int) -> None:
        for split in ("train", "test"):
            (folder / split / "rings").mkdir(parents=True)
            Image.fromarray(render("rings", split, 0)).save(folder / split / "rings" / "0000.jpg")

    monkeypatch.setenv("FASTMOCO_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_render_all", rendered)
    folders = ensure_demo()
    whole = digests(tmp_path)
    damage(folders.train / "rings" / "0000.jpg")
    assert ensure_demo() == folders
    assert digests(tmp_path) == whole
    monkeypatch.setattr(demo, "_render_all", lambda *_: pytest.fail("rendered again"))
    ensure_demo()


def test_a_folder_with_other_things_is_refused_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("precious")
    monkeypatch.setattr(demo, "_render_all", lambda folder, _: finished(folder, "mine"))
    with pytest.raises(ConfigError, match="Cannot render the demo images into"):
        ensure_demo(tmp_path / "demo")
    assert [p.name for p in tmp_path.rglob("*")] == ["demo", "thesis.txt"]


def test_palettes_climb_in_luminance() -> None:
    for number in range(PALETTES):
        colours = palette(number)
        assert colours.shape == (5, 3)
        assert colours.min() >= 0
        assert colours.max() <= 1
        # Relative luminance as in WCAG, which knows nothing of Oklab.
        linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        contrast = (luminance[1:] + 0.05) / (luminance[:-1] + 0.05)
        assert contrast.min() > 1.15, (number, contrast)


@pytest.fixture(scope="module")
def pictures() -> tuple[NDArray[np.float64], torch.Tensor]:
    """40 pictures of each class, (480, 96, 96, 3) in [0, 1], and their labels."""
    shown = [render(name, "train", i) for name in CLASSES for i in range(40)]
    return np.stack(shown) / 255, torch.arange(len(CLASSES)).repeat_interleave(40)


def leave_half_out(features: NDArray[np.float64], labels: torch.Tensor) -> float:
    """kNN accuracy of the odd rows in the even ones."""
    rows = torch.nn.functional.normalize(torch.from_numpy(features - features.mean(0)), dim=1)
    return knn_accuracy(
        rows[::2], labels[::2], rows[1::2], labels[1::2], k=5, temperature=0.07, num_classes=12
    )


def test_pixels_hardly_and_colours_poorly_tell_the_class(
    pictures: tuple[NDArray[np.float64], torch.Tensor],
) -> None:
    images, labels = pictures
    chance = 1 / len(CLASSES)
    small = images.reshape(-1, 24, 4, 24, 4, 3).mean(axis=(2, 4)).reshape(len(images), -1)
    assert leave_half_out(small, labels) < 3 * chance
    moments = np.concatenate([images.mean(axis=(1, 2)), images.std(axis=(1, 2))], axis=1)
    assert leave_half_out(moments, labels) < 0.5


def test_geometry_tells_the_class(pictures: tuple[NDArray[np.float64], torch.Tensor]) -> None:
    # Histograms of local binary patterns of the gray picture at four scales: no place, no colour,
    # no contrast; the classic descriptor of texture.
    images, labels = pictures
    gray = images.mean(axis=3)
    histograms = []
    for reach in (1, 2, 3, 5):
        code = np.zeros((len(gray), 96 - 2 * reach, 96 - 2 * reach), dtype=int)
        centre = gray[:, reach:-reach, reach:-reach]
        around = [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]
        for bit, (dy, dx) in enumerate(around):
            y, x = reach * (1 + dy), reach * (1 + dx)
            side = centre.shape[1]
            code += (gray[:, y : y + side, x : x + side] > centre + 0.02).astype(int) << bit
        counts = [np.bincount(c.ravel(), minlength=256) / c[0].size for c in code]
        histograms.append(np.sqrt(np.stack(counts)))
    accuracy = leave_half_out(np.concatenate(histograms, axis=1), labels)
    assert accuracy > 0.6
