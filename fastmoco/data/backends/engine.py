"""What the backends have in common: they make micro-batches of views ahead of time.

n local batch, S side of a view.
"""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from fastmoco.data.batch import Batch
from fastmoco.data.pixels.rule import PixelRule
from fastmoco.data.table import ViewTable


class Executor(Protocol):
    """Makes one view after another on the CPU, for one thread."""

    def decode(self, data: bytes, rule: PixelRule) -> Any:
        """The image that `execute` takes. Raises `BadImage`."""

    def execute(self, image: Any, table: ViewTable, row: int) -> NDArray[Any]:
        """One view of an image, uint8 (S, S, 3) or float32 (S, S, C)."""


class Engine(Protocol):
    """An executor of the table that makes micro-batches ahead of time."""

    backend: str
    """Its name: `dali`, `nvjpeg`, `array`, `pil` or `synthetic`."""
    description: str
    """One line: backend, processes, threads and prefetch depth that were chosen."""

    def start(self, micro_step: int) -> None:
        """Begin at this micro-batch, dropping whatever is on its way."""

    def next(self) -> Batch:
        """The next micro-batch, on the device."""

    def close(self) -> None:
        """End every process and free all memory; may be called twice."""
