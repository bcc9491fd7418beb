"""The members of a tar file and where their bytes lie, as `tarfile` reads its headers.

GNU, pax and old archives; links to other members; archives one after another, as `cat` joins them;
tar files inside of a tar file, as ImageNet comes; and archives that were cut off.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections import Counter
from itertools import groupby
from typing import NamedTuple

from fastmoco.config import ConfigError
from fastmoco.data.decode import IMAGE_SUFFIXES
from fastmoco.data.sources.listing import (
    is_hidden_path,
    is_image_name,
    starts_like_image,
    suffix_of,
)

_BLOCK = 512
_DEEPEST = 3
_MOST_LINKS = 40  # in a row, as Linux follows them
_LARGEST_HEADER = 1 << 24  # bytes; damage may claim to be one of any size
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip", ".gz"),
    b"BZh": ("bzip2", "bunzip2", ".bz2"),
    b"\xfd7zXZ\0": ("xz", "unxz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd", ".zst"),
    b"PK\x03\x04": ("zip", "unzip", ".zip"),
}


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    """Of a file in an inner tar file: the name of that, a slash, and its own."""
    offset: int
    """Where its bytes begin in the outermost file."""
    size: int
    fault: str = ""
    """Why its bytes cannot be read from there; empty where they can."""


class _Headers(tarfile.TarFile):
    """Parses headers where it is told to, without a walk of its own."""

    def next(self) -> None:
        return None


class _Window:
    """A range of a file as a file, read without moving anybody's position."""

    def __init__(self, file: int, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def read(self, size: int) -> bytes:
        left = self._size - self._at
        if size > _LARGEST_HEADER or left <= 0:  # not asked for what no file can hold
            return b""
        data = os.pread(self._file, min(size, left), self._start + self._at)
        self._at += len(data)
        return data

    def seek(self, offset: int) -> int:
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at


class Tar:
    """All regular members of a tar file in their order, and how it ends."""

    def __init__(self, path: str, file: int) -> None:
        """file: open for reading. Raises `ConfigError` for no tar file, `OSError` as reads do."""
        self.path, self._file = path, file
        self.size = os.fstat(file).st_size
        self.end = ""
        """A sentence if it does not end as it should."""
        self._found: list[Member | tuple[str, str]] = []
        self._places: dict[str, Member] = {}
        self._links: dict[str, str] = {}
        if self.size == 0:
            self.end = f"{path} is empty."
        else:
            self._walk(0, self.size, "", 0)
        self.members = [m if isinstance(m, Member) else self._follow(*m) for m in self._found]

    def _walk(self, start: int, size: int, prefix: str, depth: int) -> None:
        window = _Window(self._file, start, size)
        headers = _Headers(fileobj=window)  # type: ignore[arg-type]
        at, ended, how = 0, False, ""
        while not how:
            window.seek(at)
            block = window.read(_BLOCK)
            if not block:
                how = "ends without the mark of an end"
                break
            if not block.strip(b"\0"):  # the mark of an end; another archive may follow
                at, ended = _past_zeros(window, at), True
                headers.pax_headers = {}
                continue
            try:
                if len(block) < _BLOCK:
                    raise tarfile.ReadError
                headers.offset = window.seek(at)
                member = tarfile.TarInfo.fromtarfile(headers)
            # Python's errors are of numbers too large, and of headers in front of headers.
            except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
                cut = window.tell() >= size
                if at == 0 and depth == 0 and (not cut or self._packed()):
                    raise self._no_tar() from error
                how = "is cut off" if cut else "is damaged"
                break
            ended = False
            if headers.offset <= at or member.size < 0:
                how = "is damaged"
            elif not self._take(member, start, size, prefix, depth):
                how = f"is cut off in {prefix}{member.name}"
            else:
                at = headers.offset
        if not ended and not self.end:  # after an end anything may follow
            lost = size - at
            share = f" and {lost:,} of its {self.size:,} bytes ({lost / self.size:.1%}) are not"
            where = f", in {prefix[:-1]}" * bool(prefix)
            self.end = (
                f"{self.path} {how}{where}: its complete members are used{share * (lost > 0)}."
            )

    def _take(
        self, member: tarfile.TarInfo, start: int, size: int, prefix: str, depth: int
    ) -> bool:
        """Keeps a member; False for one that is not complete."""
        name, offset = prefix + member.name, start + member.offset_data
        if member.issym() or member.islnk():
            folder = posixpath.dirname(name) if member.issym() else prefix
            self._links[_normal(name)] = _normal(posixpath.join(folder, member.linkname))
            before = self._places.get(self._links[_normal(name)]) if member.islnk() else None
            self._found.append(before._replace(name=name) if before else (name, member.linkname))
            return True
        if not member.isreg():
            return True
        sparse = member.issparse()
        complete = sparse or member.offset_data + member.size <= size
        if name.lower().endswith(".tar") and not is_hidden_path(name) and depth < _DEEPEST:
            inside = min(member.size, size - member.offset_data)
            self._walk(offset, inside, f"{name}/", depth + 1)
            return complete
        if complete:
            fault = "a sparse member: pack it again without --sparse" if sparse else ""
            fault = fault or "4 GiB or more" * (member.size >= 1 << 32)
            found = Member(name, offset, member.size, fault)
            self._places[_normal(name)] = found
            self._found.append(found)
        return complete

    def head(self, member: Member) -> bytes:
        """The first 16 bytes."""
        return os.pread(self._file, 0 if member.fault else min(16, member.size), member.offset)

    def _follow(self, name: str, target: str) -> Member:
        """The member that a link leads to, under the name of the link."""
        seen, at = set[str](), _normal(name)
        while at in self._links and at not in seen and len(seen) <= _MOST_LINKS:
            seen.add(at)
            at = self._links[at]
        found = self._places.get(at) if len(seen) <= _MOST_LINKS else None
        fault = f"a link to {target}, which is not in the archive"
        return found._replace(name=name) if found else Member(name, 0, 0, fault)

    def _packed(self) -> tuple[str, str, str] | None:
        """Kind, command and suffix where the file is compressed."""
        head = os.pread(self._file, 8, 0)
        return next((how for start, how in _COMPRESSED.items() if head.startswith(start)), None)

    def _no_tar(self) -> ConfigError:
        packed = self._packed()
        if packed is None:
            head = os.pread(self._file, 8, 0)
            return ConfigError(f"The shard {self.path} is no tar file: it starts with {head!r}.")
        kind, command, suffix = packed
        named = self.path.lower().endswith((suffix, ".tgz", ".tbz2", ".txz", ".tzst"))
        first = f"mv {self.path} {self.path}{suffix} && " * (not named)
        unpack = f"{first}{command} {self.path}{suffix * (not named)}"
        return ConfigError(
            f"The shard {self.path} is compressed with {kind}, so that images in it cannot be read "
            f"at random: unpack it with `{unpack}`."
        )


def _normal(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _past_zeros(window: _Window, at: int) -> int:
    """The block of the next byte that is not zero, or the end."""
    while True:
        window.seek(at)
        chunk = window.read(1 << 20)
        rest = chunk.lstrip(b"\0")
        if rest or not chunk:
            return at + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
        at += len(chunk)


class Pictures(NamedTuple):
    """What a tar file holds."""

    images: list[Member]
    beside: int
    """Images that are left out for their key."""
    others: Counter[str]
    """Members that are no images, by suffix."""


def pictures(tar: Tar, *, any_name: bool = False) -> Pictures:
    """The members that count as images.

    Of neighbours with one webdataset key (the name up to its first dot) one counts, if some have a
    plain suffix: the first in the order of `IMAGE_SUFFIXES`, a JPEG where there is one. So a mask
    `1.png` or `1.seg.png` beside `1.jpg` is no image, but `a.1.jpg` and `a.2.jpg` are two.
    """
    images: list[Member] = []
    others: Counter[str] = Counter()
    for member in tar.members:
        if is_hidden_path(member.name):
            continue
        by_content = any_name and starts_like_image(tar.head(member))
        if by_content or is_image_name(member.name):
            images.append(member)
        else:
            others[suffix_of(member.name.rpartition("/")[2])] += 1
    kept = [member for _, group in groupby(images, key=_key) for member in _chosen(list(group))]
    return Pictures(kept, len(images) - len(kept), others)


def _key(member: Member) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _chosen(members: list[Member]) -> list[Member]:
    """Those of one key that count."""
    suffixes = [member.name.rpartition("/")[2].partition(".")[2].lower() for member in members]
    plain = [i for i, suffix in enumerate(suffixes) if f".{suffix}" in IMAGE_SUFFIXES]
    if len(members) == 1 or not plain:
        return members
    return [members[min(plain, key=lambda i: IMAGE_SUFFIXES.index(f".{suffixes[i]}"))]]
