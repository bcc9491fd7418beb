"""Which files are images: the one rule of training, pictures, evaluation and shards.

Hidden names and those that systems leave behind never count, whatever is in them. Any other file
counts if its name ends like an image's, or, with `data.any_name`, if it starts like one; NPY files
where their folder has no other pictures.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import FileIO

from fastmoco.data.decode import IMAGE_SUFFIXES
from fastmoco.machine import durable

# Of macOS, Windows, Synology and QNAP, Linux; in lower case.
_LEFT_BEHIND = frozenset(
    {
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin"),
        *("system volume information", "@eadir", "@recycle", "#recycle", "#snapshot"),
        "lost+found",
    }
)
_STARTS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"),
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
)
_NETPBM = re.compile(rb"P[1-6]\s+[#0-9]")
# A hole of this size is no picture; file systems that compress pictures do not reach such a share.
_SPARSE_FROM, _SPARSE_SHARE = 1 << 24, 64
_SUFFIX = re.compile(r"\.[a-z][a-z0-9]{0,7}$|\.[0-9][a-z0-9]{0,3}$")
# Kernels stamp files with the time of the last clock tick, of which there are 100 or more a second.
_TICK_S = 0.02


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over: hidden, or left behind by a system."""
    return name[:1] == "." or name.lower() in _LEFT_BEHIND


def is_hidden_path(path: str) -> bool:
    """Whether any part of a path with slashes is hidden, as members of archives are named."""
    return any(is_hidden(part) for part in path.split("/") if part not in ("", ".", ".."))


def is_image_name(path: str) -> bool:
    """Whether a path names an image that counts: by its suffix, and not hidden."""
    name = path.rpartition("/")[2].lower()
    return name.endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def starts_like_image(head: bytes) -> bool:
    """Whether the first 16 bytes are those of an image format that is decoded."""
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[:2] == b"BM":  # text may start so too: the next field but one is reserved
        return head[6:10] == bytes(4)
    avif = head[4:12] in (b"ftypavif", b"ftypavis")
    return avif or head.startswith(_STARTS) or _NETPBM.match(head) is not None


def suffix_of(name: str) -> str:
    """How a name ends, in lower case; `none` where nothing like a suffix does."""
    found = _SUFFIX.search(name.lower())
    return found[0] if found else "none"


def in_words(counts: Counter[str], most: int = 6) -> str:
    """`16 .txt, 3 none and 2 others`: the most frequent kinds first."""
    kinds = counts.most_common(most)
    rest = counts.total() - sum(number for _, number in kinds)
    text = ", ".join(f"{number:,} {kind}" for kind, number in kinds)
    return f"{text} and {rest:,} others" if rest else text


def first_names(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def open_regular(path: str) -> FileIO:
    """The file, unbuffered. Raises `OSError` for what would wait for ever or never end."""
    return FileIO(_open(path)[0], "rb")


def read_file(path: str) -> bytes:
    """All bytes of a regular file. Raises `OSError` as `open_regular` does."""
    file, status = _open(path)
    try:
        # One read of the known size: `FileIO.read` asks twice more, a quarter of the time.
        data = os.read(file, status.st_size)
        while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(file)


def _open(path: str) -> tuple[int, os.stat_result]:
    file, status = durable.open_regular(path)
    size, on_disk = status.st_size, status.st_blocks * 512
    if size >= _SPARSE_FROM and on_disk * _SPARSE_SHARE < size:
        os.close(file)
        raise OSError(errno.EFBIG, f"sparse: {on_disk:,} of its {size:,} bytes are on the disk")
    return file, status


def is_image_file(path: str) -> bool:
    """Whether a file counts by its name or by its content; one that cannot be read does by name."""
    if is_image_name(path):
        return True
    try:
        with open_regular(path) as file:
            return starts_like_image(file.read(16))
    except OSError:
        return False


Listed = tuple[str, int, list[str]]
"""A folder's path relative to the root, modification time in ns, sorted names of its images."""


@dataclass
class Passed:
    """What a walk found and did not take."""

    suffixes: Counter[str] = field(default_factory=Counter)
    """Files that are no images by their name."""
    odd: list[str] = field(default_factory=list)
    """FIFOs, sockets and devices: reading one may wait for ever or never end."""
    shut: list[str] = field(default_factory=list)
    """Folders that may not be listed."""
    lost: list[str] = field(default_factory=list)
    """Links that lead nowhere now, such as one to a folder on a disk that is not mounted."""

    def notes(self) -> list[str]:
        """What a user may want to know, one sentence each."""
        found = []
        if self.suffixes:
            found.append(f"not counted as images: {in_words(self.suffixes)}")
        return found

    def warnings(self) -> list[str]:
        """What a user should act on, one sentence each."""
        found = []
        if self.shut:
            found.append(
                f"{len(self.shut)} folders may not be listed and are left out: "
                f"{first_names(self.shut)}."
            )
        if self.odd:
            found.append(
                f"{len(self.odd)} names are no regular files and are left out: "
                f"{first_names(self.odd)}."
            )
        if self.lost:
            found.append(f"{len(self.lost)} links lead nowhere: {first_names(self.lost)}.")
        return found


def walk(
    root: str,
    passed: Passed | None = None,
    *,
    counts: Callable[[str], bool] = is_image_name,
    any_name: bool = False,
    seen: set[tuple[int, int]] | None = None,
) -> Iterator[Listed]:
    """Every folder below root, itself included, in depth-first sorted order.

    Links are followed; a folder that was already visited is not visited again. Folders without
    images are yielded too, because a file added to one later must be noticed. Folders without
    permission and what is no regular file go to `passed`.

    counts: which names of files do; any_name: every one does. seen: device and number of folders
    that were visited before; grows.

    Raises `OSError` where the root, or for another reason a folder, cannot be listed: leaving it
    out would train on less than the user named.
    """
    passed = Passed() if passed is None else passed
    counts = (lambda name: True) if any_name else counts
    seen = set() if seen is None else seen
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(os.path.join(root, folder) if folder else root)
            if (status.st_dev, status.st_ino) in seen:
                continue
            _let_tick_pass(status.st_mtime_ns)
            inner, images = _list(root, folder, counts, passed)
        except PermissionError:
            if not folder:
                raise
            passed.shut.append(os.path.join(root, folder))
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder, status.st_mtime_ns, sorted(images)
        pending += sorted(inner, reverse=True)


def _list(
    root: str, folder: str, counts: Callable[[str], bool], passed: Passed
) -> tuple[list[str], list[str]]:
    """Paths of the folders inside of a folder, and names of its images."""
    inner, images = [], []
    with os.scandir(os.path.join(root, folder) if folder else root) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            kind = _kind(entry)
            if kind == "folder":
                inner.append(os.path.join(folder, entry.name))
            elif kind == "file":
                if counts(entry.name):
                    images.append(entry.name)
                else:
                    passed.suffixes[suffix_of(entry.name)] += 1
            elif kind == "lost":
                # One that is named like an image is a sample: bad now, looked at again later.
                if is_image_name(entry.name):
                    images.append(entry.name)
                else:
                    passed.lost.append(entry.path)
            else:
                passed.odd.append(f"{entry.path} ({kind})")
    return inner, _without_arrays(images, passed)


def _without_arrays(names: list[str], passed: Passed) -> list[str]:
    """Names of a folder without its NPY files where it has other pictures too.

    Those are masks, labels or features that belong to the pictures.
    """
    others = [name for name in names if not name.lower().endswith(".npy")]
    arrays = len(names) - len(others)
    if not arrays or not any(map(is_image_name, others)):
        return names
    passed.suffixes[".npy beside other pictures"] += arrays
    return others


def _kind(entry: os.DirEntry[str]) -> str:
    """`folder`, `file`, `lost` for a link that leads nowhere or in a circle, else what it is."""
    try:
        if entry.is_file():  # without a system call, except for links
            return "file"
        return "folder" if entry.is_dir() else durable.what_it_is(entry.stat().st_mode)
    except OSError:
        return "lost"


def _let_tick_pass(changed: int) -> None:
    """Waits until a change from now on gives the folder another modification time than this one."""
    if abs(time.time_ns() - changed) < _TICK_S * 1e9:
        time.sleep(_TICK_S)


def stamp_of(path: str) -> list[int]:
    """Size and modification time in ns of a file; empty where it cannot be reached."""
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def file_system(path: str) -> str:
    """The type of the file system of an absolute path, such as `ext4`; empty where unknown."""
    best, kind = "", ""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                before, _, after = line.partition(" - ")
                place = before.split()[4].encode().decode("unicode_escape")  # a space is \040
                inside = path == place or path.startswith(place.rstrip("/") + "/")
                if inside and len(place) >= len(best):
                    best, kind = place, after.split()[0]
    except (OSError, IndexError, ValueError):
        return ""
    return kind


def times_tell(root: str, times: Iterable[int]) -> bool:
    """Whether the modification times of folders show that a file came or went.

    Mounted buckets make them up: zero, or the time of the mount for every folder.
    """
    known = list(times)
    made_up = any(time <= 0 for time in known) or (len(known) > 2 and len(set(known)) == 1)
    return not made_up and not file_system(root).startswith("fuse")
