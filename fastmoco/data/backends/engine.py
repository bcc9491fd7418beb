"""What the backends have in common: they make micro-batches of views ahead of time.

n local batch, S side of a view.
"""

from __future__ import annotations

from typing import Protocol

from fastmoco.data.batch import Batch


class Engine(Protocol):
    """An executor of the table that makes micro-batches ahead of time."""

    def start(self, micro_step: int) -> None:
        """Begin at this micro-batch, dropping whatever is on its way."""

    def next(self) -> Batch:
        """The next micro-batch, on the device."""

    def close(self) -> None:
        """End every process and free all memory; may be called twice."""
