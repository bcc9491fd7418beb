"""Average precision of PASCAL VOC, as its development kit defines it.

Detections of a class are taken by falling score. Each goes to the object of its picture that it
overlaps most. It is right if the overlap reaches the threshold and nobody has found that object
before; it does not count at all if the object is difficult; else it is wrong. Boxes of the devkit
count pixels, both ends included, so that x1 is xmin - 1 and x2 is xmax here.

D detections and G objects of a class, T thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmoco.transfer.datasets.detection import Detections

Float = NDArray[np.float64]
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def voc_precision(
    predictions: Sequence[Mapping[str, Any]], dataset: Detections
) -> dict[str, float]:
    """AP (mean over ten thresholds), AP50 and AP75 in percent, means over classes with objects.

    `VOC07/...` reads precision at 11 points of recall, `VOC/...` takes the area under the curve.
    """
    curves = [
        recall_and_precision(*_class(predictions, dataset, label))
        for label in range(1, len(dataset.classes) + 1)
    ]
    result: dict[str, float] = {}
    for name, rule in (("VOC07", eleven_points), ("VOC", area)):
        table = np.array(
            [[rule(r, p) for r, p in curve] for curve in curves if curve], dtype=np.float64
        )
        means = table.mean(0) * 100
        result |= {f"{name}/AP": float(means.mean())}
        result |= {f"{name}/AP50": float(means[0]), f"{name}/AP75": float(means[5])}
    return result


def _class(
    predictions: Sequence[Mapping[str, Any]], dataset: Detections, label: int
) -> tuple[list[Float], list[Float], list[Float], list[NDArray[np.bool_]]]:
    """Of every picture: objects (G, 4), detections (D, 4), their scores, and what is difficult."""
    category = dataset.category_ids[label - 1]
    objects, boxes, scores, difficult = [], [], [], []
    for image_id, prediction in zip(dataset.image_ids, predictions, strict=True):
        there = [
            one
            for one in dataset.coco.imgToAnns.get(image_id, [])
            if one["category_id"] == category
        ]
        rows = np.array([one["bbox"] for one in there], np.float64).reshape(-1, 4)
        rows[:, 2:] += rows[:, :2]
        objects.append(rows)
        difficult.append(np.array([bool(one.get("difficult")) for one in there], bool))
        mine = prediction["labels"].numpy() == label
        boxes.append(prediction["boxes"].double().numpy().reshape(-1, 4)[mine])
        scores.append(prediction["scores"].double().numpy()[mine])
    return objects, boxes, scores, difficult


def recall_and_precision(
    objects: list[Float],
    boxes: list[Float],
    scores: list[Float],
    difficult: list[NDArray[np.bool_]],
) -> list[tuple[Float, Float]]:
    """Recall and precision after each detection, by falling score, at each of T thresholds.

    Empty for a class without objects other than difficult ones.
    """
    total = sum(int((~flags).sum()) for flags in difficult)
    if not total:
        return []
    overlap, claim = [], []
    start = 0
    for there, found in zip(objects, boxes, strict=True):
        table = intersection_over_union(found, there)
        overlap.append(table.max(1, initial=0.0))
        claim.append(start + (table.argmax(1) if len(there) else np.zeros(len(found), np.int64)))
        start += len(there)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    best, claimed = np.concatenate(overlap)[order], np.concatenate(claim)[order]
    hard = np.concatenate([*difficult, np.zeros(1, bool)])[claimed]  # the last: of no object
    curves = []
    for threshold in THRESHOLDS:
        enough = best >= threshold
        first = np.zeros(len(best), bool)
        candidates = np.flatnonzero(enough & ~hard)
        first[candidates[np.unique(claimed[candidates], return_index=True)[1]]] = True
        right, wrong = np.cumsum(first), np.cumsum(~first & ~(enough & hard))
        curves.append((right / total, right / np.maximum(right + wrong, 1)))
    return curves


def intersection_over_union(a: Float, b: Float) -> Float:
    """(D, G) of boxes x1 y1 x2 y2, (D, 4) and (G, 4)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    own = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    union = own[0][:, None] + own[1][None] - shared
    return np.asarray(shared / np.maximum(union, np.finfo(np.float64).tiny))


def eleven_points(recall: Float, precision: Float) -> float:
    """VOC2007: the mean of the best precision at a recall of at least 0, 0.1, ..., 1."""
    # Tenths as quotients, as recall itself is one: 3 * 0.1 is above 3 / 10.
    best = [precision[recall >= tenth / 10].max(initial=0.0) for tenth in range(11)]
    return float(np.mean(best))


def area(recall: Float, precision: Float) -> float:
    """Since VOC2010: the area under precision, made falling, over recall."""
    steps = np.diff(recall, prepend=0.0)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float((steps * falling).sum())
