"""ResNets of torchvision in which batch norm, addition and ReLU are one call.

Modules, their names and their initial values are torchvision's, and so is the function computed.
One call instead of two or three after a convolution lets a kernel fuse them.

N batch, S image side, D trunk width (512 or 2048).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from fastmoco.network.convolution import adopt
from fastmoco_kernels import max_pool

NormLayer = Callable[[int], nn.Module]
"""Makes, for a number of channels, a module that is called as norm(x, residual=..., relu=...)."""


class MaxPool2d(nn.MaxPool2d):
    """Max pooling behind the stem: 3 wide, in steps of 2."""

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H / 2, W / 2)."""
        # What Inductor writes for ATen's backward adds with atomics: slower, and never twice alike.
        if torch.compiler.is_compiling() and input.is_cuda:
            return max_pool(input, kernel=3, stride=2, padding=1)
        y: Tensor = super().forward(input)
        return y


class BasicBlock(resnet.BasicBlock):
    """Two 3x3 convolutions, of ResNet-18 and 34."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, planes, H / stride, W / stride)."""
        out: Tensor = self.bn1(self.conv1(x), relu=True)
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(out), residual=identity, relu=True)
        return out


class Bottleneck(resnet.Bottleneck):
    """1x1, 3x3 and 1x1 convolutions, of ResNet-50 and larger."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, 4 planes, H / stride, W / stride)."""
        out: Tensor = self.bn1(self.conv1(x), relu=True)
        out = self.bn2(self.conv2(out), relu=True)
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn3(self.conv3(out), residual=identity, relu=True)
        return out


class ResNet(resnet.ResNet):
    """torchvision's ResNet on the blocks above.

    `width` multiplies every number of channels: 2 and 4 are R50w2x and R50w4x of arXiv 1911.05722,
    section 4.1. torchvision's `wide_resnet50_2` widens only the inner 3x3 convolutions; here the
    stem and the block outputs widen too.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        width: float = 1.0,
        **options: Any,
    ) -> None:
        self._width = width
        super().__init__(block, layers, **options)
        self.maxpool = MaxPool2d()
        if width != 1:
            stem = self._channels(64)
            self.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = self._norm_layer(stem)
            self.fc = nn.Linear(self._channels(512) * block.expansion, 1000)
        adopt(self)

    def _channels(self, planes: int) -> int:
        return round(planes * self._width)

    def _make_layer(
        self,
        block: type[resnet.BasicBlock | resnet.Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        if planes == 64:  # the first stage reads the stem
            self.inplanes = self._channels(64)
        return super()._make_layer(block, self._channels(planes), blocks, stride, dilate)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, S, S) to what `fc` makes of their features."""
        out: Tensor = self.fc(self.trunk(x))
        return out

    def trunk(self, x: Tensor) -> Tensor:
        """Features before the projection head: (N, 3, S, S) to (N, D)."""
        x = self.maxpool(self.bn1(self.conv1(x), relu=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)


# Factor on every number of channels that the name of an architecture stands for.
WIDTHS = {"resnet50_w2x": 2.0, "resnet50_w4x": 4.0}

BACKBONES: dict[str, Callable[..., ResNet]] = {
    "resnet18": partial(ResNet, BasicBlock, [2, 2, 2, 2]),
    "resnet34": partial(ResNet, BasicBlock, [3, 4, 6, 3]),
    "resnet50": partial(ResNet, Bottleneck, [3, 4, 6, 3]),
    "resnet101": partial(ResNet, Bottleneck, [3, 4, 23, 3]),
    "resnext50_32x4d": partial(ResNet, Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4),
    # The paper's RX50 has 46M parameters: 8 channels per group, which torchvision does not name.
    "resnext50_32x8d": partial(ResNet, Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=8),
    "resnet50_w2x": partial(ResNet, Bottleneck, [3, 4, 6, 3], width=WIDTHS["resnet50_w2x"]),
    "resnet50_w4x": partial(ResNet, Bottleneck, [3, 4, 6, 3], width=WIDTHS["resnet50_w4x"]),
}
