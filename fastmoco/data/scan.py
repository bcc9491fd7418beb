"""Scans a folder of images into an index: walks it, then reads every header in parallel."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from fastmoco.data.header import BadImage, image_size
from fastmoco.data.index import Index

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".webp",
    ".bmp",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
    ".gif",
)
HEAD = 1 << 16
CHUNK = 512
# Below this many files threads are faster: processes take a second to start.
_PROCESSES_FROM = 20_000

Found = tuple[int, int, str]
"""Width, height and, for an unreadable image, why."""


def probe_file(path: str, max_pixels: int) -> Found:
    """Size of an image file from its first bytes; the whole file only where those do not tell."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(HEAD)
            try:
                return (*image_size(head, max_pixels), "")
            except BadImage:
                if len(head) < HEAD:
                    raise
                return (*image_size(head + file.read(), max_pixels), "")
    except BadImage as bad:
        return 0, 0, str(bad)
    except OSError as error:
        return 0, 0, f"{type(error).__name__}: {error.strerror}"


def probe_chunk(paths: Sequence[str], max_pixels: int) -> list[Found]:
    """`probe_file` of several paths: the unit of work of one process."""
    return [probe_file(path, max_pixels) for path in paths]


def walk(root: str) -> Iterator[tuple[str, int, list[str]]]:
    """Folders that hold images: path relative to root, modification time in ns, sorted names.

    Links are followed; a folder that was already visited is not visited again. Also yields folders
    without images, because a file added to one later must be noticed.
    """
    seen: set[tuple[int, int]] = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        images = sorted(
            name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        )
        relative = os.path.relpath(folder, root)
        yield "" if relative == "." else relative, status.st_mtime_ns, images


def scan_folder(root: str, max_pixels: int) -> Index:
    """The index of all images below root, with a progress bar on a terminal."""
    folders: list[tuple[str, int]] = []
    folder_of, ends, blobs, end = [], [], [], 0
    for number, (folder, changed, names) in enumerate(walk(root)):
        folders.append((folder, changed))
        encoded = [os.fsencode(name) for name in names]
        folder_of.append(np.full(len(names), number, np.uint32))
        ends.append(end + np.cumsum([len(name) for name in encoded], dtype=np.uint64))
        blobs.append(b"".join(encoded))
        end += len(blobs[-1])
    arrays: dict[str, Any] = {
        "folder_of": np.concatenate(folder_of or [np.zeros(0, np.uint32)]),
        "name_ends": np.concatenate(ends or [np.zeros(0, np.uint64)]).astype(np.uint64),
        "names": np.frombuffer(b"".join(blobs), np.uint8),
    }
    paths = _paths(root, folders, arrays)
    sizes, bad = measure(partial(probe_chunk, max_pixels=max_pixels), paths, "index")
    return Index({**arrays, "sizes": sizes}, {"folders": folders, "bad": bad})


def _paths(root: str, folders: list[tuple[str, int]], arrays: dict[str, Any]) -> list[str]:
    blob = arrays["names"].tobytes()
    paths, start = [], 0
    for folder, end in zip(arrays["folder_of"].tolist(), arrays["name_ends"].tolist(), strict=True):
        paths.append(os.path.join(root, folders[folder][0], os.fsdecode(blob[start:end])))
        start = end
    return paths


def measure(
    probe: Callable[[Sequence[Any]], list[Found]], items: Sequence[Any], label: str
) -> tuple[Any, dict[int, str]]:
    """Sizes, int32 (N, 2), and the reasons of unreadable items, found with all cores."""
    sizes = np.zeros((len(items), 2), np.int32)
    bad: dict[int, str] = {}
    chunks = [items[at : at + CHUNK] for at in range(0, len(items), CHUNK)]
    with in_parallel(many=len(items) >= _PROCESSES_FROM) as pool:
        at = 0
        for found in progress(pool.map(probe, chunks), len(chunks), label):
            for width, height, reason in found:
                if reason:
                    bad[at] = reason
                else:
                    sizes[at] = width, height
                at += 1
    return sizes, bad


def in_parallel(*, many: bool) -> Executor:
    """All cores: processes for much work, threads where processes would take longer to start."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not many:
        return ThreadPoolExecutor(workers)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def progress(work: Iterable[Any], total: int, label: str, unit: str = f"x{CHUNK}") -> Iterable[Any]:
    """The same items with a progress bar, if the standard error is a terminal."""
    if not sys.stderr.isatty():
        return work
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(work, total=total, desc=label, unit=unit)
    return bar


def folders_unchanged(root: str, index: Index) -> bool:
    """Whether every folder of the index still has the modification time that it had."""
    try:
        return all(
            os.stat(os.path.join(root, folder)).st_mtime_ns == changed
            for folder, changed in index.facts["folders"]
        )
    except (OSError, KeyError):
        return False
