"""Features of the frozen trunk, and of raw pixels, for labelled images seen in one fixed view.

The view is the usual one for evaluation: shorter edge to `resize`, centre crop of `image_size`, no
randomness. Every rank computes the features of one contiguous share of the data set; the shares
concatenated in rank order are the data set in its own order, whatever the number of ranks.

n images, S side of the crop in pixels, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastmoco.evaluate.labelled_images import LabelledImages


def rank_share(n: int, rank: int, world_size: int) -> range:
    """The contiguous indices of rank's share of n; sizes of two shares differ by at most one.

    Raises `ValueError` unless 0 <= rank < world_size.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside of world_size {world_size}")
    return range(n * rank // world_size, n * (rank + 1) // world_size)


@torch.no_grad()
def extract_features(
    trunk: Callable[[Tensor], Tensor],
    images: LabelledImages,
    *,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """L2-normalized fp32 features (share, D), on `device`, of this rank's share of the images.

    trunk: takes uint8 (n, S, S, 3) on `device`, gives (n, D) of any float type; it normalizes the
        pixels itself and is in eval mode, which this function cannot see to.
    The share is `rank_share(len(images), rank, world_size)`; concatenated in rank order the shares
    are in data set order.

    Raises `ValueError` when the share is empty (fewer images than ranks) or batch_size < 1, and
    `ConfigError` for unreadable files.
    """
    share = rank_share(len(images), rank, world_size)
    if not share or batch_size < 1:
        raise ValueError(
            f"nothing to do: {len(images)} images on {world_size} ranks, batch_size {batch_size}"
        )
    features = []
    for pixels in images.batches(share, batch_size):
        output = trunk(pixels.to(device, non_blocking=True))
        features.append(functional.normalize(output.float(), dim=1))
    return torch.cat(features)


def raw_pixel_features(
    images: LabelledImages, *, size: int = 32, rank: int = 0, world_size: int = 1
) -> Tensor:
    """The baseline that learns nothing: fp32 (share, size * size * 3) on the CPU.

    Views larger than `size` are averaged down to (size, size, 3) by area. Each image loses its own
    mean over all pixels and channels, then is L2-normalized: the cosine of two features is the
    correlation of two pictures, so overall brightness and contrast do not count but colours do.
    A picture of one single gray has feature 0.
    """
    share = rank_share(len(images), rank, world_size)
    side = min(size, images.image_size)
    features = torch.empty(len(share), side * side * 3)
    done = 0
    for pixels in images.batches(share, 512):
        small = functional.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2).float(), side)
        flat = small.permute(0, 2, 3, 1).flatten(1)
        rows = functional.normalize(flat - flat.mean(dim=1, keepdim=True), dim=1)
        features[done : done + len(rows)] = rows
        done += len(rows)
    return features
