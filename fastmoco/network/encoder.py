"""Encoders: torchvision backbones with a projection head in place of the classifier.

N batch, S image side, D trunk width (512 or 2048), C feature dimension.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.config import DataConfig, ModelConfig
from fastmoco.network.batchnorm import SplitBatchNorm2d
from fastmoco.network.resnet import BACKBONES, WIDTHS, ResNet

# ImageNet statistics of RGB in [0, 1], as the official pipeline normalizes.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, where 255 is 1."""
IMAGENET: Statistics = (PIXEL_MEAN, PIXEL_STD)


def pixel_statistics(data: DataConfig) -> Statistics:
    """What images are normalized with, of a configuration that `resolve_pixels` has returned."""
    mean, std = data.mean, data.std
    return (
        PIXEL_MEAN if isinstance(mean, str) else mean,
        PIXEL_STD if isinstance(std, str) else std,
    )


def build_encoder(config: ModelConfig, bn_group_size: int = 0, channels: int = 3) -> ResNet:
    """A torchvision ResNet whose `fc` is the projection head, in channels-last memory format.

    It takes images of `channels` channels.

    `bn_group_size` > 0 normalizes over runs of that many samples (`SplitBatchNorm2d`). Names in the
    state dict are torchvision's, with `fc.{weight,bias}` (linear) or `fc.{0,2}.*` (mlp).
    """
    encoder = BACKBONES[config.arch](
        norm_layer=partial(SplitBatchNorm2d, group_size=bn_group_size),
        width=config.width * WIDTHS.get(config.arch, 1.0),
    )
    if config.stem == "cifar" or channels != 3:
        side, stride = (3, 1) if config.stem == "cifar" else (7, 2)
        encoder.conv1 = nn.Conv2d(
            channels, encoder.conv1.out_channels, side, stride, padding=side // 2, bias=False
        )
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    if config.stem == "cifar":
        encoder.add_module("maxpool", nn.Identity())
    width = encoder.fc.in_features
    last = nn.Linear(width, config.dim)
    linear = config.head == "linear"
    head = last if linear else nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)
    encoder.add_module("fc", head)
    return encoder.to(memory_format=torch.channels_last)


class NormalizePixels(nn.Module):
    """uint8 (N, S, S, 3) to fp32 (N, 3, S, S) in channels-last memory, zero mean, unit variance.

    Also float32 views of any number of channels. mean, std: of each channel, where 255 is 1.

    The permutation is a view: NHWC memory *is* channels-last, and no byte moves. As one multiply
    and add per pixel it fuses into the first convolution's input under torch.compile. Its constants
    live on `device`, because to make them there in each step would stall the host, and they stay
    out of state dicts.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, device: torch.device | str = "cpu", statistics: Statistics = IMAGENET
    ) -> None:
        super().__init__()
        mean, std = (torch.tensor(c, device=device).view(1, -1, 1, 1) for c in statistics)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images on the device of the constants."""
        return torch.addcmul(self.shift, images.permute(0, 3, 1, 2).float(), self.scale)


class Embed(nn.Module):
    """Encoder from uint8 images to unit vectors; what autocast, torch.compile and DDP wrap.

    Images (N, S, S, 3) uint8 to fp32 (N, C) with unit Euclidean norm: the encoder runs in
    `precision`, the normalization of its output in fp32.
    """

    def __init__(
        self, encoder: ResNet, precision: torch.dtype, statistics: Statistics = IMAGENET
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalize_pixels = NormalizePixels(next(encoder.parameters()).device, statistics)
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images (N, S, S, 3) as fp32 (N, C)."""
        with torch.autocast(
            images.device.type, self.precision, enabled=self.precision != torch.float32
        ):
            features = self.encoder(self.normalize_pixels(images))
        return F.normalize(features.float(), dim=1)
