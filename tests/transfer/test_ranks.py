"""Losses, gradients and batch norm of a step: the same on two ranks as on one, in float64.

The pictures of the ranks differ in the number of their objects, so the choice of anchors and
proposals and the weights of the losses matter. They do not differ in size: anchors on padding score
alike, and which of them comes first is decided by rounding. That padding is equal has its own test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.machine.ranks import World
from fastmoco.transfer.detect import on_device, prepare
from fastmoco.transfer.detector import Arch, Detector, Task, build_detector, random_weights
from fastmoco.transfer.samples import Key
from fastmoco.transfer.training import backward
from fastmoco.weights.architecture import Architecture
from tests.support.data.objects import boxes
from tests.support.ranks import Ranks

ALONE = World(0, 0, 1, torch.device("cpu"), "none")
# Of picture 3 nothing is left when its crowd is dropped.
NUMBERS = (3, 1, 5, 4)


def step(world: World, arch: Arch, task: Task) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, and after the backward all gradients and running statistics by name."""
    weights = random_weights(Architecture("resnet18", 0.125, "imagenet"), seed=1)
    model: Any = build_detector(
        weights, world, arch=arch, task=task, classes=2, keypoints=2, proposals=12
    )
    model.rpn._pre_nms_top_n = {"training": 60, "testing": 60}
    model.rpn._post_nms_top_n = {"training": 30, "testing": 30}
    model.rpn.fg_bg_sampler.batch_size_per_image = 16
    detector = Detector(model, world).double()
    data, local = boxes(6, square=True), len(NUMBERS) // world.size
    own = NUMBERS[world.rank * local : (world.rank + 1) * local]
    samples = [
        prepare(
            data[number],
            Key(0, 1, number),
            sides=(64,),
            difficult="learn",
            names=data.keypoint_names,
        )
        for number in own
    ]
    images, targets, keys = on_device(samples, world.device)
    for target in targets:
        target["boxes"] = target["boxes"].double()
    losses: dict[str, Tensor] = detector([x.double() for x in images], targets, keys)
    backward(torch.stack(list(losses.values())).sum(), detector, world)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    found |= {name: b for name, b in model.named_buffers() if b.dtype == torch.float64}
    return {name: loss.detach() for name, loss in losses.items()}, found


@pytest.mark.parametrize(
    ("arch", "task"),
    [
        ("c4", "masks"),
        ("fpn", "boxes"),
        pytest.param("c4", "boxes", marks=pytest.mark.slow),
        pytest.param("fpn", "masks", marks=pytest.mark.slow),
        pytest.param("fpn", "keypoints", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_take_the_step_of_one(two_ranks: Ranks, arch: Arch, task: Task) -> None:
    losses, found = step(ALONE, arch, task)
    first, second = two_ranks.run(step, arch, task)
    assert len(losses) == (4 if task == "boxes" else 5)
    for name, loss in losses.items():
        mean = (first[0][name] + second[0][name]) / 2
        # torchvision's labels of anchors are float32, and so is that loss; its gradient is not.
        rtol = 1e-6 if name == "loss_objectness" else 1e-9
        torch.testing.assert_close(mean, loss, rtol=rtol, atol=0, msg=name, check_dtype=False)
    for name, wanted in found.items():
        for rank in (first, second):
            torch.testing.assert_close(rank[1][name], wanted, rtol=1e-7, atol=1e-10)
