"""The paper's network of semantic segmentation: a fully convolutional head on a trunk.

arXiv 1911.05722, appendix "Semantic segmentation": the 3x3 convolutions of res5 have stride 1 and
dilation 2; behind them two 3x3 convolutions of 256 channels and dilation 6, each with batch norm
and ReLU, and a 1x1 convolution to the classes. Scores are enlarged sixteenfold. All batch norm is
tuned and synchronized.

n pictures, H W their size, D trunk width, C classes with the background.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import ResNet

from fastmoco.machine.collectives import all_gather
from fastmoco.machine.ranks import World
from fastmoco.network.encoder import pixel_statistics
from fastmoco.transfer.batchnorm import SyncBatchNorm2d
from fastmoco.transfer.datasets.segmentation import IGNORE
from fastmoco.transfer.detector import tuned_trunk
from fastmoco.weights.read import Weights

STRIDE = 16
HIDDEN = 256
DILATION = 6
"""Of the two convolutions in the head."""


def dilate(layer4: nn.Module) -> None:
    """Replace the stride of res5 by dilation: 3x3 convolutions see as far as before."""
    for module in layer4.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (2, 2)


class Segmenter(nn.Module):
    """Pictures, uint8 (n, 3, H, W), to scores of classes at their size, float32 (n, C, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Weights, world: World, classes: int, seed: int) -> None:
        """`seed` draws the head. Raises `ConfigError` as `tuned_trunk` does."""
        super().__init__()
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in pixel_statistics(weights.pixels))
        self.register_buffer("mean", 255 * mean, persistent=False)
        self.register_buffer("std", 255 * std, persistent=False)
        self.network: ResNet = tuned_trunk(weights, world)
        dilate(self.network.layer4)
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for inputs in (weights.features, HIDDEN):
                convolution = nn.Conv2d(
                    inputs, HIDDEN, 3, padding=DILATION, dilation=DILATION, bias=False
                )
                layers += [convolution, SyncBatchNorm2d(HIDDEN, world), nn.ReLU()]
            self.head = nn.Sequential(*layers, nn.Conv2d(HIDDEN, classes, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores of classes."""
        x = (pictures - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        scores: Tensor = self.head(self.maps(x)).to(self.mean.dtype)
        return functional.interpolate(
            scores, pictures.shape[2:], mode="bilinear", align_corners=False
        )

    def maps(self, x: Tensor) -> Tensor:
        """Normalized pictures to the output of res5, (n, D, H / 16, W / 16)."""
        one = self.network
        x = one.maxpool(one.relu(one.bn1(one.conv1(x))))
        x = one.layer4(one.layer3(one.layer2(one.layer1(x))))
        return x


class SegmentationLoss(nn.Module):
    """Cross-entropy of a `Segmenter`, as a mean over the labelled pixels of all ranks."""

    def __init__(self, model: Segmenter, world: World) -> None:
        super().__init__()
        self.model = model
        self.world = world

    def forward(self, pictures: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """pictures: (n, 3, H, W). labels: int64 (n, H, W), 255 where there is none."""
        scores = self.model(pictures)
        total = functional.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum")
        own = (labels != IGNORE).sum()[None].to(total.dtype)
        everyone = all_gather(own, self.world).sum().clamp(min=1)
        return {"loss_pixels": total * self.world.size / everyone}
