"""Backbones, heads and stems: published sizes, official names, pixel normalization."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import pytest
import torch
from torchvision import models, transforms

from fastmoco.config import Config, ModelConfig
from fastmoco.config.fields import Arch
from fastmoco.machine.precision import DTYPES
from fastmoco.network.batchnorm import SplitBatchNorm2d
from fastmoco.network.encoder import Embed, NormalizePixels, build_encoder
from fastmoco.network.resnet import BACKBONES

# Millions of trunk parameters: table 1 of arXiv 1911.05722 where it has the network,
# torchvision's docs (less the classifier) elsewhere.
MILLIONS = {
    "resnet18": 11.2,
    "resnet34": 21.3,
    "resnet50": 23.5,
    "resnet101": 42.5,
    "resnext50_32x4d": 23.0,
    "resnext50_32x8d": 46.0,
    "resnet50_w2x": 93.9,
    "resnet50_w4x": 375.4,
}


def test_every_backbone_of_the_configuration_exists_and_has_its_published_size() -> None:
    assert set(get_args(Arch)) == set(BACKBONES) == set(MILLIONS)
    for arch in get_args(Arch):
        with torch.device("meta"):
            encoder = BACKBONES[arch](norm_layer=partial(SplitBatchNorm2d, group_size=0))
        count = sum(p.numel() for n, p in encoder.named_parameters() if not n.startswith("fc."))
        assert count / 1e6 == pytest.approx(MILLIONS[arch], abs=0.06)


@pytest.mark.parametrize(("head", "keys"), [("linear", 642), ("mlp", 646)])
def test_state_dict_has_the_official_keys(head: str, keys: int) -> None:
    """The official file counts queue, queue_ptr and two encoders."""
    config = ModelConfig(arch="resnet50", head=head)  # type: ignore[arg-type]
    with torch.device("meta"):
        names = list(build_encoder(config).state_dict())
    assert 2 + 2 * len(names) == keys
    fc = ["fc.weight", "fc.bias"] if head == "linear" else [f"fc.{i}" for i in (0, 2)]
    assert all(any(name.startswith(wanted) for name in names) for wanted in fc)


def test_cifar_stem_keeps_the_resolution() -> None:
    encoder = build_encoder(ModelConfig(arch="resnet18", stem="cifar"))
    seen: list[torch.Size] = []
    encoder.layer1.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
    encoder(torch.zeros(2, 3, 32, 32))
    assert seen == [torch.Size([2, 64, 32, 32])]


def test_pixels_are_normalized_as_torchvision_does() -> None:
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    official = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    expected = torch.stack([official(image.numpy()) for image in images])
    got = NormalizePixels()(images)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("arch", "width"), [("resnet18", 0.5), ("resnet50", 0.25)])
def test_width_multiplies_every_number_of_channels(arch: Any, width: float) -> None:
    with torch.device("meta"):
        full = build_encoder(ModelConfig(arch=arch, dim=96)).state_dict()
        narrow = build_encoder(ModelConfig(arch=arch, width=width, dim=96)).state_dict()
    assert list(full) == list(narrow)
    fixed = {3, 7, 1, 96}  # colours and sides of kernels, one pixel, C
    for name, tensor in narrow.items():
        for mine, theirs in zip(tensor.shape, full[name].shape, strict=True):
            assert mine == (theirs if theirs in fixed else theirs * width), name


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_trunk_and_gradients_are_those_of_torchvision(arch: str) -> None:
    torch.manual_seed(0)
    encoder = BACKBONES[arch](norm_layer=partial(SplitBatchNorm2d, group_size=0)).double()
    torch.manual_seed(0)
    twin = getattr(models, arch)().double()
    x, upstream = torch.randn(4, 3, 64, 64).double(), torch.randn(4, 1000).double()
    for network in (encoder.train(), twin.train()):
        network(x).backward(upstream)
    for (name, mine), theirs in zip(encoder.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    torch.testing.assert_close(dict(encoder.named_buffers()), dict(twin.named_buffers()))
    torch.testing.assert_close(encoder.eval().fc(encoder.trunk(x)), twin.eval()(x))


@pytest.mark.processor
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_embed_gives_unit_fp32_vectors(precision: str) -> None:
    config = Config(model=ModelConfig(arch="resnet18", dim=16))
    embed = Embed(build_encoder(config.model), DTYPES[precision])
    out = embed(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(4), rtol=0, atol=1e-5)
