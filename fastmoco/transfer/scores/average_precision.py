"""Average precision as COCO's own evaluation gives it, and VOC's for data in its layout.

n detections in a picture, K keypoints, H and W of the picture.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastmoco.config import ConfigError
from fastmoco.transfer.datasets.detection import (
    Detections,
    indexed,
    pycocotools,
    run_lengths,
)
from fastmoco.transfer.scores.voc_precision import voc_precision

Prediction = Mapping[str, Any]
"""torchvision's: `boxes` (n, 4), `labels` (n,), `scores` (n,), and what was asked for of `masks`
(n, 1, H, W) in [0, 1] and `keypoints` (n, K, 3). `compact` makes small ones of it."""


def compact(prediction: Prediction) -> dict[str, Any]:
    """The same on the CPU, with masks above 0.5 as run lengths: COCO's do not fit into memory else.

    Prepares predictions for keeping until all pictures are done, or for sending to another rank.
    """
    small: dict[str, Any] = {}
    for name, x in prediction.items():
        if name == "masks" and torch.is_tensor(x):
            masks = (x > 0.5).to(torch.uint8).cpu().numpy()
            small[name] = [run_lengths(mask) for mask in masks.reshape(-1, *masks.shape[-2:])]
        else:
            small[name] = x.detach().cpu() if torch.is_tensor(x) else x
    return small


def check_scored(dataset: Detections, keypoints: bool = False) -> None:
    """Raises `ConfigError` where no object can be found or missed, so that there is no score."""
    objects = [one for one in dataset.coco.dataset["annotations"] if not one["iscrowd"]]
    if not any(not one.get("difficult") for one in objects):
        kinds = f"only difficult ones of {len(objects)}" if objects else "none annotated"
        raise ConfigError(
            f"{dataset.name} has no object to find, {kinds}, so there is nothing to score: name "
            "other pictures in --test."
        )
    if keypoints and not any(one["num_keypoints"] for one in objects):
        raise ConfigError(
            f"{dataset.name} has no object with annotated keypoints, so there is nothing to score: "
            "name other pictures in --test."
        )


def evaluate_boxes(predictions: Sequence[Prediction], dataset: Detections) -> dict[str, float]:
    """AP, AP50 and AP75 in percent, and `AP/CLASS` of each class.

    predictions: one per picture, in the order of the data set. AP is the mean over the IoU
    thresholds 0.5, 0.55, ..., 0.95 of at most 100 detections per picture, as `pycocotools` computes
    it; crowds and difficult objects count neither as found nor as missed. Classes without objects
    are not in the mean, and NaN.

    In the layout of VOC also `VOC07/AP`, `VOC07/AP50`, `VOC07/AP75`, in which precision is read at
    11 points of recall (Detectron2 and the papers, on test2007), and `VOC/...` of the area under
    the curve, as the devkit has it since 2010.

    Raises `ConfigError` as `check_scored` does, `ValueError` for predictions that are not
    of this data set.
    """
    small = [compact(one) for one in predictions]
    result = _evaluate(small, dataset, "bbox")
    if dataset.style == "voc":
        result |= voc_precision(small, dataset)
    return result


def evaluate_masks(predictions: Sequence[Prediction], dataset: Detections) -> dict[str, float]:
    """The same of masks, which `compact` has made run lengths of or not. See `evaluate_boxes`."""
    return _evaluate([compact(one) for one in predictions], dataset, "segm")


def evaluate_keypoints(predictions: Sequence[Prediction], dataset: Detections) -> dict[str, float]:
    """The same of keypoints by their similarity (OKS), of at most 20 detections per picture."""
    return _evaluate([compact(one) for one in predictions], dataset, "keypoints")


def _evaluation(dataset: Detections, found: Any, kind: str) -> Any:
    """`COCOeval` that leaves out difficult objects too."""

    class Evaluation(pycocotools().cocoeval.COCOeval):  # type: ignore[misc]
        def _prepare(self) -> None:
            super()._prepare()
            for objects in self._gts.values():
                for one in objects:
                    one["ignore"] = one["ignore"] or bool(one.get("difficult"))

    return Evaluation(dataset.coco, found, kind)


def _evaluate(
    predictions: Sequence[Prediction], dataset: Detections, kind: str
) -> dict[str, float]:
    check_scored(dataset, kind == "keypoints")
    rows = _rows(predictions, dataset, kind)
    found = indexed({**dataset.coco.dataset, "annotations": rows})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluation(dataset, found, kind)
        if kind == "keypoints":
            evaluation.params.kpt_oks_sigmas = np.array(dataset.keypoint_sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
    # (thresholds, recalls, classes) of all areas and of the most detections; -1 without objects.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    result = {
        "AP": _mean(precision),
        "AP50": _mean(precision[0]),
        "AP75": _mean(precision[5]),
    }
    return result | {
        f"AP/{name}": _mean(precision[:, :, i]) for i, name in enumerate(dataset.classes)
    }


def _mean(precision: np.ndarray) -> float:
    """In percent; NaN where no class has objects."""
    known = precision[precision > -1]
    return float(known.mean() * 100) if known.size else float("nan")


def _rows(
    predictions: Sequence[Prediction], dataset: Detections, kind: str
) -> list[dict[str, Any]]:
    """Predictions in the form of COCO's result file, numbered from 1."""
    if len(predictions) != len(dataset):
        raise ValueError(f"{len(predictions)} predictions for {len(dataset)} pictures")
    rows: list[dict[str, Any]] = []
    for image_id, small in zip(dataset.image_ids, predictions, strict=True):
        boxes = small["boxes"].double().reshape(-1, 4)
        sides = (boxes[:, 2:] - boxes[:, :2]).tolist()
        for i, (start, side) in enumerate(zip(boxes[:, :2].tolist(), sides, strict=True)):
            row = {
                "id": len(rows) + 1,
                "image_id": image_id,
                "category_id": dataset.category_ids[int(small["labels"][i]) - 1],
                "score": float(small["scores"][i]),
                "bbox": [*start, *side],
                "area": side[0] * side[1],
                "iscrowd": 0,
            }
            if kind == "segm":
                row["segmentation"] = small["masks"][i]
            elif kind == "keypoints":
                row["keypoints"] = small["keypoints"][i].double().flatten().tolist()
            rows.append(row)
    return rows
