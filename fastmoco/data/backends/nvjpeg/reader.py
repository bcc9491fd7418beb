"""What a reader process of the `nvjpeg` backend runs: the encoded pictures of one micro-batch."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmoco.config import AugmentConfig
from fastmoco.data.photometric_rows import photometric_rows
from fastmoco.data.plan import Plan
from fastmoco.data.reader import Encoded, Reader, Work, read_work
from fastmoco.data.table import Float32, Int64, ViewTable


class Delivery(NamedTuple):
    """m pictures and B views of them: those of the queries, then those of the keys."""

    data: Tensor
    """uint8, the bytes of all pictures one after the other; shared memory between processes."""
    ends: list[int]
    """Where each of the m ends in `data`."""
    samples: list[int]
    """Their numbers in the source, each once."""
    sizes: list[tuple[int, int]]
    """Their heights and widths."""
    which: Int64
    """(B,): the picture of each view."""
    rows: Float32
    """(B, columns), see `photometric_rows`."""
    replaced: Int64
    """See `Work`."""

    @property
    def pictures(self) -> list[Tensor]:
        """The encoded pictures, uint8 (bytes,) each."""
        starts = [0, *self.ends[:-1]]
        return [self.data[a:b] for a, b in zip(starts, self.ends, strict=True)]


class Deliveries(Dataset[Delivery]):
    """Item m is micro-batch m; there is no last one."""

    def __init__(self, reader: Reader, plan: Plan, augment: AugmentConfig) -> None:
        self.reader, self.plan, self.augment = reader, plan, augment

    def __getitem__(self, micro_step: int) -> Delivery:
        work = read_work(self.reader, self.plan, self.augment, micro_step)
        return pack(work, self.augment.recipe)


def pack(work: Work, recipe: str) -> Delivery:
    """The delivery of a micro-batch: a picture that several views are of is in it once."""
    views = work.queries + work.keys
    different: dict[int, Encoded] = {one.sample: one for one in views}
    place = {sample: number for number, sample in enumerate(different)}
    tables = [ViewTable.unpack(packed) for packed in (work.rows_q, work.rows_k)]
    encoded = list(different.values())
    return Delivery(
        data=torch.frombuffer(bytearray(b"".join(one.data for one in encoded)), dtype=torch.uint8),
        ends=list(itertools.accumulate(len(one.data) for one in encoded)),
        samples=list(different),
        sizes=[(one.height, one.width) for one in encoded],
        which=np.array([place[one.sample] for one in views], np.int64),
        rows=np.concatenate([photometric_rows(table, recipe) for table in tables]),
        replaced=work.replaced,
    )
