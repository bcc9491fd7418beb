"""The reference of crop and resize against PIL, its registration, and what the op refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmoco_kernels as ops
from fastmoco_kernels.views import crop_resize as op_module
from fastmoco_kernels.views import crop_resize_reference as reference
from fastmoco_kernels.views import crop_resize_triton as kernels
from tests.support.data.boxes import apart, drawn_boxes, noise, resized_by_pil

WHICH, BOXES = torch.tensor([1]), torch.tensor([[1, 2, 3, 4]])


@pytest.mark.parametrize("side", [1, 8, 33, 96, 224])
def test_equals_pil(side: int) -> None:
    pictures, which, boxes = drawn_boxes(60, 300, seed=side)
    got = ops.crop_resize(pictures, which, boxes, side)
    assert apart(got, resized_by_pil(pictures, which, boxes, side)) <= 0


def test_the_order_of_the_passes_is_pils_around_the_box_where_it_changes() -> None:
    for side, width in ((32, 20), (32, 40), (32, 70), (50, 51)):
        turning = max(side, 2 * width - side)
        pictures = [noise(turning + more, width) for more in (-1, 0, 1, 2)]
        boxes = torch.tensor([[0, 0, *one.shape[1:]] for one in pictures])
        which = torch.arange(4)
        first = reference.height_first(boxes[:, 2], boxes[:, 3], side)
        assert first.tolist() == [False, False, True, True]
        got = ops.crop_resize(pictures, which, boxes, side)
        assert apart(got, resized_by_pil(pictures, which, boxes, side)) <= 0


def test_the_op_and_its_kernels_mean_the_same_columns() -> None:
    assert kernels.COLUMNS.value == op_module.COLUMNS
    pictures, which, boxes = [noise(300, 100), noise(60, 70, planes=False)], WHICH, BOXES
    upright = op_module.table_of(pictures, which, boxes, 32)[0].tolist()
    address = pictures[1].data_ptr()
    assert upright == [address, 1, 70 * 3, 3, *BOXES[0].tolist(), 3, 3, 0]
    tall = torch.tensor([[10, 20, 256, 64]])
    turned = op_module.table_of(pictures, torch.tensor([0]), tall, 32)[0].tolist()
    assert turned[1:] == [300 * 100, 1, 100, 20, 10, 64, 256, 5, 17, 1]


def test_is_registered_and_knows_its_shape_without_a_device() -> None:
    pictures, which, boxes = drawn_boxes(3, 20)
    torch.library.opcheck(op_module._crop_resize, (pictures, which, boxes, 8))
    before = [one.clone() for one in pictures]
    assert ops.crop_resize(pictures, which, boxes, 8).shape == (6, 8, 8, 3)
    assert all(torch.equal(a, b) for a, b in zip(pictures, before, strict=True))
    assert ops.crop_resize(pictures, which[:0], boxes[:0], 8).shape == (0, 8, 8, 3)
    with FakeTensorMode():
        picture = torch.empty(3, 20, 30, dtype=torch.uint8, device="cuda")
        views = op_module._crop_resize(
            [picture], torch.empty(5).long(), torch.empty(5, 4).long(), 8
        )
        assert (views.shape, views.device.type) == ((5, 8, 8, 3), "cuda")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pictures": []}, "expected pictures"),
        ({"side": 0}, "side 0"),
        ({"side": 5000}, "side up to 4096"),
        ({"pictures": [noise(9, 9), noise(9, 9).float()]}, "number 1: torch.float32"),
        ({"pictures": [noise(9, 9)[:1], noise(9, 9)]}, r"number 0: torch.uint8 \(1, 9, 9\)"),
        ({"boxes": BOXES.int()}, "int64"),
        ({"boxes": BOXES[0]}, r"boxes \(B, 4\)"),
        ({"boxes": BOXES.to("meta")}, "on the host"),
        ({"which": torch.tensor([2])}, r"from 0 to 1, got \[2\]"),
        ({"which": torch.tensor([-1])}, "from 0 to 1"),
        ({"boxes": torch.tensor([[7, 0, 3, 9]])}, r"box 0 is \[7, 0, 3, 9\].*picture of \[9, 9\]"),
        ({"boxes": torch.tensor([[0, -1, 3, 3]])}, "box 0"),
        ({"boxes": torch.tensor([[0, 0, 3, 0]])}, "box 0"),
    ],
)
def test_refuses_what_would_read_beside_a_picture(changed: dict[str, Any], message: str) -> None:
    pictures: list[Tensor] = [noise(9, 9), noise(9, 9)]
    given: dict[str, Any] = {"pictures": pictures, "which": WHICH, "boxes": BOXES, "side": 8}
    with pytest.raises(ValueError, match=message):
        ops.crop_resize(**given | changed)
