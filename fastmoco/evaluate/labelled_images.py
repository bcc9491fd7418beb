"""Images in class folders, in the fixed view of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastmoco.config import ConfigError
from fastmoco.data.decode import IMAGE_SUFFIXES
from fastmoco.data.sources.folder import walk
from fastmoco.evaluate.image_set import CACHE_BYTES, MAX_PIXELS, ImageSet


def index_class_folders(root: Path) -> tuple[list[Path], list[int], list[str]]:
    """Image paths, their labels and the class names of `root/<class>/.../<image>`.

    Classes and, within each, paths are sorted by name; label i stands for the i-th class name.
    What counts as an image, and which files and folders are hidden, is as in training. A class
    folder without images keeps its label.

    Raises `ConfigError` when root is missing, is empty, has no class folders, holds no image, or
    holds a folder that cannot be listed.
    """
    if not root.is_dir():
        raise ConfigError(
            f"No folder {root}: labels need a folder that holds one folder per class."
        )
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        found = "files but no class folders" if any(root.iterdir()) else "nothing"
        raise ConfigError(
            f"{root} holds {found}: labels need one folder of images per class in it."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        try:
            listed = list(walk(str(folder)))
        except OSError as error:
            raise ConfigError(
                f"The folder {error.filename} cannot be listed: {error.strerror}; "
                "make it readable or move it elsewhere."
            ) from error
        images = sorted(folder / inner / name for inner, _, names in listed for name in names)
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
        max_pixels: int = MAX_PIXELS,
        threads: int = 0,
        cache_bytes: int = CACHE_BYTES,
        strict: bool = False,
    ) -> None:
        paths, labels, self.class_names = index_class_folders(root)
        n = min(len(paths), max_images) if max_images > 0 else len(paths)
        kept = [i * len(paths) // n for i in range(n)]
        self.paths = [paths[i] for i in kept]
        self.labels = torch.tensor([labels[i] for i in kept], dtype=torch.int64)
        super().__init__(
            n,
            read=lambda i: self.paths[i].read_bytes(),
            name=lambda i: str(self.paths[i]),
            resize=resize,
            image_size=image_size,
            max_pixels=max_pixels,
            threads=threads,
            cache_bytes=cache_bytes,
            strict=strict,
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all images but those at `rows`; call it before any is decoded."""
        self.paths = [self.paths[i] for i in rows]
        self.labels = self.labels[list(rows)]
        self._resize_to(len(rows))
