"""Tar files for tests, and what `tarfile` and a source read of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastmoco.data.sources.shards import ShardSource

LIMIT = 10**8
"""Pixels of a picture, at most."""


def jpeg(seed: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8 + seed, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes, **pax: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.pax_headers = pax
    tar.addfile(member, io.BytesIO(data))


def link(tar: tarfile.TarFile, name: str, target: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


def write(path: Path, names: list[str], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            add(tar, name, jpeg(number))
    return path


def truth(path: Path) -> list[tuple[str, bytes]]:
    """Names and bytes of all files and links that end in .jpg, as tarfile reads them."""
    found = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.name.lower().endswith(".jpg"):
                file = tar.extractfile(member)
                assert file is not None
                found.append((member.name, file.read()))
    return found


def content(source: ShardSource) -> list[tuple[str, bytes]]:
    count = range(len(source.sizes))
    return [(source.name(i).partition(".tar:")[2], source.read(i)) for i in count]
