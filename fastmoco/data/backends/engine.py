"""What the backends have in common: they make micro-batches of views ahead of time.

n local batch, S side of a view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastmoco.data.table import Int64


@dataclass(frozen=True)
class Views:
    """The two views of a micro-batch of n samples, and what was replaced in it."""

    im_q: Tensor
    """(n, S, S, 3) uint8."""
    im_k: Tensor
    """(n, S, S, 3) uint8."""
    replaced: Int64
    """(n, 2): the query sample asked for and the one delivered."""


class Engine(Protocol):
    """An executor of the table that makes micro-batches ahead of time."""

    def start(self, micro_step: int) -> None:
        """Begin at this micro-batch, dropping whatever is on its way."""

    def next(self) -> Views:
        """The next micro-batch, on the device."""

    def close(self) -> None:
        """End every process and free all memory; may be called twice."""
