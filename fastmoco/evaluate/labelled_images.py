"""Images in class folders, in the fixed view of an evaluation.

S side of a view, n images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastmoco.config import ConfigError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


# A monitor sees the same images every few epochs: below this size they are decoded only once.
CACHE_BYTES = 3 << 29


def index_class_folders(root: Path) -> tuple[list[Path], list[int], list[str]]:
    """Image paths, their labels and the class names of `root/<class>/.../<image>`.

    Classes and, within each, paths are sorted by name; label i stands for the i-th class name.
    Hidden folders are not classes. A class folder without images keeps its label.

    Raises `ConfigError` when root is missing, is empty, has no class folders, or holds no image.
    """
    if not root.is_dir():
        raise ConfigError(f"No folder {root}: kNN needs a folder that holds one folder per class.")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        found = "files but no class folders" if any(root.iterdir()) else "nothing"
        raise ConfigError(f"{root} holds {found}: kNN needs one folder of images per class in it.")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise ConfigError(
            f"None of the {len(folders)} class folders of {root} holds an image "
            f"({' '.join(sorted(IMAGE_SUFFIXES))})."
        )
    return paths, labels, [folder.name for folder in folders]


def eval_view(path: Path, resize: int, image_size: int) -> np.ndarray:
    """The fixed view of one file: uint8 RGB (S, S, 3) with S = image_size.

    The shorter edge becomes `resize` (bilinear with antialiasing; skipped when it is that long
    already, so that such images keep their exact pixels), the longer one keeps the aspect ratio.
    A crop larger than the resized image is padded with black, as in torchvision.

    Raises `ConfigError` when the file is not a readable image.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"Cannot decode {path} ({error}): repair or remove it.") from error
    width, height = image.size
    shorter = min(width, height)
    if shorter != resize:
        scaled = (int(width * resize / shorter), int(height * resize / shorter))
        image = image.resize(scaled, Image.Resampling.BILINEAR)
        width, height = image.size
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


class LabelledImages:
    """Images of class folders in their evaluation view, decoded by a few threads.

    `labels` is int64 (n,) on the CPU, `class_names` has one name per label. With `max_images` > 0
    at most so many images are kept, evenly spaced over the sorted list, hence over the classes.
    Decoded pixels stay in memory when all n views fit into `cache_bytes`.

    Raises `ConfigError` for a root that `index_class_folders` refuses and for unreadable files.
    """

    def __init__(
        self,
        root: Path,
        *,
        resize: int,
        image_size: int,
        max_images: int = 0,
        threads: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        paths, labels, self.class_names = index_class_folders(root)
        n = min(len(paths), max_images) if max_images > 0 else len(paths)
        kept = [i * len(paths) // n for i in range(n)]
        self.paths = [paths[i] for i in kept]
        self.labels = torch.tensor([labels[i] for i in kept], dtype=torch.int64)
        self.resize = resize
        self.image_size = image_size
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._decoded = np.zeros(n, dtype=bool)
        fits = n * image_size**2 * 3 <= cache_bytes
        # The system hands out pages on first touch: a rank pays only for its own share.
        self._pixels = torch.empty(self._shape(n), dtype=torch.uint8) if fits else None

    def __len__(self) -> int:
        return len(self.paths)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all images but those at `rows`; call it before any is decoded."""
        self.paths = [self.paths[i] for i in rows]
        self.labels = self.labels[list(rows)]
        self._decoded = np.zeros(len(rows), dtype=bool)
        if self._pixels is not None:
            self._pixels = torch.empty(self._shape(len(rows)), dtype=torch.uint8)

    def load(self, start: int, stop: int) -> Tensor:
        """Views start..stop-1 as uint8 (stop - start, S, S, 3) on the CPU; not to be written to."""
        if self._pixels is None:
            chunk = torch.empty(self._shape(stop - start), dtype=torch.uint8)
            self._decode(range(start, stop), chunk, start)
            return chunk
        missing = [i for i in range(start, stop) if not self._decoded[i]]
        self._decode(missing, self._pixels, 0)
        self._decoded[start:stop] = True
        return self._pixels[start:stop]

    def batches(self, share: range, batch_size: int) -> Iterator[Tensor]:
        """The views of a share in order, uint8 (<= batch_size, S, S, 3); one is read ahead."""
        starts = range(share.start, share.stop, batch_size)
        with ThreadPoolExecutor(1) as ahead:
            pending = None
            for start in starts:
                following = ahead.submit(self.load, start, min(start + batch_size, share.stop))
                if pending is not None:
                    yield pending.result()
                pending = following
            if pending is not None:
                yield pending.result()

    def _shape(self, n: int) -> tuple[int, int, int, int]:
        return (n, self.image_size, self.image_size, 3)

    def _decode(self, indices: Sequence[int], into: Tensor, offset: int) -> None:
        """Write the view of image i to row i - offset; PIL releases the GIL while it decodes."""
        rows = into.numpy()

        def one(i: int) -> None:
            rows[i - offset] = eval_view(self.paths[i], self.resize, self.image_size)

        if indices:
            with ThreadPoolExecutor(self._threads) as pool:
                # Consuming the results raises what a thread raised.
                list(pool.map(one, indices))
