"""The network of segmentation against one built by hand, its loss on two ranks, crops by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import resnet18

from fastmoco.machine.ranks import World
from fastmoco.transfer import segment
from fastmoco.transfer.datasets.segmentation import IGNORE, Segmentations
from fastmoco.transfer.detector import random_weights
from fastmoco.transfer.samples import Key, uniforms
from fastmoco.transfer.segment import prepare
from fastmoco.transfer.segmenter import SegmentationLoss, Segmenter
from fastmoco.transfer.training import backward
from fastmoco.weights.architecture import Architecture
from fastmoco.weights.read import Weights
from tests.support.ranks import Ranks

ALONE = World(0, 0, 1, torch.device("cpu"), "none")


def small() -> Weights:
    return random_weights(Architecture("resnet18", 0.125, "imagenet"), seed=1)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_res5_has_dilation_2_and_the_head_dilation_6(arch: str) -> None:
    weights = random_weights(Architecture(arch, 0.125, "imagenet"), seed=1)
    model = Segmenter(weights, ALONE, 5, 0)
    convolutions = [m for m in model.network.layer4.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == {"resnet18": 5, "resnet50": 10}[arch]
    for one in convolutions:
        wide = one.kernel_size == (3, 3)
        assert (one.stride, one.dilation) == ((1, 1), (2, 2) if wide else (1, 1))
    first, second, last = (m for m in model.head if isinstance(m, nn.Conv2d))
    assert (first.in_channels, first.out_channels) == (weights.features, 256)
    assert (first.kernel_size, first.dilation, second.dilation) == ((3, 3), (6, 6), (6, 6))
    assert (last.kernel_size, last.out_channels) == ((1, 1), 5)
    assert model.eval()(torch.zeros(1, 3, 65, 50)).shape == (1, 5, 65, 50)
    assert model.maps(torch.zeros(1, 3, 64, 96)).shape[2:] == (4, 6)


def test_the_network_is_the_one_of_the_paper_written_by_hand() -> None:
    """ResNet-18 in plain functions of torch, res5 with dilation, on the same weights."""
    state = {n: x for n, x in resnet18().state_dict().items() if not n.startswith("fc.")}
    for name in state:  # statistics other than 0 and 1
        if name.endswith("running_mean"):
            state[name] = torch.linspace(-0.1, 0.1, len(state[name]))
    trunk = Weights(
        Path("x"), "x", Architecture("resnet18", 1.0, "imagenet"), state, {}, None, None
    )
    model = Segmenter(trunk, ALONE, 3, 0).eval()
    pictures = torch.randint(0, 256, (1, 3, 48, 64), generator=torch.Generator().manual_seed(0))

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, var, weight, bias)

    x = pictures.float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = functional.conv2d((x - mean) / std, state["conv1.weight"], stride=2, padding=3)
    x = functional.max_pool2d(norm(x, "bn1").relu(), 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name, spread = f"layer{stage}.{block}", 2 if stage == 4 else 1
            stride = 2 if block == 0 and stage in (2, 3) else 1
            wide: dict[str, Any] = {"padding": spread, "dilation": spread}
            y = functional.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, **wide)
            y = norm(y, f"{name}.bn1").relu()
            y = norm(functional.conv2d(y, state[f"{name}.conv2.weight"], **wide), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in state:
                x = functional.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                x = norm(x, f"{name}.downsample.1")
            x = (x + y).relu()
    torch.testing.assert_close(
        model.maps((pictures.float() / 255 - mean) / std), x, rtol=1e-4, atol=1e-4
    )
    head = model.head.state_dict()
    for place in (0, 3):
        x = functional.conv2d(x, head[f"{place}.weight"], padding=6, dilation=6)
        x = (x / (1 + 1e-5) ** 0.5).relu()  # batch norm with the statistics of its beginning
    x = functional.conv2d(x, head["6.weight"], head["6.bias"])
    wanted = functional.interpolate(x, (48, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(pictures), wanted, rtol=1e-4, atol=1e-4)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def step(world: World) -> tuple[Tensor, list[Tensor]]:
    model = Segmenter(small(), world, 3, 0).double()
    loss_of = SegmentationLoss(model, world)
    draw = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (4, 3, 32, 32), generator=draw).double()
    labels = torch.randint(0, 3, (4, 32, 32), generator=draw)
    labels[0, :30] = IGNORE  # so the ranks have different numbers of labels
    own = slice(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    loss = loss_of(pictures[own], labels[own])["loss_pixels"]
    backward(loss, loss_of, world)
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def test_two_ranks_take_the_step_of_one(two_ranks: Ranks) -> None:
    loss, gradients = step(ALONE)
    first, second = two_ranks.run(step)
    torch.testing.assert_close((first[0] + second[0]) / 2, loss, rtol=1e-12, atol=0)
    for wanted, one, other in zip(gradients, first[1], second[1], strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(other, wanted, rtol=1e-7, atol=1e-12)


def test_crops_keep_pixels_and_labels_together() -> None:
    """Labels tell the place of a pixel, and so does its colour."""
    labels = (torch.arange(40)[:, None] // 4 * 10 + torch.arange(40)[None] // 4).byte()
    image = labels[None].expand(3, 40, 40) * 2
    fill = torch.tensor([250, 251, 252], dtype=torch.uint8)
    for number in range(12):
        key = Key(0, 0, number)
        crop = prepare((image, labels), key, side=48, fill=fill)
        factor = 0.5 + 1.5 * uniforms(key, 1)[0]
        size = round(40 * factor)
        inside = crop.labels != IGNORE
        assert int(inside.sum()) == min(size, 48) ** 2
        assert crop.image[:, ~inside].unique(dim=1).flatten().tolist() in ([], [250, 251, 252])
        # Away from the edges between labels the colour is that of the label.
        near = (crop.image[0].int() - 2 * crop.labels.int()).abs()[inside]
        assert float((near <= 2).float().mean()) > 0.3
        assert (uniforms(key, 2)[1] < 0.5) == bool(
            crop.labels[0, 0] % 10 > crop.labels[0, min(size, 48) - 1] % 10
        )


def pictures(_: str, split: str) -> Segmentations:
    draw = torch.Generator().manual_seed(len(split))
    images = [torch.randint(0, 256, (3, 40, 50), generator=draw).byte() for _ in range(4)]
    labels = [torch.where(image[0] > 200, IGNORE, image[0] // 100).byte() for image in images]
    return Segmentations(split, ["a", "b", "c"], images.__getitem__, labels.__getitem__, 4)


def test_the_command_trains_tests_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(segment, "segmentation_set", pictures)
    torch.save(small().trunk, tmp_path / "trunk.pth")
    arguments = [
        *("--checkpoint", str(tmp_path / "trunk.pth"), "--data.root", "x", "--crop", "32"),
        *("--iterations", "3", "--steps", "2", "--batch_size", "2", "--workers", "0"),
        *("--device", "cpu", "--out", str(tmp_path / "out"), "--log_every", "1"),
    ]
    assert segment.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "step 3/3" in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert 0 < lines[-1]["mIoU"] < 100
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 4
    assert "<td>IoU/b</td>" in page
    assert segment.main([*arguments, "--crop", "20"]) == 2
    assert "--crop is 20" in capsys.readouterr().err


def test_the_classes_of_training_and_test_agree(tmp_path: Path, monkeypatch: Any) -> None:
    def other(root: str, split: str) -> Segmentations:
        found = pictures(root, split)
        found.classes = found.classes[: 2 if split == "val" else 3]
        return found

    monkeypatch.setattr(segment, "segmentation_set", other)
    arguments = ["--checkpoint", "random:resnet18", "--data.root", "x", "--device", "cpu"]
    assert segment.main([*arguments, "--out", str(tmp_path)]) == 2
