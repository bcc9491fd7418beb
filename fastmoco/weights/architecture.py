"""Which of our architectures a set of weights is, told by names and shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from fastmoco.config import ConfigError, ModelConfig
from fastmoco.network.encoder import build_encoder
from fastmoco.network.resnet import BACKBONES, WIDTHS, ResNet

Stem = Literal["imagenet", "cifar"]
STEMS: dict[int, Stem] = {7: "imagenet", 3: "cifar"}
"""Stem by the side of its first convolution's kernel."""

# torchvision's own class where there is one: what it makes works in every program that knows it.
NETWORKS: dict[str, Callable[[], resnet.ResNet]] = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnext50_32x4d": resnet.resnext50_32x4d,
    "resnext50_32x8d": partial(
        resnet.ResNet, resnet.Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=8
    ),
}


@dataclass(frozen=True)
class Architecture:
    """A trunk by the names of `model.arch`, `model.width`, `model.stem` and `data.channels`."""

    arch: str
    width: float
    stem: Stem
    channels: int = 3

    @property
    def is_common(self) -> bool:
        """Whether torchvision and timm have it, but for the stem: theirs have one width only."""
        return self.arch in NETWORKS and self.width == 1

    def __str__(self) -> str:
        wide = "" if self.width == 1 else f" of width {self.width:g}"
        inputs = "" if self.channels == 3 else f" for {self.channels} channels"
        return f"{self.arch}{wide} with the {self.stem} stem{inputs}"

    def build(self, trunk: dict[str, Tensor]) -> resnet.ResNet:
        """The network around the tensors of `trunk`, `fc` the identity, in evaluation mode."""
        with torch.device("meta"):  # no memory, and no random numbers drawn
            network = NETWORKS[self.arch]() if self.is_common else self.encoder()
            if self.is_common and self.stem == "cifar":
                network.conv1 = nn.Conv2d(self.channels, 64, 3, padding=1, bias=False)
                network.add_module("maxpool", nn.Identity())
            elif self.is_common and self.channels != 3:
                network.conv1 = nn.Conv2d(self.channels, 64, 7, stride=2, padding=3, bias=False)
        network.add_module("fc", nn.Identity())
        network.load_state_dict(trunk, assign=True)
        return network.eval()

    def config(self) -> ModelConfig:
        """The model that has this trunk."""
        return ModelConfig(arch=self.arch, width=self.width, stem=self.stem)  # type: ignore[arg-type]

    def encoder(self) -> ResNet:
        """The encoder of training with this trunk, at random weights."""
        return build_encoder(self.config(), channels=self.channels)


Shapes = dict[str, tuple[int, ...]]


@cache
def shapes(architecture: Architecture) -> Shapes:
    """Shapes of the trunk's entries by name; no memory is allocated."""
    with torch.device("meta"):
        state = architecture.encoder().state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if not name.startswith("fc.")}


def recognize(trunk: dict[str, Tensor], place: str) -> Architecture:
    """The architecture of a trunk that is complete.

    `place` names the file in errors. Raises `ConfigError`, with names, for a trunk that is not one
    of ours, lacks entries, or has too many.
    """
    given: Shapes = {name: tuple(t.shape) for name, t in trunk.items()}
    stem = given.get("conv1.weight", ())
    width, inputs, side = (stem[0], stem[1], stem[3]) if len(stem) == 4 else (64, 3, 7)
    candidates = [
        Architecture(arch, width / 64 / WIDTHS.get(arch, 1), STEMS.get(side, "imagenet"), inputs)
        for arch in BACKBONES
    ]
    # The name that needs no width first: R50w2x is also a ResNet-50 of width 2. Shapes of all
    # candidates take seconds, so the search stops early.
    candidates.sort(key=lambda candidate: candidate.width != 1)
    for candidate in candidates:
        if given == shapes(candidate):
            return candidate
    best = max(candidates, key=lambda candidate: len(given.items() & shapes(candidate).items()))
    raise ConfigError(
        f"{place} is no complete encoder of an architecture that fastmoco knows; the nearest is "
        f"{best}, of which {_complaints(given, shapes(best))}."
    )


def _complaints(given: Shapes, wanted: Shapes) -> str:
    """What is missing, too much or of another shape, with the first three names of each."""
    other = [n for n in wanted if n in given and given[n] != wanted[n]]
    found = {
        "missing": [n for n in wanted if n not in given],
        "not part of it": [n for n in given if n not in wanted],
        "of another shape": [f"{n} {given[n]} instead of {wanted[n]}" for n in other],
    }
    parts = []
    for what, names in found.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            parts.append(f"{what}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)
