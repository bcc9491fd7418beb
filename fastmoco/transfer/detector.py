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

import math
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
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import ResNet
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from fastmoco.config import ConfigError
from fastmoco.machine.collectives import all_gather
from fastmoco.machine.ranks import World
from fastmoco.network.encoder import pixel_statistics
from fastmoco.transfer.batchnorm import SyncBatchNorm2d, synchronize
from fastmoco.transfer.heads import CountedRoIHeads, KeyedSampler, Res5Head, Res5RoIHeads
from fastmoco.transfer.resize import AgreedResize
from fastmoco.transfer.samples import ANCHORS, PROPOSALS, Key
from fastmoco.weights.architecture import Architecture
from fastmoco.weights.read import Weights

Arch = Literal["c4", "fpn"]
Task = Literal["boxes", "masks", "keypoints"]
STAGES = ("layer1", "layer2", "layer3", "layer4")
FPN_CHANNELS = 256
"""Of the maps of the pyramid, as published."""


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


def build_detector(
    weights: Weights,
    world: World,
    *,
    arch: Arch,
    task: Task,
    classes: int,
    keypoints: int = 17,
    fpn_channels: int = FPN_CHANNELS,
    min_size: int | tuple[int, ...] = 800,
    max_size: int = 1333,
    proposals: int = 512,
    test_proposals: int = 1000,
    seed: int = 0,
) -> FasterRCNN:
    """A detector in training mode on the CPU, called as torchvision's are; `Detector` trains it.

    `classes` counts the classes of objects, without the background. Pictures are float RGB in
    [0, 1] of any size; they are normalized as the trunk's file says, and their short side becomes
    one of `min_size` pixels while the long one is at most `max_size`. Of each picture, `proposals`
    are learned from in training, and at most `test_proposals` classified in evaluation. A pyramid
    has maps of `fpn_channels`. `seed` draws the new layers; torch's generator stays as it was.

    Raises `ConfigError` for a task that the architecture does not have, and as `tuned_trunk` does.
    """
    if arch == "c4" and task == "keypoints":
        raise ConfigError("C4 has no head for keypoints, as in the paper: choose --arch fpn.")
    if classes < 1:
        raise ConfigError(f"A detector of {classes} classes has nothing to find; give 1 or more.")
    mean, std = pixel_statistics(weights.pixels)
    options: dict[str, Any] = {
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": list(mean),
        "image_std": list(std),
        "box_batch_size_per_image": proposals,
        "rpn_post_nms_top_n_test": test_proposals,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch == "c4":
            model: Any = _c4(weights, world, task, classes, options)
        else:
            pyramid = _pyramid(weights, world, fpn_channels)
            model = _fpn(pyramid, world, task, classes, keypoints, options)
    heads = model.roi_heads
    heads.fg_bg_sampler = KeyedSampler(heads.fg_bg_sampler, PROPOSALS)
    rpn = model.rpn
    rpn.fg_bg_sampler = KeyedSampler(rpn.fg_bg_sampler, ANCHORS)
    model.transform = AgreedResize(model.transform, world)
    stem = 4 if weights.architecture.stem == "imagenet" else 1
    for pool in (heads.box_roi_pool, heads.mask_roi_pool, heads.keypoint_roi_pool):
        if pool is not None:
            _fix_scales(pool, stem)
    for part in (model.backbone, rpn.head, heads.box_predictor):
        part.register_forward_hook(_in_fp32)
    if heads.keypoint_predictor is not None:
        heads.keypoint_predictor.register_forward_hook(_contiguous)
    detector: FasterRCNN = model
    return detector


def _fix_scales(pool: Any, stem: int) -> None:
    """Tell region pooling the strides of its maps: those of the stages behind a stem of stride 4.

    torchvision guesses them from the first batch and keeps them: wrongly where its pictures are
    small beside their padding, and differently in a run that was resumed.
    """
    count = len(pool.featmap_names)
    strides = [4 * stem] if count == 1 else [stem * 2**level for level in range(count)]
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(
        int(math.log2(strides[0])),
        int(math.log2(strides[-1])),
        canonical_scale=pool.canonical_scale,
        canonical_level=pool.canonical_level,
    )


def _contiguous(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    """torchvision's loss of keypoints takes a view that channels-last memory does not have."""
    return out.contiguous()


def _in_fp32(_: nn.Module, __: Any, out: Any) -> Any:
    """Maps, and what is predicted from them, leave autocast: boxes are computed in their dtype.

    bf16 has 8 bits: anchors and boxes of 1000 pixels would be rounded to steps of 4 or 8.
    """
    if isinstance(out, Tensor):
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
    if isinstance(out, dict):
        return {name: _in_fp32(_, __, value) for name, value in out.items()}
    return type(out)(_in_fp32(_, __, value) for value in out)


def _c4(weights: Weights, world: World, task: Task, classes: int, options: dict[str, Any]) -> Any:
    """With the anchors and numbers of proposals of Detectron2's Base-RCNN-C4.yaml."""
    network, width = tuned_trunk(weights, world), weights.features
    model: Any = FasterRCNN(
        Res4(network, width // 2),
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=12000,
        rpn_pre_nms_top_n_test=6000,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        box_head=Res5Head(network.layer4, SyncBatchNorm2d(width, world)),
        box_predictor=FastRCNNPredictor(width, classes + 1),
        **options,
    )
    masks: Any = None
    if task == "masks":
        masks = MaskRCNNPredictor(width, 256, classes + 1)
        nn.init.normal_(masks.mask_fcn_logits.weight, std=0.001)  # as Detectron2, or it starts at 7
    model.roi_heads = Res5RoIHeads(model.roi_heads, masks)
    return model


def _pyramid(weights: Weights, world: World, channels: int) -> BackboneWithFPN:
    network, width = tuned_trunk(weights, world), weights.features
    norm = partial(SyncBatchNorm2d, world=world)
    widths = [width // 8, width // 4, width // 2, width]
    names = {stage: str(level) for level, stage in enumerate(STAGES)}
    return BackboneWithFPN(network, names, widths, channels, norm_layer=norm)


def _fpn(
    backbone: BackboneWithFPN,
    world: World,
    task: Task,
    classes: int,
    keypoints: int,
    options: dict[str, Any],
) -> Any:
    if task == "masks":
        norm = partial(SyncBatchNorm2d, world=world)
        head = MaskRCNNHeads(backbone.out_channels, (256, 256, 256, 256), 1, norm_layer=norm)
        model: Any = MaskRCNN(backbone, classes + 1, mask_head=head, **options)
    elif task == "keypoints":
        model = KeypointRCNN(backbone, classes + 1, num_keypoints=keypoints, **options)
    else:
        model = FasterRCNN(backbone, classes + 1, **options)
    model.roi_heads = CountedRoIHeads(model.roi_heads)
    return model


class Detector(nn.Module):
    """A detector in training, on this rank's part of a batch: the same loss for any such parts.

    torchvision takes the mean of each loss over the anchors, proposals, objects or keypoints of its
    own batch. Ranks have different numbers of them, so each loss is weighed here such that its mean
    over ranks is the one over all of them.
    """

    def __init__(self, model: FasterRCNN, world: World) -> None:
        super().__init__()
        self.model = model
        self.world = world

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Any]], keys: list[Key]
    ) -> dict[str, Tensor]:
        """Losses by name, to be added up.

        images: float RGB (3, H, W) in [0, 1]. targets: as torchvision's, with `SHORT_SIDE`.
        """
        heads: Any = self.model.roi_heads
        rpn: Any = self.model.rpn
        heads.fg_bg_sampler.keys = rpn.fg_bg_sampler.keys = keys
        losses: dict[str, Tensor] = self.model(images, targets)
        anchors = rpn.fg_bg_sampler.chosen
        rows = {**heads.rows, "loss_objectness": anchors, "loss_rpn_box_reg": anchors}
        names = sorted(losses)
        counts = [[float(rows[name]) for name in names]]
        own = torch.tensor(counts, dtype=torch.float64, device=images[0].device)
        everyone = all_gather(own, self.world).sum(0).clamp(min=1)
        shares = own[0] * self.world.size / everyone
        weighed = zip(names, shares, strict=True)
        return {name: losses[name] * share.to(losses[name].dtype) for name, share in weighed}
