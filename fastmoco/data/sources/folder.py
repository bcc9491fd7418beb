"""A folder of images, flat, nested or class folders: `data.source` folder."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import ConfigError
from fastmoco.config.paths import matching
from fastmoco.data.sources.index import FILE_NAMES, Index, Indexed, kept_index, require_readable
from fastmoco.data.sources.listing import (
    Listed,
    Passed,
    read_file,
    stamp_of,
    suffix_of,
    times_tell,
    walk,
)
from fastmoco.data.sources.measure import CHUNK, OTHER, measure, probe_chunk, probe_file, progress


def scan_folder(
    root: str, max_pixels: int, *, any_name: bool = False, parts: Sequence[str] = ("",)
) -> Index:
    """The index of all images below root, with a progress bar on a terminal.

    parts: folders in root of which alone the images count. Raises `OSError` for a folder that
    cannot be listed.
    """
    passed, listing = Passed(), hashlib.sha256()
    folders: list[tuple[str, int]] = []
    folder_of, ends, blobs, end = [], [], [], 0
    walked = _walk(root, parts, passed, any_name=any_name)
    for number, (folder, changed, names) in enumerate(progress(walked, _images, "list")):
        folders.append((folder, changed))
        encoded = [os.fsencode(name) for name in names]
        listing.update(_line(folder, encoded))
        folder_of.append(np.full(len(names), number, np.uint32))
        ends.append(end + np.cumsum([len(name) for name in encoded], dtype=np.uint64))
        blobs.append(b"".join(encoded))
        end += len(blobs[-1])
    arrays: dict[str, Any] = {
        "folder_of": np.concatenate(folder_of or [np.zeros(0, np.uint32)]),
        "name_ends": np.concatenate(ends or [np.zeros(0, np.uint64)]).astype(np.uint64),
        "names": np.frombuffer(b"".join(blobs), np.uint8),
    }
    began = time.time_ns()
    paths = _paths(root, folders, arrays)
    probe = partial(probe_chunk, max_pixels=max_pixels, any_name=any_name)
    sizes, bad = measure(probe, paths, len(arrays["folder_of"]))
    arrays["sizes"] = sizes
    other = [sample for sample, reason in bad.items() if reason == OTHER]
    if other:
        arrays, bad = _without(other, arrays, bad, passed)
    facts = {
        "folders": folders,
        "parts": list(parts),
        "listing": listing.hexdigest(),
        "lost": passed.lost,
        "shut": passed.shut,
        "notes": passed.notes(),
        "warnings": passed.warnings(),
    }
    return with_stamps(root, Index(arrays, {**facts, "bad": bad}), began)


def _walk(root: str, parts: Sequence[str], passed: Passed, *, any_name: bool) -> Iterator[Listed]:
    """`walk` of some folders in root; one that lies in another is visited once."""
    seen: set[tuple[int, int]] = set()
    for part in parts:
        place = os.path.join(root, part) if part else root
        for folder, changed, names in walk(place, passed, any_name=any_name, seen=seen):
            yield os.path.join(part, folder), changed, names


def _line(folder: str, names: Sequence[bytes]) -> bytes:
    return b"\0".join([os.fsencode(folder), *names]) + b"\n"


def with_stamps(root: str, index: Index, began: int) -> Index:
    """The index with the stamps of its bad files, so that repaired ones are noticed.

    began: time in ns before the first was read; what has changed since will be looked at again.
    """
    source = FolderSource(root, index)
    stamps = {sample: stamp_of(source.name(int(sample))) for sample in index.facts["bad"]}
    stamps = {n: stamp if stamp and stamp[1] < began else [] for n, stamp in stamps.items()}
    return Index(index.arrays, {**index.facts, "stamps": stamps})


def look_again(source: FolderSource, max_pixels: int) -> Index | None:
    """The index with bad files measured anew that have changed since; None if none has."""
    facts, began = source.index.facts, time.time_ns()
    samples = [int(sample) for sample in facts["bad"]]
    names = {sample: source.name(sample) for sample in samples}
    changed = [n for n in samples if stamp_of(names[n]) != facts["stamps"][str(n)]]
    if not changed:
        return None
    sizes = source.sizes.copy()
    bad = {int(sample): reason for sample, reason in facts["bad"].items()}
    for sample in changed:
        width, height, reason = probe_file(names[sample], max_pixels)
        sizes[sample] = width, height
        bad.pop(sample)
        if reason:
            bad[sample] = reason
    index = Index({**source.index.arrays, "sizes": sizes}, {**facts, "bad": bad})
    return with_stamps(source.root, index, began)


def _without(
    other: list[int], arrays: dict[str, Any], bad: dict[int, str], passed: Passed
) -> tuple[dict[str, Any], dict[int, str]]:
    """The arrays without files that are no images by name nor content; these are counted."""
    ends = arrays["name_ends"].astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    for sample in other:
        name = arrays["names"][ends[sample] - lengths[sample] : ends[sample]].tobytes()
        passed.suffixes[suffix_of(os.fsdecode(name))] += 1
    stays = np.ones(len(ends), bool)
    stays[other] = False
    kept = {
        "folder_of": arrays["folder_of"][stays],
        "name_ends": np.cumsum(lengths[stays]).astype(np.uint64),
        "names": arrays["names"][np.repeat(stays, lengths)],
        "sizes": arrays["sizes"][stays],
    }
    number = np.cumsum(stays) - 1
    return kept, {int(number[at]): why for at, why in bad.items() if stays[at]}


def _images(listed: Listed) -> int:
    return len(listed[2])


def _paths(root: str, folders: list[tuple[str, int]], arrays: dict[str, Any]) -> Iterator[str]:
    blob, start = arrays["names"].tobytes(), 0
    for at in range(0, len(arrays["folder_of"]), CHUNK):  # a list of all would take 80 bytes each
        part = slice(at, at + CHUNK)
        folder_of, ends = (arrays[name][part].tolist() for name in ("folder_of", "name_ends"))
        for folder, end in zip(folder_of, ends, strict=True):
            yield os.path.join(root, folders[folder][0], os.fsdecode(blob[start:end]))
            start = end


def folders_unchanged(root: str, index: Index, *, any_name: bool = False) -> bool:
    """Whether every folder still holds the same names, by its modification time if that tells."""
    facts = index.facts
    if any(os.path.exists(link) for link in facts["lost"]):
        return False
    if any(os.access(folder, os.R_OK | os.X_OK) for folder in facts["shut"]):
        return False
    try:
        if not times_tell(root, (changed for _, changed in facts["folders"])):
            listing = hashlib.sha256()
            for folder, _, names in _walk(root, facts["parts"], Passed(), any_name=any_name):
                listing.update(_line(folder, [os.fsencode(name) for name in names]))
            return bool(listing.hexdigest() == facts["listing"])
        return all(
            os.stat(os.path.join(root, folder)).st_mtime_ns == changed
            for folder, changed in facts["folders"]
        )
    except (OSError, KeyError):
        return False


class FolderSource(Indexed):
    """Images below a folder: flat, nested or class folders, in sorted order."""

    def __init__(self, root: str, index: Index) -> None:
        self.root, self.index = root, index

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        return np.bincount(self.index.arrays["folder_of"]).astype(np.int64)

    def read(self, sample: int) -> bytes:
        return read_file(self.name(sample))

    def stamp(self, sample: int) -> list[int]:
        return stamp_of(self.name(sample))

    def name(self, sample: int) -> str:
        arrays = self.index.arrays
        start = arrays["name_ends"][sample - 1] if sample else 0
        name = arrays["names"][start : arrays["name_ends"][sample]].tobytes()
        folder: str = self.index.facts["folders"][arrays["folder_of"][sample]][0]
        return os.path.join(self.root, folder, name.decode(*FILE_NAMES))  # keeps absolute names

    def relative_names(self) -> Iterator[bytes]:
        """Path of each image below the root, or below what several roots have in common."""
        facts, arrays = self.index.facts, self.index.arrays
        parts = facts.get("parts", [""])
        above = os.path.commonpath(parts) if len(parts) > 1 else ""
        folders = [
            os.fsencode(folder).removeprefix(os.fsencode(above)) for folder, _ in facts["folders"]
        ]
        blob, start = arrays["names"].tobytes(), 0
        for at in range(0, len(arrays["folder_of"]), CHUNK):
            part = slice(at, at + CHUNK)
            rows = (arrays[name][part].tolist() for name in ("folder_of", "name_ends"))
            for folder, end in zip(*rows, strict=True):
                yield folders[folder] + b"/" + blob[start:end]
                start = end


def open_folder(
    root: str, max_pixels: int, *, any_name: bool = False, rescan: bool = False
) -> FolderSource:
    """The images below a folder, from the cached index where that still holds.

    root: may be a pattern of several folders. any_name: files without the suffix of an image count
    too if their content is one. rescan: list and measure anew.

    Raises `ConfigError` where the folder is missing or holds no image that can be read.
    """
    if not root:
        raise ConfigError("data.root is not set: name the folder of the training images.")
    places = matching(root)
    for place in places:
        if not Path(place).is_dir():
            raise ConfigError(f"data.root {place} is not a folder.")
    real, parts = str(Path(places[0]).resolve()), [""]
    if len(places) > 1:
        real, parts = "/", [str(Path(place).resolve()) for place in places]
    try:
        index = kept_index(
            f"{real} {parts} {max_pixels} {any_name}",
            holds=lambda index: folders_unchanged(real, index, any_name=any_name),
            scan=lambda: scan_folder(real, max_pixels, any_name=any_name, parts=parts),
            again=lambda index: look_again(FolderSource(real, index), max_pixels),
            rescan=rescan,
        )
    except OSError as error:
        if error.filename is None:  # about no path: a process or a pipe that could not be made
            raise
        raise ConfigError(
            f"data.root: the folder {error.filename} cannot be listed: {error.strerror}; "
            "make it readable or move it elsewhere."
        ) from error
    require_readable(index, f"data.root {root}", by_name=not any_name)
    return FolderSource(real, index)
