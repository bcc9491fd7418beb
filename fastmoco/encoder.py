"""Encoders: torchvision backbones with a projection head in place of the classifier.

N batch, S image side, D trunk width (512 or 2048), C feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet, resnet18, resnet34, resnet50, resnet101, resnext50_32x4d

from fastmoco.batchnorm import SplitBatchNorm2d
from fastmoco.config import ModelConfig

# ImageNet statistics of RGB in [0, 1], as the official pipeline normalizes.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

# What `run.precision` means to autocast.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

NormLayer = Callable[[int], nn.Module]


class WideResNet(resnet.ResNet):
    """ResNet-50 with every width multiplied: R50w2x and R50w4x of arXiv 1911.05722, section 4.1.

    torchvision's `wide_resnet50_2` widens only the inner 3x3 convolutions; here the stem and the
    block outputs widen too.
    """

    def __init__(self, width: int, norm_layer: NormLayer) -> None:
        self._width = width
        super().__init__(resnet.Bottleneck, [3, 4, 6, 3], norm_layer=norm_layer)
        stem = 64 * width
        self.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = norm_layer(stem)
        self.fc = nn.Linear(2048 * width, 1000)

    def _make_layer(
        self,
        block: type[resnet.BasicBlock | resnet.Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        if planes == 64:  # the first stage reads the widened stem
            self.inplanes = 64 * self._width
        return super()._make_layer(block, planes * self._width, blocks, stride, dilate)


BACKBONES: dict[str, Callable[..., resnet.ResNet]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnext50_32x4d": resnext50_32x4d,
    # The paper's RX50 has 46M parameters: 8 channels per group, which torchvision does not name.
    "resnext50_32x8d": partial(
        resnet.ResNet, resnet.Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=8
    ),
    "resnet50_w2x": partial(WideResNet, 2),
    "resnet50_w4x": partial(WideResNet, 4),
}


def build_encoder(config: ModelConfig, bn_group_size: int = 0) -> resnet.ResNet:
    """A torchvision ResNet whose `fc` is the projection head, in channels-last memory format.

    `bn_group_size` > 0 normalizes over runs of that many samples (`SplitBatchNorm2d`). Names in the
    state dict are torchvision's, with `fc.{weight,bias}` (linear) or `fc.{0,2}.*` (mlp).
    """
    norm = partial(SplitBatchNorm2d, group_size=bn_group_size) if bn_group_size else nn.BatchNorm2d
    encoder = BACKBONES[config.arch](norm_layer=norm)
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


def trunk_features(encoder: resnet.ResNet, x: Tensor) -> Tensor:
    """Features before the projection head: (N, 3, S, S) to (N, D)."""
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))
    x = encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(x))))
    return torch.flatten(encoder.avgpool(x), 1)


def normalize_pixels(images: Tensor) -> Tensor:
    """uint8 (N, S, S, 3) to fp32 (N, 3, S, S) in channels-last memory, zero mean and unit variance.

    The permutation is a view: NHWC memory *is* channels-last, and no byte moves. As one multiply
    and add per pixel it fuses into the first convolution's input under torch.compile.
    """
    std = torch.tensor(PIXEL_STD, device=images.device).view(1, 3, 1, 1)
    mean = torch.tensor(PIXEL_MEAN, device=images.device).view(1, 3, 1, 1)
    return torch.addcmul(-mean / std, images.permute(0, 3, 1, 2).float(), 1 / (255 * std))


class Embed(nn.Module):
    """Encoder from uint8 images to unit vectors; what autocast, torch.compile and DDP wrap.

    Images (N, S, S, 3) uint8 to fp32 (N, C) with unit Euclidean norm: the encoder runs in
    `precision`, the normalization of its output in fp32.
    """

    def __init__(self, encoder: resnet.ResNet, precision: torch.dtype) -> None:
        super().__init__()
        self.encoder = encoder
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images (N, S, S, 3) as fp32 (N, C)."""
        with torch.autocast(
            images.device.type, self.precision, enabled=self.precision != torch.float32
        ):
            features = self.encoder(normalize_pixels(images))
        return F.normalize(features.float(), dim=1)
