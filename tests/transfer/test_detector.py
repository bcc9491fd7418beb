"""Detectors hold the trunk that they were given, tune all of it, and find boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from fastmoco.config import ConfigError
from fastmoco.machine.ranks import World
from fastmoco.transfer.batchnorm import SyncBatchNorm2d
from fastmoco.transfer.detector import Arch, Task, build_detector, random_weights
from fastmoco.weights.architecture import Architecture
from fastmoco.weights.read import Weights, read

ALONE = World(0, 0, 1, torch.device("cpu"), "none")
SIDE = 96
KINDS: list[tuple[Arch, Task]] = [
    ("c4", "boxes"),
    ("c4", "masks"),
    ("fpn", "boxes"),
    ("fpn", "masks"),
    ("fpn", "keypoints"),
]
KINDS_AND_CHANNELS = [(*kind, 256) for kind in KINDS] + [(*kind, 24) for kind in KINDS[2:]]


def small(width: float = 0.25) -> Weights:
    return random_weights(Architecture("resnet18", width, "imagenet"), seed=1)


def pictures() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two pictures, the second of them without an object."""
    draw = torch.Generator().manual_seed(2)
    masks = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    masks[0, 20:70, 10:60] = 1
    target = {
        "boxes": torch.tensor([[10.0, 20.0, 60.0, 70.0]]),
        "labels": torch.tensor([2]),
        "masks": masks,
        "keypoints": torch.tensor([[[20.0, 30.0, 1.0], [50.0, 60.0, 1.0]]]),
    }
    images = [torch.rand(3, SIDE, SIDE, generator=draw) for _ in range(2)]
    return images, [target, {name: x[:0] for name, x in target.items()}]


@pytest.mark.parametrize(("arch", "task", "channels"), KINDS_AND_CHANNELS)
def test_all_of_it_is_tuned_and_the_trunk_that_was_given_stays(
    arch: Arch, task: Task, channels: int
) -> None:
    weights = small()
    before = {name: x.clone() for name, x in weights.trunk.items()}
    options: dict[str, Any] = {"min_size": SIDE, "fpn_channels": channels}
    model: Any = build_detector(
        weights, ALONE, arch=arch, task=task, classes=3, keypoints=2, **options
    )
    if arch == "fpn":
        widths = {block[0].out_channels for block in model.backbone.fpn.layer_blocks}
        assert widths == {channels} == {model.roi_heads.box_head.fc6.in_features // 49}
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 16
    torch.manual_seed(0)
    losses = model(*pictures())
    assert {"boxes": 4, "masks": 5, "keypoints": 5}[task] == len(losses)
    sum(losses.values(), torch.zeros(())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    norms = [m for m in model.modules() if isinstance(m, SyncBatchNorm2d)]
    in_the_trunk, new = 20, {"c4": 1, "fpn": 8}[arch] + 4 * (arch == "fpn" and task == "masks")
    assert len(norms) == in_the_trunk + new
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert all(norm.num_batches_tracked == 1 for norm in norms)
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(torch.equal(x, before[name]) for name, x in weights.trunk.items())
    model.rpn._post_nms_top_n = {"training": 20, "testing": 20}
    model.roi_heads.detections_per_img = 2  # the keypoint head takes half a second for each
    found = model.eval()(pictures()[0])
    assert {"boxes", "labels", "scores"} <= set(found[0])
    assert task == "boxes" or task in found[0]


@pytest.mark.parametrize("width", [1.0, 0.25], ids=["torchvision's", "a width of ours"])
def test_c4_is_the_network_of_the_file_cut_behind_layer3(width: float) -> None:
    weights = small(width)
    model: Any = build_detector(weights, ALONE, arch="c4", task="boxes", classes=3).eval()
    whole = weights.architecture.build(weights.trunk)
    images = pictures()[0][0][None]
    with torch.no_grad():
        middle = model.backbone(images)["0"]
        head = model.roi_heads.box_head
        head.norm = nn.Identity()
        features = head(middle).mean((2, 3))
        torch.testing.assert_close(features, whole(images), rtol=1e-4, atol=1e-5)
        assert model.roi_heads.box_predictor.cls_score(features).shape == (1, 4)


def test_a_supervised_file_of_torchvision_is_a_trunk(tmp_path: Path) -> None:
    network = resnet18()
    torch.save(network.state_dict(), tmp_path / "supervised.pth")
    weights = read(tmp_path / "supervised.pth")
    model: Any = build_detector(weights, ALONE, arch="fpn", task="boxes", classes=1)
    state = model.backbone.body.state_dict()
    assert len(state) == len(network.state_dict()) - 2
    assert all(torch.equal(x, network.state_dict()[name]) for name, x in state.items())


def test_pictures_are_normalized_as_the_file_says() -> None:
    weights = small()
    model: Any = build_detector(weights, ALONE, arch="fpn", task="boxes", classes=1, min_size=64)
    images, _ = model.transform([torch.full((3, 64, 64), 0.5)])
    wanted = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images.tensors[0, :, 30, 30], wanted)


def test_new_layers_and_random_trunks_come_from_their_seed_alone() -> None:
    def state(seed: int) -> dict[str, Tensor]:
        weights = random_weights(Architecture("resnet18", 0.25, "imagenet"), seed)
        return build_detector(
            weights, ALONE, arch="c4", task="boxes", classes=2, seed=seed
        ).state_dict()

    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    first = state(1)
    assert torch.equal(torch.rand(3), wanted)
    again, other = state(1), state(2)
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    for name in ("backbone.body.conv1.weight", "rpn.head.cls_logits.weight"):
        assert not torch.equal(first[name], other[name])


def test_c4_refuses_keypoints() -> None:
    with pytest.raises(ConfigError, match="no head for keypoints, as in the paper: choose --arch"):
        build_detector(small(), ALONE, arch="c4", task="keypoints", classes=1)


def test_other_channels_and_no_classes_are_refused() -> None:
    gray = random_weights(Architecture("resnet18", 0.25, "imagenet", channels=1), 0)
    with pytest.raises(ConfigError, match="is a trunk for 1 channels"):
        build_detector(gray, ALONE, arch="fpn", task="boxes", classes=1)
    with pytest.raises(ConfigError, match="of 0 classes"):
        build_detector(small(), ALONE, arch="fpn", task="boxes", classes=0)


@pytest.mark.parametrize(
    ("stem", "strides"), [("imagenet", (4, 8, 16, 32)), ("cifar", (1, 2, 4, 8))]
)
def test_regions_are_pooled_at_the_strides_of_the_maps(stem: Any, strides: tuple[int, ...]) -> None:
    """Whatever the first pictures are: torchvision guesses 1/8 and so on from a short picture."""
    weights = random_weights(Architecture("resnet18", 0.125, stem), seed=1)
    image = torch.rand(3, 20, 40)
    kinds: list[tuple[Arch, tuple[int, ...]]] = [("fpn", strides), ("c4", strides[2:3])]
    for arch, wanted in kinds:
        model: Any = build_detector(
            weights, ALONE, arch=arch, task="boxes", classes=1, min_size=20, test_proposals=4
        ).eval()
        maps: list[Tensor] = []
        model.backbone.register_forward_hook(lambda *a, m=maps: m.extend(a[2].values()))
        model([image])
        pool = model.roi_heads.box_roi_pool
        assert pool.scales == [1 / stride for stride in wanted]
        assert [64 // one.shape[-1] for one in maps][: len(wanted)] == list(wanted)
