"""What an executor of the table hands to the loader."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastmoco.data.augment import Int64


@dataclass(frozen=True)
class Views:
    """The two views of a micro-batch of n samples, and what was replaced in it."""

    im_q: Tensor
    """(n, S, S, 3) uint8."""
    im_k: Tensor
    """(n, S, S, 3) uint8."""
    replaced: Int64
    """(n, 2): the query sample asked for and the one delivered."""
