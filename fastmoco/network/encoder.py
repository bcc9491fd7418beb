"""Encoders: torchvision backbones with a projection head in place of the classifier.

N batch, S image side, D trunk width (512 or 2048), C feature dimension.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.config import ModelConfig
from fastmoco.network.batchnorm import SplitBatchNorm2d
from fastmoco.network.resnet import BACKBONES, WIDTHS, ResNet

# ImageNet statistics of RGB in [0, 1], as the official pipeline normalizes.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def build_encoder(config: ModelConfig, bn_group_size: int = 0) -> ResNet:
    """A torchvision ResNet whose `fc` is the projection head, in channels-last memory format.

    `bn_group_size` > 0 normalizes over runs of that many samples (`SplitBatchNorm2d`). Names in the
    state dict are torchvision's, with `fc.{weight,bias}` (linear) or `fc.{0,2}.*` (mlp).
    """
    encoder = BACKBONES[config.arch](
        norm_layer=partial(SplitBatchNorm2d, group_size=bn_group_size),
        width=config.width * WIDTHS.get(config.arch, 1.0),
    )
    if config.stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, encoder.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.add_module("maxpool", nn.Identity())
    width = encoder.fc.in_features
    last = nn.Linear(width, config.dim)
    linear = config.head == "linear"
    head = last if linear else nn.Sequential(nn.Linear(width, width), nn.ReLU(), last)
    encoder.add_module("fc", head)
    return encoder.to(memory_format=torch.channels_last)


class NormalizePixels(nn.Module):
    """uint8 (N, S, S, 3) to fp32 (N, 3, S, S) in channels-last memory, zero mean, unit variance.

    The permutation is a view: NHWC memory *is* channels-last, and no byte moves. As one multiply
    and add per pixel it fuses into the first convolution's input under torch.compile. Its constants
    live on `device`, because to make them there in each step would stall the host, and they stay
    out of state dicts.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__()
        mean, std = (
            torch.tensor(c, device=device).view(1, 3, 1, 1) for c in (PIXEL_MEAN, PIXEL_STD)
        )
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

    def __init__(self, encoder: ResNet, precision: torch.dtype) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalize_pixels = NormalizePixels(next(encoder.parameters()).device)
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images (N, S, S, 3) as fp32 (N, C)."""
        with torch.autocast(
            images.device.type, self.precision, enabled=self.precision != torch.float32
        ):
            features = self.encoder(self.normalize_pixels(images))
        return F.normalize(features.float(), dim=1)
