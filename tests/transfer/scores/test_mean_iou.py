"""Mean intersection over union: by hand, and pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch

from fastmoco.config import ConfigError
from fastmoco.transfer.scores.mean_iou import PixelCounts


def test_a_case_worked_out_by_hand() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 2, 255, 1]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1, 0], [0, 2, 2, 1]])
    counts = PixelCounts(4)
    counts.add(predicted, labels)
    scores = counts.scores(["ground", "a", "b", "never"])
    # ground: 2 found, 3 true and 3 predicted; a: 2 of 3 and 3; b: 1 of 1 and 1, 255 left out.
    assert scores["IoU/ground"] == pytest.approx(100 * 2 / 4)
    assert scores["IoU/a"] == pytest.approx(100 * 2 / 4)
    assert scores["IoU/b"] == pytest.approx(100)
    assert math.isnan(scores["IoU/never"])
    assert scores["mIoU"] == pytest.approx(100 * 2 / 3)
    assert scores["pixel_accuracy"] == pytest.approx(100 * 5 / 7)


def test_equals_counting_with_masks_and_adds_up() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (6, 11, 7), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    noise = torch.randint(0, 5, labels.shape, generator=generator)
    right = (torch.rand(labels.shape, generator=generator) < 0.5) & (labels != 255)
    predicted = torch.where(right, labels.long(), noise)
    whole, parts = PixelCounts(5), [PixelCounts(5), PixelCounts(5)]
    whole.add(predicted, labels)
    for i, part in enumerate(parts):
        part.add(predicted[i::2], labels[i::2])
    assert torch.equal(whole.table, parts[0].table + parts[1].table)

    known = labels != 255
    each = []
    for c in range(5):
        is_it, said = (labels == c) & known, (predicted == c) & known
        each.append(100 * (is_it & said).sum().item() / (is_it | said).sum().item())
    scores = whole.scores([str(c) for c in range(5)])
    assert [scores[f"IoU/{c}"] for c in range(5)] == pytest.approx(each)
    assert scores["mIoU"] == pytest.approx(sum(each) / 5)


def test_what_cannot_be_counted_is_refused() -> None:
    counts = PixelCounts(2)
    with pytest.raises(ConfigError, match="nothing to score"):
        counts.scores(["a", "b"])
    with pytest.raises(ValueError, match="class number above 1"):
        counts.add(torch.tensor([2]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"predicted \(1,\), labels \(2,\)"):
        counts.add(torch.tensor([1]), torch.tensor([0, 1]))
    counts.add(torch.tensor([7]), torch.tensor([255]))
    assert counts.table.sum() == 0
