"""What a backend makes, the loader hands on and the step trains on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fastmoco.data.table import Int64


@dataclass(frozen=True)
class Batch:
    """Two augmented views of the n samples of a micro-batch on one rank."""

    im_q: Tensor
    """uint8 (n, S, S, 3), or float32 (n, S, S, channels), on the device: for encoder_q."""
    im_k: Tensor
    """As `im_q`: the views for encoder_k; none for labels."""
    replaced: Int64 = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """(n, 2): the query sample asked for and the one delivered; empty for images of no source."""
