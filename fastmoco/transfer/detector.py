"""Faster, Mask and Keypoint R-CNN of torchvision around the trunk of any file that fastmoco reads.

`c4` is R50-C4 of the paper: proposals from the output of layer3 (res4), and layer4 (res5) as the
head of each proposal, with one more batch norm behind it (Detectron2's `Res5ROIHeadsExtraNorm` in
the official MoCo repository). `fpn` is torchvision's feature pyramid on all four stages. Batch norm
is tuned and synchronized everywhere, also in the pyramid and in the mask head. torchvision aligns
proposals half a pixel away from Detectron2 (`aligned=False`), and the stride of a bottleneck is in
its 3x3 convolution, as in the paper's STRIDE_IN_1X1 false.

N pictures, R proposals, D trunk width.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.resnet import ResNet
from torchvision.ops import MultiScaleRoIAlign

from fastmoco.config import ConfigError
from fastmoco.machine.ranks import World
from fastmoco.network.encoder import pixel_statistics
from fastmoco.transfer.batchnorm import SyncBatchNorm2d, synchronize
from fastmoco.weights.architecture import Architecture
from fastmoco.weights.read import Weights

Arch = Literal["c4", "fpn"]
Task = Literal["boxes", "masks", "keypoints"]
STAGES = ("layer1", "layer2", "layer3", "layer4")


def random_weights(architecture: Architecture, seed: int) -> Weights:
    """An untrained trunk, the paper's column "random init."; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = architecture.encoder().state_dict()
    trunk = {name: x for name, x in state.items() if not name.startswith("fc.")}
    return Weights(Path("random"), "random", architecture, trunk, {}, None, None)


def tuned_trunk(weights: Weights, world: World) -> ResNet:
    """The trunk in training mode with `SyncBatchNorm2d`; `weights` keeps its own tensors.

    Raises `ConfigError` for a trunk of other than three channels.
    """
    if weights.architecture.channels != 3:
        raise ConfigError(
            f"{weights.path} is a trunk for {weights.architecture.channels} channels; detection "
            "reads RGB pictures, so give a trunk for 3 channels."
        )
    network = weights.architecture.build({name: x.clone() for name, x in weights.trunk.items()})
    synchronize(network, world)
    return network.train()


class Res4(nn.Module):
    """Pictures (N, 3, H, W) to the output of layer3, (N, D / 2, H / 16, W / 16)."""

    def __init__(self, network: ResNet, out_channels: int) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(network, {"layer3": "0"})
        self.out_channels = out_channels

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """The map under the name `0`."""
        maps: dict[str, Tensor] = self.body(pictures)
        return maps


class Res5Head(nn.Module):
    """layer4 and a new batch norm, then the mean over positions: (R, D / 2, 14, 14) to (R, D)."""

    def __init__(self, layer4: nn.Module, norm: SyncBatchNorm2d) -> None:
        super().__init__()
        self.layer4 = layer4
        self.norm = norm

    def forward(self, regions: Tensor) -> Tensor:
        """Features of proposals."""
        features: Tensor = self.norm(self.layer4(regions))
        return features.mean((2, 3))


def build_detector(
    weights: Weights,
    world: World,
    *,
    arch: Arch,
    task: Task,
    classes: int,
    keypoints: int = 17,
    min_size: int | tuple[int, ...] = 800,
    max_size: int = 1333,
    seed: int = 0,
) -> FasterRCNN:
    """A detector in training mode on the CPU, called as torchvision's are.

    `classes` counts the classes of objects, without the background. Pictures are float RGB in
    [0, 1] of any size; they are normalized as the trunk's file says, and their short side becomes
    one of `min_size` pixels while the long one is at most `max_size`. `seed` draws the new layers;
    torch's generator stays as it was.

    Raises `ConfigError` for a task that the architecture does not have, and as `tuned_trunk` does.
    """
    if arch == "c4" and task != "boxes":
        raise ConfigError(f"C4 detects boxes only; for {task} choose the architecture fpn.")
    if classes < 1:
        raise ConfigError(f"A detector of {classes} classes has nothing to find; give 1 or more.")
    mean, std = pixel_statistics(weights.pixels)
    options: dict[str, Any] = {
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch == "c4":
            return _c4(weights, world, classes, options)
        return _fpn(weights, world, task, classes, keypoints, options)


def _c4(weights: Weights, world: World, classes: int, options: dict[str, Any]) -> FasterRCNN:
    """With the anchors and numbers of proposals of Detectron2's Base-RCNN-C4.yaml."""
    network, width = tuned_trunk(weights, world), weights.features
    return FasterRCNN(
        Res4(network, width // 2),
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=12000,
        rpn_pre_nms_top_n_test=6000,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        box_head=Res5Head(network.layer4, SyncBatchNorm2d(width, world)),
        box_predictor=FastRCNNPredictor(width, classes + 1),
        **options,
    )


def _fpn(
    weights: Weights,
    world: World,
    task: Task,
    classes: int,
    keypoints: int,
    options: dict[str, Any],
) -> FasterRCNN:
    network, width = tuned_trunk(weights, world), weights.features
    norm = partial(SyncBatchNorm2d, world=world)
    channels = [width // 8, width // 4, width // 2, width]
    names = {stage: str(level) for level, stage in enumerate(STAGES)}
    backbone = BackboneWithFPN(network, names, channels, 256, norm_layer=norm)
    if task == "masks":
        head = MaskRCNNHeads(256, (256, 256, 256, 256), 1, norm_layer=norm)
        return MaskRCNN(backbone, classes + 1, mask_head=head, **options)
    if task == "keypoints":
        return KeypointRCNN(backbone, classes + 1, num_keypoints=keypoints, **options)
    return FasterRCNN(backbone, classes + 1, **options)
