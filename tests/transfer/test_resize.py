"""Sizes by hand, targets that move with their picture, and padding that all ranks agree upon."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import functional

from fastmoco.machine.ranks import World
from fastmoco.transfer.resize import SHORT_SIDE, AgreedResize, resized
from tests.support.ranks import Ranks

ALONE = World(0, 0, 1, torch.device("cpu"), "none")


def transform(world: World = ALONE) -> AgreedResize:
    like = GeneralizedRCNNTransform((32, 64), 100, [0.0] * 3, [1.0] * 3)  # type: ignore[arg-type]
    return AgreedResize(like, world)


@pytest.mark.parametrize(
    ("size", "short", "longest", "wanted"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 640 * 800 / 480 = 1066.67
        ((640, 480), 480, 1333, (640, 480)),
        ((300, 900), 800, 1333, (444, 1333)),  # the long side decides: 300 * 1333 / 900 = 444.3
        ((1, 1000), 800, 100, (1, 100)),
    ],
)
def test_the_short_side_is_as_asked_unless_the_long_one_is_too_long(
    size: tuple[int, int], short: int, longest: int, wanted: tuple[int, int]
) -> None:
    assert resized(*size, short, longest) == wanted


def test_a_target_moves_with_its_picture() -> None:
    masks = torch.zeros(1, 40, 60, dtype=torch.uint8)
    masks[0, 20:40, 30:60] = 1
    target: dict[str, Any] = {
        "boxes": torch.tensor([[30.0, 20.0, 60.0, 40.0]]),
        "keypoints": torch.tensor([[[30.0, 20.0, 1.0]]]),
        "masks": masks,
        "labels": torch.tensor([1]),
        SHORT_SIDE: 20,
    }
    image, found = transform().train().resize(torch.rand(3, 40, 60), target)
    assert found is not None
    assert image.shape == (3, 20, 30)
    assert found["boxes"].tolist() == [[15, 10, 30, 20]]
    assert found["keypoints"].tolist() == [[[15, 10, 1]]]
    assert found["masks"].shape == (1, 20, 30)
    assert int(found["masks"].sum()) == 10 * 15
    assert target["boxes"].tolist() == [[30, 20, 60, 40]]
    tested, _ = transform().eval().resize(torch.rand(3, 40, 60))
    assert tested.shape == (3, 64, 96)


def test_a_box_that_rounding_closes_is_left_out_with_all_of_its_object() -> None:
    thin = torch.nextafter(torch.tensor(100.0), torch.tensor(101.0)).item()
    target: dict[str, Any] = {
        "boxes": torch.tensor([[30.0, 20.0, 60.0, 40.0], [100.0, 20.0, thin, 40.0]]),
        "labels": torch.tensor([4, 5]),
        "keypoints": torch.tensor([[[30.0, 20.0, 1.0]], [[100.0, 30.0, 1.0]]]),
        "masks": torch.ones(2, 40, 120, dtype=torch.uint8),
        SHORT_SIDE: 20,
    }
    _, found = transform().train().resize(torch.rand(3, 40, 120), target)
    assert found is not None
    assert found["boxes"].tolist() == [[15, 10, 30, 20]]
    assert found["labels"].tolist() == [4]
    assert found["keypoints"].tolist() == [[[15, 10, 1]]]
    assert found["masks"].shape == (1, 20, 60)
    assert target["labels"].tolist() == [4, 5]


def test_pictures_shrink_as_pillow_shrinks_them() -> None:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 90, 120), generator=draw, dtype=torch.uint8)
    image, _ = (
        transform().train().resize(pixels.float(), {"boxes": torch.zeros(0, 4), SHORT_SIDE: 30})
    )
    pillow: Any = functional.to_pil_image(pixels)
    wanted = functional.pil_to_tensor(pillow.resize((40, 30), Image.Resampling.BILINEAR))
    torch.testing.assert_close(image, wanted.float(), rtol=0, atol=1.0)  # Pillow rounds twice


def padded(world: World, training: bool) -> Tensor:
    images = [torch.ones(3, 30 + 40 * world.rank, 50), torch.ones(3, 20, 70 - 40 * world.rank)]
    return transform(world).train(training).batch_images(images)


def test_all_ranks_pad_to_the_largest_picture_of_any(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(padded, True)
    assert first.shape == second.shape == (2, 3, 96, 96)
    assert [int(image[0].sum()) for image in (*first, *second)] == [1500, 1400, 3500, 600]
    assert bool((first[0, :, :30, :50] == 1).all())
    # In evaluation a rank may have no picture left, so nothing is agreed upon.
    first, second = two_ranks.run(padded, False)
    assert (first.shape, second.shape) == ((2, 3, 32, 96), (2, 3, 96, 64))
