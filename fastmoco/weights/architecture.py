"""Which of our architectures a set of weights is, told by names and shapes alone."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from fastmoco.config import ConfigError, ModelConfig
from fastmoco.encoder import build_encoder
from fastmoco.resnet import BACKBONES, ResNet

Stem = Literal["imagenet", "cifar"]
STEM_OF_KERNEL: dict[int, Stem] = {7: "imagenet", 3: "cifar"}


@cache
def _shapes(arch: str, stem: Stem) -> dict[str, tuple[int, ...]]:
    """Shapes of the trunk's entries by name; no memory is allocated."""
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(arch=arch, stem=stem))  # type: ignore[arg-type]
    state = encoder.state_dict().items()
    return {name: tuple(t.shape) for name, t in state if not name.startswith("fc.")}


def recognize(trunk: dict[str, Tensor], place: str) -> tuple[str, Stem]:
    """Architecture and stem of a trunk that is complete.

    `place` names the file in errors. Raises `ConfigError`, with names, for a trunk that is not one
    of ours, lacks entries, or has too many.
    """
    given = {name: tuple(t.shape) for name, t in trunk.items()}
    stem = STEM_OF_KERNEL.get(given.get("conv1.weight", (0,))[-1])
    for (
        arch
    ) in BACKBONES:  # stops early: shapes of all of them take seconds, those of ResNet-50 not
        if stem is not None and given == _shapes(arch, stem):
            return arch, stem
    nearest = {arch: _shapes(arch, stem or "imagenet") for arch in BACKBONES}
    best = max(nearest, key=lambda arch: len(given.items() & nearest[arch].items()))
    wanted = nearest[best]
    other = [n for n in wanted if n in given and given[n] != wanted[n]]
    complaints = {
        "missing": [n for n in wanted if n not in given],
        "not part of it": [n for n in given if n not in wanted],
        "of another shape": [f"{n} {given[n]} instead of {wanted[n]}" for n in other],
    }
    raise ConfigError(
        f"{place} is no complete encoder of an architecture that fastmoco knows; the nearest is "
        f"{best}, of which {_listed(complaints)}."
    )


def _listed(complaints: dict[str, list[str]]) -> str:
    """The first three names of each complaint, and how many more there are."""
    parts = []
    for what, names in complaints.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            parts.append(f"{what}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)


def build_trunk(arch: str, stem: Stem, trunk: dict[str, Tensor]) -> ResNet:
    """The encoder without a head, in evaluation mode: images (N, 3, S, S) to features (N, D)."""
    config = ModelConfig(arch=arch, stem=stem)  # type: ignore[arg-type]
    encoder = build_encoder(config)
    encoder.add_module("fc", nn.Identity())
    encoder.load_state_dict(trunk)
    return encoder.eval()
