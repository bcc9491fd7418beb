"""What every source of images offers to the loader.

Training never sees a label. A sample that was unreadable while indexing keeps its number, so that
one bad file does not change which samples the others are; readers replace it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Source(Protocol):
    """N encoded images. Objects are small when pickled, so that reader processes start fast."""

    @property
    def ahead(self) -> tuple[int, ...]:
        """How many micro-batches ahead `expect` is told of; none where reading is fast."""

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2): width and height in pixels; 0 where the image could not be read."""

    @property
    def bad(self) -> dict[int, str]:
        """Reason by sample, for those found unreadable while indexing."""

    @property
    def notes(self) -> list[str]:
        """What indexing found that a user may want to know, one sentence each."""

    @property
    def warnings(self) -> list[str]:
        """What indexing left out that a user should act on, one sentence each."""

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples of each run of neighbours that are fast to read together; they add up to N."""

    def read(self, sample: int) -> bytes:
        """Encoded bytes. Raises `OSError`."""

    def expect(self, samples: NDArray[np.int64]) -> None:
        """These will be read soon: a source far away fetches them in the background."""

    def stamp(self, sample: int) -> list[int]:
        """Size and modification time of the file with the sample; empty if it is not there."""

    def name(self, sample: int) -> str:
        """What to call the sample in a report."""

    def relative_names(self) -> Iterator[bytes]:
        """What tells each sample from all others, wherever the data set lies; N of them."""

    def fingerprint(self) -> str:
        """Changes when a sample is added, removed, renamed or found to have another size."""
