"""Features of the frozen trunk, and of raw pixels, for images seen in one fixed view.

The monitor, kNN, linear classification, retrieval and `embed` all take their features from here,
so the same weights and the same file give the same bits in all of them. For that every forward
pass has exactly `batch_size` rows: a short batch is filled up with black, whose rows are dropped.
On the CPU a row's bits depend on the number of rows in its batch (a batch of one takes other
kernels), but neither on its place nor on the other rows; tests/evaluate/test_features.py holds it.
On CUDA the same is expected of one device model and library version, and not promised.

Every rank computes the features of one contiguous share of the data set; the shares concatenated
in rank order are the data set in its own order, whatever the number of ranks.

n images, S side of the crop in pixels, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastmoco.config import ConfigError
from fastmoco.evaluate.labelled_images import ImageSet
from fastmoco.machine.collectives import gather_rows
from fastmoco.machine.ranks import World
from fastmoco.network.encoder import IMAGENET, NormalizePixels, Statistics, pixel_statistics
from fastmoco.network.resnet import ResNet
from fastmoco.weights.read import Weights

BATCH_SIZE = 256
"""Rows of a forward pass where nobody says otherwise; also of the monitor in training."""


def trunk_of(weights: Weights) -> ResNet:
    """The trunk of a file: the encoder of training, so that its features are the monitor's.

    Its `fc` is the identity; fp32, on the CPU.
    """
    encoder = weights.architecture.encoder()
    encoder.add_module("fc", torch.nn.Identity())
    encoder.load_state_dict(weights.trunk)
    return encoder


class FrozenTrunk:
    """Images (n, S, S, C) on `device`, uint8 or float32, to trunk features fp32 (n, D).

    Without gradient.

    The encoder runs under autocast in `precision` (fp32: without), in eval mode, which is set for
    each call and restored after it.
    """

    def __init__(
        self,
        encoder: ResNet,
        precision: torch.dtype,
        device: torch.device | str = "cpu",
        statistics: Statistics = IMAGENET,
    ) -> None:
        self.encoder = encoder
        self.precision = precision
        self.device = torch.device(device)
        self.statistics = statistics
        self._normalize_pixels = NormalizePixels(device, statistics)

    @classmethod
    def of(
        cls, weights: Weights, precision: torch.dtype, device: torch.device | str = "cpu"
    ) -> FrozenTrunk:
        """The trunk of a file, frozen."""
        encoder = trunk_of(weights).requires_grad_(False)
        statistics = pixel_statistics(weights.pixels)
        return cls(encoder.to(device).eval(), precision, device, statistics)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        training = self.encoder.training
        self.encoder.eval()
        kind, on = self.device.type, self.precision != torch.float32
        with torch.autocast(kind, self.precision, enabled=on):
            features = self.encoder.trunk(self._normalize_pixels(images)).float()
        self.encoder.train(training)
        return features


def rank_share(n: int, rank: int, world_size: int) -> range:
    """The contiguous indices of rank's share of n; sizes of two shares differ by at most one.

    Raises `ValueError` unless 0 <= rank < world_size.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside of world_size {world_size}")
    return range(n * rank // world_size, n * (rank + 1) // world_size)


@torch.no_grad()
def stream_features(
    trunk: Callable[[Tensor], Tensor],
    images: ImageSet,
    share: range,
    *,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[Tensor]:
    """Features (<= batch_size, D), on `device`, of a share of the images: each once, in order.

    trunk: takes (batch_size, S, S, C) on `device`, gives (batch_size, D).
    Rows of bad images are meaningless; `images.good(share)` tells them once their batch is here.
    """
    for pixels in images.batches(share, batch_size):
        full = filled_up(pixels, batch_size)
        yield trunk(full.to(device, non_blocking=True))[: len(pixels)]


def filled_up(pixels: Tensor, batch_size: int) -> Tensor:
    """(n <= batch_size, S, S, C) with black images after the last, (batch_size, S, S, C)."""
    if len(pixels) == batch_size:
        return pixels
    full = pixels.new_zeros(batch_size, *pixels.shape[1:])
    full[: len(pixels)] = pixels
    return full


def extract_features(
    trunk: Callable[[Tensor], Tensor],
    images: ImageSet,
    *,
    batch_size: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    normalized: bool = True,
) -> Tensor:
    """fp32 (share, D), on `device`, of this rank's share of the images; L2-normalized unless not.

    See `stream_features`. The share is `rank_share(len(images), rank, world_size)`; concatenated
    in rank order the shares are in data set order.

    Raises `ConfigError`, on all ranks alike, where there are fewer images than ranks, and
    `ValueError` for batch_size < 1.
    """
    if len(images) < max(1, world_size):
        raise ConfigError(
            f"{len(images)} images cannot be shared by {world_size} ranks: give more images, or "
            "start fewer ranks."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1")
    share = rank_share(len(images), rank, world_size)
    streamed = stream_features(trunk, images, share, batch_size=batch_size, device=device)
    if normalized:
        return torch.cat([functional.normalize(rows.float(), dim=1) for rows in streamed])
    return torch.cat([rows.float() for rows in streamed])


@dataclass(frozen=True)
class Shared:
    """This rank's share of a set without its bad images, and which ones all ranks have."""

    features: Tensor
    """(share, D) of the good images of this rank's share, in order."""
    kept: Tensor
    """int64 on the CPU: numbers of the good images of all ranks, in order."""


def without_bad(features: Tensor, images: ImageSet, world: World) -> Shared:
    """Agree over the ranks which images are bad, and drop their rows. All ranks call it.

    features: (share, D) of this rank's `rank_share`, computed, so that its bad images are known.
    """
    good = images.good(rank_share(len(images), world.rank, world.size))
    everywhere = gather_rows(good.long()[:, None], world)[:, 0].bool().cpu()
    images.exclude((~everywhere).nonzero()[:, 0].tolist())
    return Shared(features[good.to(features.device)], everywhere.nonzero()[:, 0])


def pixel_features(pixels: Tensor, size: int = 32) -> Tensor:
    """Images (n, S, S, C) to fp32 (n, size * size * C): the baseline that learns nothing.

    Views larger than `size` are averaged down to (size, size, C) by area; smaller ones keep their
    own. Each image loses its own mean over all pixels and channels, then is L2-normalized: the
    cosine of two features is the correlation of two pictures, so overall brightness and contrast do
    not count but colours do. A picture of one single gray has feature 0.
    """
    side = min(size, pixels.shape[1])
    small = functional.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2).float(), side)
    flat = small.permute(0, 2, 3, 1).flatten(1)
    return functional.normalize(flat - flat.mean(dim=1, keepdim=True), dim=1)


def raw_pixel_features(
    images: ImageSet, *, size: int = 32, rank: int = 0, world_size: int = 1
) -> Tensor:
    """`pixel_features` of this rank's share of the images, on the CPU."""
    share = rank_share(len(images), rank, world_size)
    side = min(size, images.image_size)
    features = torch.empty(len(share), side * side * images.rule.channels)
    done = 0
    for pixels in images.batches(share, 512):
        features[done : done + len(pixels)] = pixel_features(pixels, size)
        done += len(pixels)
    return features
