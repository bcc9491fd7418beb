"""What a detector does with proposals, so that neither ranks nor restarts change it.

R proposals, D trunk width, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    keypoints_to_heatmap,
    maskrcnn_inference,
    maskrcnn_loss,
)

from fastmoco.transfer.samples import Key, generator

Losses = dict[str, Tensor]
Found = list[dict[str, Tensor]]


class KeyedSampler(BalancedPositiveNegativeSampler):
    """torchvision's, with the random numbers of each picture from its `Key`.

    `keys` are those of the pictures of the next call, or none: then torch's generator draws.
    """

    def __init__(self, like: BalancedPositiveNegativeSampler, purpose: int) -> None:
        super().__init__(like.batch_size_per_image, like.positive_fraction)
        self.purpose = purpose
        self.keys: list[Key] = []
        self.chosen = 0
        """Anchors or proposals of all pictures of the last call."""

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks, uint8, of the positive and the negative ones chosen of each picture.

        matched_idxs: (R,) for each picture: above 0 positive, 0 negative, below 0 neither.
        """
        positives: list[Tensor] = []
        negatives: list[Tensor] = []
        self.chosen = 0
        for number, matched in enumerate(matched_idxs):
            draw = None
            if self.keys:
                draw = generator(self.keys[number], self.purpose, matched.device)
            positive, negative = (torch.where(m)[0] for m in (matched >= 1, matched == 0))
            most = int(self.batch_size_per_image * self.positive_fraction)
            positive = _some(positive, most, draw)
            negative = _some(negative, self.batch_size_per_image - len(positive), draw)
            for rows, masks in ((positive, positives), (negative, negatives)):
                masks.append(torch.zeros_like(matched, dtype=torch.uint8).index_fill_(0, rows, 1))
                self.chosen += len(rows)
        return positives, negatives


def _some(rows: Tensor, most: int, draw: torch.Generator | None) -> Tensor:
    order = torch.randperm(len(rows), generator=draw, device=rows.device)
    return rows[order[:most]]


class CountedRoIHeads(RoIHeads):
    """torchvision's heads, which say over how many rows their losses are means."""

    def __init__(self, like: RoIHeads) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            like.box_roi_pool,
            like.box_head,
            like.box_predictor,
            like.proposal_matcher.high_threshold,
            like.proposal_matcher.low_threshold,
            like.fg_bg_sampler.batch_size_per_image,
            like.fg_bg_sampler.positive_fraction,
            like.box_coder.weights,
            like.score_thresh,
            like.nms_thresh,
            like.detections_per_img,
            like.mask_roi_pool,
            like.mask_head,
            like.mask_predictor,
            like.keypoint_roi_pool,
            like.keypoint_head,
            like.keypoint_predictor,
        )
        self.rows: dict[str, int] = {}
        """For each loss of the last forward: the rows, on this rank, that it is the mean over."""

    def select_training_samples(
        self, proposals: list[Tensor], targets: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """torchvision's, counted."""
        found: tuple[list[Tensor], ...] = super().select_training_samples(proposals, targets)
        proposals, matched, labels, regression = found
        boxes = sum(len(one) for one in labels)
        objects = sum(int((one > 0).sum()) for one in labels)
        self.rows = {"loss_classifier": boxes, "loss_box_reg": boxes, "loss_mask": objects}
        if self.keypoint_predictor is not None:
            self.rows["loss_keypoint"] = _visible(proposals, matched, labels, targets)
        return proposals, matched, labels, regression


def _visible(
    proposals: list[Tensor], matched: list[Tensor], labels: list[Tensor], targets: Any
) -> int:
    """Keypoints that are annotated and inside of their positive proposal."""
    count = 0
    for boxes, objects, classes, target in zip(proposals, matched, labels, targets, strict=True):
        positive = classes > 0
        if positive.any():
            points = target["keypoints"][objects[positive]]
            _, inside = keypoints_to_heatmap(points, boxes[positive], 56)
            count += int((inside > 0).sum())
    return count


class Res5Head(nn.Module):
    """layer4 and a new batch norm: (R, D / 2, 14, 14) to (R, D, 7, 7)."""

    def __init__(self, layer4: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4
        self.norm = norm

    def forward(self, regions: Tensor) -> Tensor:
        """Maps of features of proposals."""
        maps: Tensor = self.norm(self.layer4(regions))
        return maps


class Res5RoIHeads(CountedRoIHeads):
    """Boxes, and masks, from one pass of each proposal through res5, as in Detectron2's C4.

    torchvision's own heads would pass the positive proposals through res5 a second time for their
    masks, and move its batch norm statistics twice. `mask_predictor` is None for boxes alone.
    """

    def __init__(self, like: RoIHeads, mask_predictor: nn.Module | None) -> None:
        super().__init__(like)
        self.mask_predictor = mask_predictor

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Any = None,
    ) -> tuple[Found, Losses]:
        """Detections in evaluation, losses in training; the other one is empty."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        maps = self._maps(features, proposals, image_shapes)
        logits, regression = self.box_predictor(maps.mean((2, 3)))
        boxes, scores, labels = self.postprocess_detections(
            logits, regression, proposals, image_shapes
        )
        found = [
            {"boxes": b, "scores": s, "labels": n}
            for b, s, n in zip(boxes, scores, labels, strict=True)
        ]
        if self.mask_predictor is not None:
            masks = self.mask_predictor(self._maps(features, boxes, image_shapes))
            for one, mask in zip(found, maskrcnn_inference(masks, labels), strict=True):
                one["masks"] = mask
        return found, {}

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Any,
    ) -> Losses:
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        maps = self._maps(features, proposals, image_shapes)
        logits, regression = self.box_predictor(maps.mean((2, 3)))
        classifier, box = fastrcnn_loss(logits, regression, labels, wanted)
        losses = {"loss_classifier": classifier, "loss_box_reg": box}
        if self.mask_predictor is not None:
            positive = [one > 0 for one in labels]
            losses["loss_mask"] = maskrcnn_loss(
                self.mask_predictor(maps[torch.cat(positive)]),
                [boxes[rows] for boxes, rows in zip(proposals, positive, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [objects[rows] for objects, rows in zip(matched, positive, strict=True)],
            )
        return losses

    def _maps(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> Tensor:
        maps: Tensor = self.box_head(self.box_roi_pool(features, boxes, image_shapes))
        return maps
