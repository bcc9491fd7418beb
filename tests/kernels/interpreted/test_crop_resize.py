"""The Triton kernels of crop and resize, interpreted on the CPU, equal PIL in every pixel."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import InterpreterError

from fastmoco_kernels.views import crop_resize_reference as reference
from fastmoco_kernels.views.crop_resize import crop_resize_triton, launches, table_of
from tests.kernels.interpreter import watched
from tests.support.data.boxes import apart, drawn_boxes, noise, resized_by_pil


@pytest.mark.parametrize("side", [12, 21])
def test_boxes_of_any_size_and_shape_are_pils(side: int) -> None:
    """Planes and colours side by side, boxes that shrink and grow, and both orders of the passes.

    Several programs per view: 12 is no multiple of 8 lines, 21 none of either.
    """
    pictures, which, boxes = drawn_boxes(7, 44)
    first = reference.height_first(boxes[:, 2], boxes[:, 3], side)
    assert 2 < int(first.sum()) < 11
    got = crop_resize_triton(pictures, which, boxes, side)
    assert apart(got, resized_by_pil(pictures, which, boxes, side)) <= 0


def test_a_line_of_two_strips_and_a_single_pixel() -> None:
    pictures, which = [noise(5, 90)], torch.tensor([0, 0])
    boxes = torch.tensor([[1, 3, 3, 80], [4, 89, 1, 1]])
    got = crop_resize_triton(pictures, which, boxes, 66)
    assert apart(got, resized_by_pil(pictures, which, boxes, 66)) <= 0


def test_two_launches_that_read_nothing_but_the_picture_and_never_share_a_pixel() -> None:
    """A picture that is a part of a larger one, to whose first and last pixel the boxes go."""
    large = noise(40, 50)
    picture, side = large[:, 3:33, 4:44], 20
    boxes = torch.tensor([[0, 0, 30, 40], [2, 27, 28, 13]])
    table = table_of([picture], torch.tensor([0, 0]), boxes, side)
    work, out = launches(table, int(table[:, 8:10].max()), side)
    assert len(work) == 2
    with watched(picture) as watch:
        for one in work:
            one.run()
    assert len(watch.programs) == 6  # two views of three groups of lines
    assert apart(out, resized_by_pil([picture], torch.tensor([0, 0]), boxes, side)) <= 0
    with pytest.raises(InterpreterError, match="MemoryFault"), watched(picture[:, :29]):
        work[1].run()
