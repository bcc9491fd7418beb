"""Images in the fixed view of an evaluation: of any source, and labelled ones in class folders.

The view is the usual one: shorter edge to `resize`, centre crop of `image_size`, no randomness.
Bad images (unreadable, not an image, too many pixels) are excluded and counted, never fatal.

S side of a view, n images.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastmoco.config import ConfigError
from fastmoco.data.decode import IMAGE_SUFFIXES, BadImage, decode
from fastmoco.data.pixels.deep import Deep, decode_deep, resized
from fastmoco.data.pixels.rule import RGB8, PixelRule
from fastmoco.data.sources.image_list import labelled_list
from fastmoco.data.sources.listing import (
    Passed,
    is_hidden,
    is_image_file,
    read_file,
    stamp_of,
    walk,
)
from fastmoco.data.sources.tables.labels import is_table, labelled_table

# A monitor sees the same images every few epochs: below this size they are decoded only once.
CACHE_BYTES = 3 << 29


def eval_view(data: bytes, resize: int, image_size: int, rule: PixelRule = RGB8) -> np.ndarray:
    """The fixed view of encoded bytes: uint8 RGB (S, S, 3), or float32 (S, S, C), S = image_size.

    The shorter edge becomes `resize` (bilinear with antialiasing; skipped when it is that long
    already, so that such images keep their exact pixels), the longer one keeps the aspect ratio.
    A crop larger than the resized image is padded with black, as in torchvision.

    Raises `BadImage` as `decode` does.
    """
    if rule.float_views:
        return _float_view(decode_deep(data, rule), resize, image_size)
    image = decode(data, rule)
    width, height = image.size
    shorter = min(width, height)
    if shorter != resize:
        scaled = (int(width * resize / shorter), int(height * resize / shorter))
        image = image.resize(scaled, Image.Resampling.BILINEAR)
        width, height = image.size
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


def _float_view(image: Deep, resize: int, image_size: int) -> np.ndarray:
    """The same of a picture of any depth and number of channels: float32 (S, S, C)."""
    width, height = image.size
    whole = image.box(0, 0, height, width)
    shorter = min(width, height)
    if shorter != resize:
        width, height = int(width * resize / shorter), int(height * resize / shorter)
        whole = resized(whole, height, width)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    view = np.zeros((image_size, image_size, len(image.values)), np.float32)
    inside = whole[:, max(top, 0) : top + image_size, max(left, 0) : left + image_size]
    rows, columns = inside.shape[1:]
    view[max(-top, 0) :, max(-left, 0) :][:rows, :columns] = inside.transpose(1, 2, 0)
    return view


class ImageSet:
    """n images in their evaluation view, decoded by a few threads.

    read: encoded bytes of image i; raises `OSError` where the file cannot be read.
    name: what to call image i in a report.
    known_bad: reasons of images that need no second look.
    Decoded pixels stay in memory when all n views fit into `cache_bytes`.
    """

    def __init__(
        self,
        n: int,
        read: Callable[[int], bytes],
        name: Callable[[int], str],
        *,
        resize: int,
        image_size: int,
        known_bad: dict[int, str] | None = None,
        rule: PixelRule = RGB8,
        threads: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.name = name
        self.resize = resize
        self.image_size = image_size
        self.bad: dict[int, str] = dict(known_bad or {})
        """Reason by image, of those that this rank knows to be bad."""
        self._read, self.rule = read, rule
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._cache_bytes = cache_bytes
        self._resize_to(n)

    def _resize_to(self, n: int) -> None:
        """Room for n views, none decoded yet."""
        self._n = n
        self._decoded = np.zeros(n, dtype=bool)
        shape, kind = self._shape(n), self._kind()
        fits = math.prod(shape) * kind.itemsize <= self._cache_bytes
        # The system hands out pages on first touch: a rank pays only for its own share.
        self._pixels = torch.empty(shape, dtype=kind) if fits else None

    def __len__(self) -> int:
        return self._n

    def load(self, start: int, stop: int) -> Tensor:
        """Views start..stop-1 (stop - start, S, S, C) on the CPU; not to be written to.

        See `eval_view` for their type.

        The view of a bad image is black, and its reason is in `bad` from then on.
        """
        if self._pixels is None:
            chunk = torch.empty(self._shape(stop - start), dtype=self._kind())
            self._decode(range(start, stop), chunk, start)
            return chunk
        missing = [i for i in range(start, stop) if not self._decoded[i]]
        self._decode(missing, self._pixels, 0)
        self._decoded[start:stop] = True
        return self._pixels[start:stop]

    def batches(self, share: range, batch_size: int) -> Iterator[Tensor]:
        """The views of a share in order, (<= batch_size, S, S, C); one is read ahead."""
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

    def good(self, share: range) -> Tensor:
        """bool (len(share),): which images of a share, once loaded, are not bad."""
        return torch.tensor([i not in self.bad for i in share], dtype=torch.bool)

    def exclude(self, images: Sequence[int]) -> None:
        """Take over what other ranks found to be bad; the reason is found by a second look."""
        for i in images:
            if i not in self.bad:
                try:
                    self._view(i)
                    self.bad[i] = "could not be read once, but can be now"
                except BadImage as error:
                    self.bad[i] = str(error)

    def bad_sentence(self, what: str) -> str:
        """How many are excluded, with the first names; empty where all are good."""
        if not self.bad:
            return ""
        first = [f"{self.name(i)} ({self.bad[i]})" for i in sorted(self.bad)[:3]]
        more = f" and {len(self.bad) - 3} more" if len(self.bad) > 3 else ""
        return (
            f"{len(self.bad)} of {len(self)} {what} are bad and left out: {', '.join(first)}{more}."
        )

    def _shape(self, n: int) -> tuple[int, int, int, int]:
        return (n, self.image_size, self.image_size, self.rule.channels)

    def _kind(self) -> torch.dtype:
        return torch.float32 if self.rule.float_views else torch.uint8

    def read(self, i: int) -> bytes:
        """The encoded bytes of image i. Raises `BadImage` where they cannot be read."""
        try:
            return self._read(i)
        except OSError as error:
            raise BadImage(f"{type(error).__name__}: {error.strerror or error}") from error

    def _view(self, i: int) -> np.ndarray:
        return eval_view(self.read(i), self.resize, self.image_size, self.rule)

    def _decode(self, indices: Sequence[int], into: Tensor, offset: int) -> None:
        """Write the view of image i to row i - offset; PIL releases the GIL while it decodes."""
        rows = into.numpy()

        def one(i: int) -> str:
            try:
                if i in self.bad:
                    raise BadImage(self.bad[i])
                rows[i - offset] = self._view(i)
            except BadImage as error:
                rows[i - offset] = 0
                return str(error)
            return ""

        if indices:
            with ThreadPoolExecutor(self._threads) as pool:
                reasons = list(pool.map(one, indices))
            # In the order of the images, whichever thread was the first.
            self.bad |= {i: why for i, why in zip(indices, reasons, strict=True) if why}


def index_class_folders(
    root: Path, *, any_name: bool = False, passed: Passed | None = None
) -> tuple[list[Path], list[int], list[str]]:
    """Image paths, their labels and the class names of `root/<class>/.../<image>`, or of a list.

    Classes and, within each, paths are sorted by name; label i stands for the i-th class name.
    What counts as an image, and which files and folders are hidden, is as in training; `passed`
    takes note of the rest. A class folder without images keeps its label.

    A file is read as a list with a column of labels, see `labelled_list`.

    Raises `ConfigError` when root is missing, is empty, has no class folders, holds no image, or
    holds a folder that cannot be listed.
    """
    if root.is_file():
        return labelled_list(root)
    if not root.is_dir():
        raise ConfigError(
            f"No folder {root}: labels need a folder that holds one folder per class, or a list "
            "with labels."
        )
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
    if not folders:
        found = "files but no class folders" if any(root.iterdir()) else "nothing"
        raise ConfigError(
            f"{root} holds {found}: labels need one folder of images per class in it."
        )
    passed = Passed() if passed is None else passed
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        try:
            listed = list(walk(str(folder), passed, any_name=any_name))
        except PermissionError:
            passed.shut.append(str(folder))
            continue
        except OSError as error:
            raise ConfigError(
                f"The folder {error.filename} cannot be listed: {error.strerror}; "
                "make it readable or move it elsewhere."
            ) from error
        images = sorted(folder / inner / name for inner, _, names in listed for name in names)
        if any_name:
            images = [path for path in images if is_image_file(str(path))]
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise ConfigError(
            f"None of the {len(folders)} class folders of {root} holds an image "
            f"({' '.join(IMAGE_SUFFIXES)})."
        )
    return paths, labels, [folder.name for folder in folders]


class LabelledImages(ImageSet):
    """Images of class folders in their evaluation view.

    `labels` is int64 (n,) on the CPU, `class_names` has one name per label. With `max_images` > 0
    at most so many images are kept, evenly spaced over the sorted list, hence over the classes.

    Raises `ConfigError` for a root that `index_class_folders` refuses.
    """

    def __init__(
        self,
        root: Path,
        *,
        resize: int,
        image_size: int,
        max_images: int = 0,
        rule: PixelRule = RGB8,
        any_name: bool = False,
        threads: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        passed = Passed()
        self.in_table = is_table(str(root))
        """Whether the images are rows of Parquet or Arrow files, and `paths` only their names."""
        if self.in_table:
            self._source, labels, self.class_names = labelled_table(str(root), rule.max_pixels)
            paths = [Path(self._source.name(row)) for row in range(len(labels))]
        else:
            paths, labels, self.class_names = index_class_folders(
                root, any_name=any_name, passed=passed
            )
        self.warnings = passed.warnings()
        """What was left out that a user should act on, one sentence each."""
        n = min(len(paths), max_images) if max_images > 0 else len(paths)
        self._rows = [i * len(paths) // n for i in range(n)]
        self.paths = [paths[i] for i in self._rows]
        self.labels = torch.tensor([labels[i] for i in self._rows], dtype=torch.int64)
        super().__init__(
            n,
            read=self._encoded,
            name=lambda i: str(self.paths[i]),
            resize=resize,
            image_size=image_size,
            rule=rule,
            threads=threads,
            cache_bytes=cache_bytes,
        )

    def _encoded(self, i: int) -> bytes:
        if self.in_table:
            return self._source.read(self._rows[i])
        return read_file(str(self.paths[i]))

    def stamp(self, i: int) -> list[int]:
        """Size and modification time of the file with image i; empty if it is not there."""
        return self._source.stamp(self._rows[i]) if self.in_table else stamp_of(str(self.paths[i]))

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all images but those at `rows`; call it before any is decoded."""
        self._rows = [self._rows[i] for i in rows]
        self.paths = [self.paths[i] for i in rows]
        self.labels = self.labels[list(rows)]
        self._resize_to(len(rows))
