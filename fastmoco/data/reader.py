"""Reads the samples of a micro-batch and replaces the bad ones; runs in reader processes.

A sample that cannot be used is replaced by another that is a pure function of (seed, sample,
attempt). So every rank and every repetition delivers the same image in its place, and all others
stay as they were. Whether a sample is bad depends on its file alone.

n local batch.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastmoco.config import AugmentConfig, OneRankError
from fastmoco.data.decode import BadImage, decode, is_complete_jpeg, is_turned, jpeg_header
from fastmoco.data.order import permute, stream_key
from fastmoco.data.pixels.deep import Deep, decode_deep
from fastmoco.data.pixels.rule import PixelRule, check_pixels
from fastmoco.data.plan import Draw, Plan
from fastmoco.data.sources.source import Source
from fastmoco.data.table import Float32, Int64, view_table

_ATTEMPTS = 1000
# What reading a file says where it is damaged or deleted, or else everything beside it is gone: a
# disk that failed, a network mount that is lost or expired, a mount point without its disk.
_OF_A_DISK = {
    getattr(errno, name)
    for name in (
        *("EIO", "ENOTCONN", "ESTALE", "ENXIO", "ENODEV", "ESHUTDOWN", "EREMOTEIO"),
        *("ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENOENT", "ENOTDIR", "EACCES", "EPERM"),
    )
    if hasattr(errno, name)
}
_OTHERS = 8
_REPLACE = 17  # purpose of the key, apart from those of the epoch order


@dataclass(frozen=True)
class Encoded:
    """One sample as it will be decoded."""

    sample: int
    """Number in the source; not the one asked for where that is bad."""
    data: bytes
    """A plain JPEG as it lies in the file, or the pixels that PIL decoded as a PPM."""
    width: int
    height: int
    deep: Deep | None = None
    """Instead of `data`: the picture of a run with float views."""


@dataclass(frozen=True)
class Work:
    """A micro-batch before any pixel: encoded images and table rows."""

    queries: list[Encoded]
    keys: list[Encoded]
    """The same list as `queries` unless the keys are views of other samples."""
    rows_q: Float32
    """(n, COLUMNS), see `ViewTable.pack`."""
    rows_k: Float32
    """(n, COLUMNS)."""
    replaced: Int64
    """(n, 2): the query sample asked for and the one delivered."""


class Reader:
    """Fetches encoded samples. Pickles into reader processes; each keeps its own findings."""

    def __init__(self, source: Source, seed: int, rule: PixelRule) -> None:
        self.source, self.seed, self.rule = source, seed, rule
        self.bad: dict[int, str] = dict(source.bad)
        self.by_pil: set[int] = set()
        """Samples whose JPEG the decoder on the GPU refuses although PIL reads it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if multiprocessing.parent_process() is not None:  # unpickled in a reader process
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()

    def quarantine(self, found: Mapping[int, str]) -> None:
        """Never deliver these again; reasons by sample."""
        self.bad.update(found)

    def fetch(self, sample: int) -> Encoded:
        """The sample, or the one that replaces it. Raises `OneRankError` if no sample is good."""
        for attempt in range(_ATTEMPTS):
            candidate = sample if attempt == 0 else self._replacement(sample, attempt)
            if candidate in self.bad:
                continue
            try:
                return self.load(candidate)
            except BadImage as error:
                self.bad[candidate] = str(error)
        raise OneRankError(
            f"{self.source.name(sample)} cannot be used ({self.bad[sample]}), nor could any of "
            f"{_ATTEMPTS - 1} others in its place: look at data.root."
        )

    def load(self, sample: int) -> Encoded:
        """The sample itself. Raises `BadImage` with the reason."""
        data = read_sample(self.source, sample)
        if self.rule.float_views:
            deep = decode_deep(data, self.rule)
            return Encoded(sample, b"", *deep.size, deep)
        header = jpeg_header(data)
        if header is not None and header.plain and sample not in self.by_pil:
            check_pixels((header.width, header.height), self.rule.max_pixels)
            turned = self.rule.exif == "apply" and is_turned(data)
            if is_complete_jpeg(data, header) and not turned:
                return Encoded(sample, data, header.width, header.height)
        image = decode(data, self.rule)
        return Encoded(sample, ppm(image), image.width, image.height)

    def _replacement(self, sample: int, attempt: int) -> int:
        key = stream_key(self.seed, _REPLACE, attempt)
        return int(permute(np.array([sample]), len(self.source.sizes), key)[0])


def _end_with_parent(parent: int) -> None:
    """End with the parent: one that was killed cannot end its readers, and DALI's would wait."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def read_sample(source: Source, sample: int) -> bytes:
    """Encoded bytes.

    Raises `BadImage` where the file cannot be read, and `OneRankError` where others cannot be
    either: then it is not the file.
    """
    try:
        return source.read(sample)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _OF_A_DISK and not _any_other(source, sample):
            raise OneRankError(
                f"{source.name(sample)} cannot be read ({reason}), nor can others of the data "
                "set: its disk is gone, or its files were moved or changed; the same command goes "
                "on once they are back."
            ) from error
        raise BadImage(f"{type(error).__name__}: {reason}") from error


def _any_other(source: Source, sample: int) -> bool:
    """Whether any of a few others can be read, from all over the set."""
    total = len(source.sizes)
    few = {total * at // _OTHERS for at in range(_OTHERS)} - {sample, *source.bad}
    for other in sorted(few):
        with contextlib.suppress(OSError):
            source.read(other)
            return True
    return False


def decode_sample(source: Source, sample: int, rule: PixelRule) -> Image.Image | Deep:
    """The image. Raises `BadImage` where it cannot be read or decoded completely."""
    data = read_sample(source, sample)
    return decode_deep(data, rule) if rule.float_views else decode(data, rule)


def ppm(image: Image.Image) -> bytes:
    """RGB pixels with the shortest header that every decoder reads."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


def read_work(
    reader: Reader, plan: Plan, augment: AugmentConfig, micro_step: int, rows: slice | None = None
) -> Work:
    """Everything that an executor needs for the micro-batch, or for some rows of it."""
    queries = plan.queries(micro_step)
    for ahead in reader.source.ahead:
        reader.source.expect(plan.queries(micro_step + ahead).samples)
    keys = plan.keys(micro_step, queries)
    if rows is not None:
        queries, keys = queries.part(rows), keys.part(rows)
    encoded_q = [reader.fetch(sample) for sample in queries.samples.tolist()]
    encoded_k = encoded_q
    if plan.views == 1:
        encoded_k = []
    elif plan.key_rows is not None:
        encoded_k = [reader.fetch(sample) for sample in keys.samples.tolist()]
    delivered = np.array([one.sample for one in encoded_q], dtype=np.int64)
    return Work(
        queries=encoded_q,
        keys=encoded_k,
        rows_q=_rows(augment, queries, encoded_q),
        rows_k=_rows(augment, keys, encoded_k),
        replaced=np.stack([queries.samples, delivered], axis=1),
    )


def _rows(augment: AugmentConfig, draw: Draw, encoded: list[Encoded]) -> Float32:
    sizes = np.array([(one.width, one.height) for one in encoded], np.int32).reshape(-1, 2)
    return view_table(augment, draw.uniforms, sizes).pack()
