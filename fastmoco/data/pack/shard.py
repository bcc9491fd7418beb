"""One shard of a pack: a tar file, its index for the loader and its manifest for people.

NNNNNN.tar holds images in the order of the pack, as `SAMPLE.jpg`. Beside it lie the index, which
`data.source shards` reads instead of every header, and NNNNNN.jsonl, a manifest with a line per
image. That is written last: where it is, the shard is complete.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastmoco.data.pack.shrink import Packed
from fastmoco.data.sources.index import Index, load_index, save_index
from fastmoco.data.sources.shards import head_of, index_beside, stamp
from fastmoco.machine import durable

_BLOCK = 512
Line = dict[str, Any]


class Shard:
    """A shard of a pack in a folder."""

    def __init__(self, folder: Path, number: int) -> None:
        self.tar = folder / f"{number:06d}.tar"
        self.manifest = folder / f"{number:06d}.jsonl"

    def counts(self) -> dict[str, int] | None:
        """What the shard holds, as `write` counted it; None where it is not complete."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            facts = load_index(str(index_beside(self.tar))).facts
            if self.manifest.exists() and facts["packed"][0] == self.tar.stat().st_size:
                return dict(facts["pack"])
        return None

    def write(
        self, images: Iterable[tuple[int, Packed]], line: Callable[[int], Line], max_pixels: int
    ) -> None:
        """Write images, each with its number in the source, to the disk. Raises `OSError`.

        line: what the manifest says of an image of the source beside what is known here.
        """
        lines: list[Line] = []
        offsets: list[int] = []
        good: list[Packed] = []

        def put(partial: Path) -> None:
            with open(partial, "wb") as file:
                for sample, image in images:
                    lines.append(line(sample) | _line(sample, image))
                    if not image.bad:
                        offsets.append(_append(file, lines[-1]["member"], image.data))
                        good.append(image._replace(data=b""))
                file.write(bytes(2 * _BLOCK))

        durable.replace(self.tar, put)
        index = Index(
            {
                "sizes": np.array([(i.width, i.height) for i in good], np.int32).reshape(-1, 2),
                "offsets": np.array(offsets, np.int64),
                "lengths": np.array([x["bytes"] for x in lines if "bytes" in x], np.uint32),
            },
            {
                **{"bad": {}, "end": "", "others": {}, "beside": 0},
                "stamp": [*stamp(self.tar), max_pixels, False],
                "packed": head_of(self.tar),
                "pack": {
                    "images": len(good),
                    "kept": sum(image.kept for image in good),
                    "bad": len(lines) - len(good),
                    "bytes": self.tar.stat().st_size,
                },
            },
        )
        save_index(index, index_beside(self.tar))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        durable.replace(
            self.manifest, lambda partial: partial.write_text(text, "utf-8", "backslashreplace")
        )


def _line(sample: int, image: Packed) -> Line:
    if image.bad:
        return {"bad": image.bad}
    return {
        "member": f"{sample:09d}{image.suffix}",
        "bytes": len(image.data),
        "sha256": image.digest(),
        "size": [image.width, image.height],
        "original_size": list(image.original),
        "kept": image.kept,
    }


def _append(file: BinaryIO, name: str, data: bytes) -> int:
    """Write a member that is the same on every machine; where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    at = file.tell()
    file.write(data + bytes(-len(data) % _BLOCK))
    return at
