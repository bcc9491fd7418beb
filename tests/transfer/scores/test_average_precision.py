"""Average precision equals that of pycocotools on a file of results, and VOC's by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmoco.config import ConfigError
from fastmoco.transfer.datasets.coco_checks import check_content
from fastmoco.transfer.datasets.detection import Detections, Parts, run_lengths
from fastmoco.transfer.scores.average_precision import (
    compact,
    evaluate_boxes,
    evaluate_keypoints,
    evaluate_masks,
)

coco_api = pytest.importorskip("pycocotools.coco", reason="the extra transfer is not installed")
from pycocotools.cocoeval import COCOeval  # noqa: E402

SIDE = 96
POINTS = 17


def ellipse(box: Any) -> np.ndarray:
    x, y, w, h = box
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    inside = ((columns - x) / w - 0.5) ** 2 + ((rows - y) / h - 0.5) ** 2 <= 0.25
    return np.asarray(inside, np.uint8)


def stored(seed: int, pictures: int = 12, most: int = 130) -> tuple[dict[str, Any], list[Any]]:
    """Content with crowds, and results as COCO's result files have them: many, some of them near.

    One picture has no object, one no result, and one more results than count.
    """
    rng = np.random.default_rng(seed)
    content: dict[str, Any] = {
        "images": [
            {"id": 100 + 7 * i, "file_name": f"{i}.jpg", "width": SIDE, "height": SIDE}
            for i in range(pictures)
        ],
        "categories": [
            {"id": i, "name": f"c{i}", "keypoints": [f"p{j}" for j in range(POINTS)]}
            for i in (11, 3, 8)
        ],
        "annotations": [],
    }
    results: list[dict[str, Any]] = []
    for number, image in enumerate(content["images"]):
        objects = 0 if number == 1 else int(rng.integers(1, 7))
        for _ in range(objects):
            box = [*rng.uniform(0, 60, 2), *rng.uniform(6, 36, 2)]
            points = np.stack([*(box[i] + box[i + 2] * rng.random(POINTS) for i in (0, 1))], 1)
            seen = rng.integers(0, 3, (POINTS, 1)) * (rng.random() < 0.9)
            one = {
                "id": len(content["annotations"]) + 1,
                "image_id": image["id"],
                "category_id": int(rng.choice([3, 11])),
                "bbox": [float(x) for x in box],
                "area": float(box[2] * box[3] * 0.6),
                "iscrowd": int(rng.random() < 0.15),
                "segmentation": run_lengths(ellipse(box)),
                "keypoints": np.hstack([points * (seen > 0), seen]).flatten().tolist(),
                "num_keypoints": int((seen > 0).sum()),
            }
            content["annotations"].append(one)
            near = int(rng.integers(1, 4)) if number != 2 else 0
            for _ in range(near if number != 3 else most // objects + 1):
                moved = np.array(box) + rng.normal(0, rng.uniform(0.1, 5), 4)
                moved[2:] = np.maximum(moved[2:], 2)
                moved = moved.astype(np.float32)
                guess = np.float32(points + rng.normal(0, rng.uniform(0.1, 4), points.shape))
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": int(rng.choice([one["category_id"], 8, 3, 11])),
                        "score": float(np.float32(round(rng.random(), 2))),  # with ties
                        "bbox": [float(x) for x in moved],
                        "segmentation": run_lengths(ellipse(moved)),
                        "keypoints": np.hstack([guess, np.ones((POINTS, 1))]).flatten().tolist(),
                    }
                )
    return content, results


def predictions_of(results: list[Any], data: Detections) -> list[dict[str, Any]]:
    """torchvision's form, with masks as probabilities."""
    predictions = []
    for image_id in data.image_ids:
        rows = [row for row in results if row["image_id"] == image_id]
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(rows), 1, SIDE, SIDE), np.float32)
        for mask, row in zip(masks, rows, strict=True):
            mask[0] = 0.3 + 0.4 * coco_api.maskUtils.decode(row["segmentation"])
        points = torch.tensor([row["keypoints"] for row in rows]).reshape(-1, POINTS, 3)
        labels = [data.category_ids.index(row["category_id"]) + 1 for row in rows]
        predictions.append(
            {
                "boxes": boxes,
                "labels": torch.tensor(labels, dtype=torch.int64),
                "scores": torch.tensor([row["score"] for row in rows]),
                "masks": torch.from_numpy(masks),
                "keypoints": points,
            }
        )
    return predictions


def reference(content: Any, results: list[Any], kind: str, tmp_path: Path) -> dict[str, float]:
    """pycocotools on files, as its demonstration uses it."""
    for name, what in (("truth", content), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(what))
    truth = coco_api.COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ("AP", "AP50", "AP75")
    by_class = evaluation.eval["precision"][:, :, :, 0, -1].transpose(2, 0, 1).reshape(3, -1)
    classes = {
        f"AP/c{category}": 100 * float(rows[rows > -1].mean()) if (rows > -1).any() else np.nan
        for category, rows in zip((3, 8, 11), by_class, strict=True)
    }
    return dict(zip(names, (100 * evaluation.stats[:3]).tolist(), strict=True)) | classes


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "evaluate"),
    [("bbox", evaluate_boxes), ("segm", evaluate_masks), ("keypoints", evaluate_keypoints)],
)
def test_equals_pycocotools_with_crowds_and_more_results_than_count(
    kind: str, evaluate: Any, seed: int, tmp_path: Path
) -> None:
    content, results = stored(seed)
    if kind != "bbox":  # loadRes takes areas of boxes where there are boxes
        for row in results:
            del row["bbox"]
    expected = reference(content, results, kind, tmp_path)
    content, results = stored(seed)
    content = check_content(content, Path("file"), Parts(True, True))
    data = Detections("c", content, lambda _: torch.zeros(0), parts=Parts(True, True))
    found = evaluate(predictions_of(results, data), data)
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert 2 < expected["AP"] < 98
    assert np.isnan(found["AP/c8"])
    assert max(sum(r["image_id"] == i for r in results) for i in data.image_ids) > 100


def test_an_object_of_the_id_0_counts_as_found() -> None:
    content, _ = stored(4)
    for one in content["annotations"]:
        one |= {"id": one["id"] - 1, "iscrowd": 0}
    content = check_content(content, Path("file"), Parts())
    data = Detections("c", content, lambda _: torch.zeros(0))
    targets = [data.target(i) for i in range(len(data))]
    perfect = [{**t, "scores": torch.ones(len(t["labels"]))} for t in targets]
    assert evaluate_boxes(perfect, data)["AP"] == pytest.approx(100)


def test_masks_may_be_run_lengths_already() -> None:
    content, results = stored(5)
    content = check_content(content, Path("file"), Parts(masks=True))
    data = Detections("c", content, lambda _: torch.zeros(0), parts=Parts(masks=True))
    predictions = predictions_of(results, data)
    small = [compact(one) for one in predictions]
    assert all(isinstance(row["counts"], str) for one in small for row in one["masks"])
    assert evaluate_masks(small, data) == pytest.approx(
        evaluate_masks(predictions, data), abs=0, nan_ok=True
    )


def test_nothing_found_is_zero_and_nothing_to_find_is_refused() -> None:
    content, _ = stored(6)
    content = check_content(content, Path("file"), Parts())
    data = Detections("c", content, lambda _: torch.zeros(0))
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }
    assert evaluate_boxes([nothing] * len(data), data)["AP"] == 0
    with pytest.raises(ValueError, match="1 predictions for 12 pictures"):
        evaluate_boxes([nothing], data)
    empty = Detections("c", {**content, "annotations": []}, lambda _: torch.zeros(0))
    with pytest.raises(ConfigError, match="nothing to score"):
        evaluate_boxes([nothing] * len(data), empty)


def one_class(boxes: list[list[float]], difficult: list[int]) -> Detections:
    """A picture for each object, with a box x y width height."""
    sides = {"width": 1000, "height": 1000}
    content = {
        "images": [{"id": i, "file_name": f"{i}", **sides} for i in range(len(boxes))],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {
                **{"id": i + 1, "image_id": i, "category_id": 1, "bbox": box, "iscrowd": 0},
                **{"area": box[2] * box[3], "difficult": bool(hard)},
            }
            for i, (box, hard) in enumerate(zip(boxes, difficult, strict=True))
        ],
    }
    return Detections("v", content, lambda _: torch.zeros(0), style="voc")


def found(*rows: tuple[list[float], float]) -> dict[str, torch.Tensor]:
    """Detections of label 1: x1 y1 x2 y2 and score."""
    return {
        "boxes": torch.tensor([box for box, _ in rows]).reshape(-1, 4),
        "labels": torch.ones(len(rows), dtype=torch.int64),
        "scores": torch.tensor([score for _, score in rows]),
    }


def test_voc_precision_of_a_case_worked_out_by_hand() -> None:
    """Four objects, one of them difficult, so three to find.

    By falling score: right, right again but of the same object (wrong), difficult (no count),
    wrong, right with an overlap of 0.6. Recall 1/3, 1/3, 1/3, 2/3 and precision 1, 1/2, 1/3, 2/4 at
    the threshold 0.5; at 0.75 the last one is wrong.
    """
    box = [10.0, 10.0, 100.0, 100.0]
    data = one_class([box, box, box, box], [0, 0, 1, 0])
    exact = [10.0, 10.0, 110.0, 110.0]
    predictions = [
        found((exact, 0.9), ([12.0, 10.0, 110.0, 110.0], 0.8)),
        found(([10.0, 10.0, 110.0, 70.0], 0.5)),
        found((exact, 0.7)),
        found(([500.0, 500.0, 600.0, 600.0], 0.6)),
    ]
    result = evaluate_boxes(predictions, data)
    area50 = 1 / 3 * 1 + 1 / 3 * 0.5
    points50 = (4 * 1 + 3 * 0.5) / 11  # recall 0, 0.1, 0.2, 0.3; then 0.4, 0.5, 0.6
    assert result["VOC/AP50"] == pytest.approx(100 * area50)
    assert result["VOC07/AP50"] == pytest.approx(100 * points50)
    assert result["VOC/AP75"] == pytest.approx(100 / 3)
    assert result["VOC07/AP75"] == pytest.approx(100 * 4 / 11)
    # 0.5, 0.55 and 0.6 find both objects, the seven thresholds above only the first.
    assert result["VOC/AP"] == pytest.approx(100 * (3 * area50 + 7 / 3) / 10)
    assert result["VOC07/AP"] == pytest.approx(100 * (3 * points50 + 7 * 4 / 11) / 10)
    # COCO's own: the same order, read at 101 points; the difficult object counts there neither.
    assert result["AP75"] == pytest.approx(100 * 34 / 101)
    assert result["AP50"] == pytest.approx(100 * (34 + 33 * 0.5) / 101)


def test_a_class_of_difficult_objects_alone_is_not_in_the_mean() -> None:
    box = [10.0, 10.0, 100.0, 100.0]
    data = one_class([box, box], [0, 1])
    content = data.coco.dataset
    content["categories"].append({"id": 2, "name": "b"})
    content["annotations"][1]["category_id"] = 2
    data = Detections("v", content, lambda _: torch.zeros(0), style="voc")
    exact = found(([10.0, 10.0, 110.0, 110.0], 0.9))
    result = evaluate_boxes([exact, found()], data)
    assert math.isnan(result["AP/b"])
    for name in ("AP", "AP/a", "VOC07/AP50", "VOC/AP50"):
        assert result[name] == pytest.approx(100)
    with pytest.raises(ConfigError, match="only difficult ones of 2, so there is nothing to score"):
        evaluate_boxes([exact] * 2, one_class([box, box], [1, 1]))


def test_recall_of_a_tenth_counts_as_a_tenth() -> None:
    """3 of 10 found: recall 0.3 reaches the point 0.3, which 3 * 0.1 would lie above."""
    data = one_class([[0.0, 0.0, 10.0, 10.0]] * 10, [0] * 10)
    right, wrong = found(([0.0, 0.0, 10.0, 10.0], 0.9)), found()
    result = evaluate_boxes([right] * 3 + [wrong] * 7, data)
    assert result["VOC07/AP50"] == pytest.approx(100 * 4 / 11)


def slow_voc(predictions: Any, data: Detections, threshold: float, eleven: bool) -> float:
    """The devkit's VOCevaldet.m in plain Python, box by box."""
    values = []
    for label, category in enumerate(data.category_ids, start=1):
        rows = [
            (float(score), -order, image_id, [float(x) for x in box])
            for order, (image_id, one) in enumerate(zip(data.image_ids, predictions, strict=True))
            for box, mark, score in zip(one["boxes"], one["labels"], one["scores"], strict=True)
            if mark == label
        ]
        truth = {
            image_id: [
                one
                for one in data.coco.dataset["annotations"]
                if one["image_id"] == image_id and one["category_id"] == category
            ]
            for image_id in data.image_ids
        }
        total = sum(not one["difficult"] for some in truth.values() for one in some)
        if not total:
            continue
        taken: set[int] = set()
        right = wrong = 0
        curve = []
        for _, _, image_id, box in sorted(rows, key=lambda row: -row[0]):
            best, match = -1.0, None
            for one in truth[image_id]:
                x, y, w, h = one["bbox"]
                iw = min(box[2], x + w) - max(box[0], x)
                ih = min(box[3], y + h) - max(box[1], y)
                if iw > 0 and ih > 0:
                    whole = (box[2] - box[0]) * (box[3] - box[1]) + w * h - iw * ih
                    if iw * ih / whole > best:
                        best, match = iw * ih / whole, one
            if match is not None and best >= threshold:
                if match["difficult"]:
                    continue
                right, wrong = (right, wrong + 1) if match["id"] in taken else (right + 1, wrong)
                taken.add(match["id"])
            else:
                wrong += 1
            curve.append((right / total, right / (right + wrong)))
        if eleven:
            tops = [max([p for r, p in curve if r >= k / 10], default=0) for k in range(11)]
            values.append(sum(tops) / 11)
        else:
            whole, last = 0.0, 0.0
            for i, (recall, _) in enumerate(curve):
                whole += (recall - last) * max(p for _, p in curve[i:])
                last = recall
            values.append(whole)
    return 100 * sum(values) / len(values)


@pytest.mark.parametrize("seed", [0, 1])
def test_voc_precision_equals_the_devkits_loop(seed: int) -> None:
    content, results = stored(seed, most=20)
    rng = np.random.default_rng(seed)
    for one in content["annotations"]:
        one |= {"iscrowd": 0, "difficult": bool(rng.random() < 0.2)}
    data = Detections("v", content, lambda _: torch.zeros(0), style="voc")
    predictions = predictions_of(results, data)
    result = evaluate_boxes(predictions, data)
    for name, eleven in (("VOC07", True), ("VOC", False)):
        for key, threshold in (("AP50", 0.5), ("AP75", 0.75)):
            expected = slow_voc(predictions, data, threshold, eleven)
            assert result[f"{name}/{key}"] == pytest.approx(expected, abs=1e-9)
            assert 1 < expected < 99
