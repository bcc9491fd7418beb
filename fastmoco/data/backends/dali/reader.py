"""What a DALI reader process runs: encoded images and photometric rows of one micro-batch.

Imported by those processes, so neither torch nor DALI is imported here.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.config import AugmentConfig
from fastmoco.data.backends.lifetime import outlast_the_trainer
from fastmoco.data.photometric_rows import photometric_rows
from fastmoco.data.plan import Plan
from fastmoco.data.reader import Encoded, Reader, Work, read_work
from fastmoco.data.table import ViewTable


class Delivery:
    """Call i delivers micro-batch first + i: images, two lists of rows, replacements, key images.

    The last list is there only where the keys are views of other samples than the queries.
    """

    def __init__(self, reader: Reader, plan: Plan, augment: AugmentConfig, first: int) -> None:
        self.reader, self.plan, self.augment, self.first = reader, plan, augment, first

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if multiprocessing.parent_process() is not None:  # in a reader process
            outlast_the_trainer()

    def __call__(self, iteration: int) -> tuple[list[NDArray[Any]], ...]:
        work = read_work(self.reader, self.plan, self.augment, self.first + iteration)
        return self.pack(work, self.augment.recipe)

    @staticmethod
    def pack(work: Work, recipe: str) -> tuple[list[NDArray[Any]], ...]:
        """The five lists, four where queries and keys are the same images, three without keys."""
        rows_q, rows_k = (
            list(photometric_rows(ViewTable.unpack(rows), recipe))
            for rows in (work.rows_q, work.rows_k)
        )
        if not work.keys:
            return _bytes(work.queries), rows_q, list(work.replaced)
        delivered = (_bytes(work.queries), rows_q, rows_k, list(work.replaced))
        same = work.keys is work.queries
        return delivered if same else (*delivered, _bytes(work.keys))


def _bytes(encoded: list[Encoded]) -> list[NDArray[Any]]:
    return [np.frombuffer(one.data, dtype=np.uint8) for one in encoded]
