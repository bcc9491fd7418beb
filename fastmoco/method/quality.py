"""How good features are, told without labels: how they spread over the unit sphere.

Sums over the steps of a window stay on the device, in float64 and O(C^2) memory, from the queries
and keys that a step has computed anyway. From them follow, for queries (`_q`) and keys (`_k`):

- `std`: standard deviation per dimension, mean over dimensions. 1/sqrt(C) (`std_even`) where the
  features fill the sphere evenly, 0 where all are the same (section 4.1 of arXiv 2011.10566).
- `effective_rank`: exp of the entropy of the singular values of all features stacked, which are
  divided by their sum; between 1 and C (RankMe, arXiv 2210.02885, there of the trunk's features).
- `alignment`: mean of |q - k|^2 over positive pairs, from 0 to 4; `uniformity`: log of the mean of
  exp(-2 |x - y|^2) over pairs of different images, from -8 to 0, lower where they spread more
  (arXiv 2005.10242).

The encoder moves within a window, and BN normalizes with the statistics of the batch: compare
windows of one run with each other.
N rows of a part, P parts of a step (micro-batches times directions), C feature dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Pairs for the uniformity are those among the first rows of each part: N^2 pairs of a large batch
# would cost memory and tell no more.
PAIRED_ROWS = 256


class FeatureSums:
    """Sums over the queries and keys of a window on one rank. `add` only enqueues device work."""

    flat: Tensor
    """Every sum, float64 (2 (C + 1)^2 + 4,): what ranks add up and what `quality` reads."""

    def __init__(self, dim: int, device: torch.device) -> None:
        side = dim + 1
        self.flat = torch.zeros(2 * side * side + 4, dtype=torch.float64, device=device)
        moments, self._potential, self._pairs, self._distance = _parts(self.flat)
        self._moments = moments.view(2, side, side)

    def add(self, q: Tensor, k: Tensor, counts: Tensor) -> None:
        """Count queries and their positives, (P, N, C) unit vectors each, if `counts`, () bool.

        float64, because products in TF32 or sums in fp32 would hide small singular values.
        """
        z = torch.where(counts, torch.stack([q, k]).double(), 0.0)
        # With a column of ones the same product holds second moments, sums and the count.
        rows = F.pad(z.flatten(1, 2), (0, 1), value=1.0) * counts
        self._moments.baddbmm_(rows.mT, rows)
        near = z[:, :, :PAIRED_ROWS]
        parts, n = near.shape[1:3]
        # |x - y|^2 = 2 - 2 x.y; the n pairs of a row with itself give 1 each.
        energy = (near @ near.mT).sub_(1).mul_(4).exp_().sum((1, 2, 3)) - parts * n
        self._potential += energy * counts
        self._pairs += parts * n * (n - 1) * counts
        self._distance += (z[0] - z[1]).square().sum()


def _parts(flat: Tensor) -> tuple[Tensor, ...]:
    """Moments of queries and keys, potential of both, pairs, squared distances; views."""
    moments, potential, pairs, distance = flat.split([len(flat) - 4, 2, 1, 1])
    return moments, potential, pairs, distance


def quality(total: Tensor) -> dict[str, float]:
    """Metrics from `FeatureSums.flat`, added up over ranks, on the host.

    `features` is the number of queries that they were computed from. What cannot be told is left
    out: all of it where a feature was not finite, uniformity where there was no pair.
    """
    flat, potential, pairs, distance = _parts(total)
    side = math.isqrt(len(flat) // 2)
    moments = flat.view(2, side, side)
    count = float(moments[0, -1, -1])
    if not count or not bool(total.isfinite().all()):
        return {}
    found = {
        "features": count,
        "std_even": (side - 1) ** -0.5,
        "alignment": float(distance) / count,
    }
    for which, matrix, energy in zip("qk", moments / count, potential.tolist(), strict=True):
        second, mean = matrix[:-1, :-1], matrix[-1, :-1]
        variance = (second.diagonal() - mean.square()).clamp_min(0)
        found[f"std_{which}"] = float(variance.sqrt().mean())
        found[f"effective_rank_{which}"] = effective_rank(second)
        if pairs > 0 and energy > 0:
            found[f"uniformity_{which}"] = math.log(energy / float(pairs))
    return found


def effective_rank(second_moments: Tensor) -> float:
    """Effective rank of features from the (C, C) matrix of their second moments, not centred.

    Its eigenvalues are the squares of the singular values of the stacked features, up to a factor.
    """
    singular = torch.linalg.eigvalsh(second_moments).clamp_min(0).sqrt()
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())
