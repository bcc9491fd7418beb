"""Small photographs made by the tests, and a cache folder that is not the user's."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.backends import choose


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colour with edges and some noise, so that it compresses and blurs like a photo."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    base = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    y, x = np.mgrid[:height, :width]
    for _ in range(4):
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(4, height / 3)
        inside = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        base[inside] = 0.4 * base[inside] + 0.6 * rng.integers(0, 256, 3)
    noisy = base + rng.normal(0, 4, base.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    patch = pytest.MonkeyPatch()
    patch.setenv("FASTMOCO_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def _nvjpeg_decodes_on_the_cpu(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests with a parameter `backend` nvjpeg: with torchvision's decoder of the CPU for it."""
    if getattr(request.node, "callspec", None) and "nvjpeg" in map(
        str, request.node.callspec.params.values()
    ):
        monkeypatch.setattr(choose, "why_no_nvjpeg", lambda device: "")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 JPEGs of different sizes in three class folders, one of them nested; one is gray."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(7)
    for number in range(60):
        folder = root / ("a", "b", "c/d")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        width, height = (int(x) for x in rng.integers(40, 160, 2))
        image = photograph(number, width, height)
        if number == 5:
            image = image.convert("L")
        image.save(folder / f"{number:03d}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Real JPEGs of the user: $FASTMOCO_PHOTOGRAPHS names a folder of them, or a tar file."""
    place = os.environ.get("FASTMOCO_PHOTOGRAPHS")
    if not place:
        pytest.skip("set FASTMOCO_PHOTOGRAPHS to a folder or tar file of photographs")
    root = Path(place)
    if root.is_file():
        root = tmp_path_factory.mktemp("photographs")
        with tarfile.open(place) as tar:
            tar.extractall(root, filter="data")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    assert files, f"{place} holds no JPEG"
    return [path.read_bytes() for path in files[:: max(1, len(files) // 64)]][:64]
