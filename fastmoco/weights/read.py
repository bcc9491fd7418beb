"""The one reader: from a path to the trunk of a query encoder and what is known about it.

It reads our checkpoints, run and hub folders and exports; official MoCo checkpoints, complete or
stripped to `encoder_q`, as published; ResNets of torchvision and timm; MoCo checkpoints of lightly
and solo-learn; with any wrapper's prefix, as `torch.save` or safetensors files.

D trunk width, C feature dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torchvision.models.resnet import ResNet

from fastmoco.config import ConfigError, DataConfig
from fastmoco.weights.architecture import Architecture, recognize
from fastmoco.weights.checksums import OURS, first, not_finite
from fastmoco.weights.files import METADATA, epoch_said, load, locate
from fastmoco.weights.names import tensors_of, to_torchvision
from fastmoco.weights.pixels import pixels_of

Head = Literal["linear", "mlp", "none"]


@dataclass(frozen=True)
class Weights:
    """A query encoder, fp32 on the CPU, under torchvision's names, and what its file says."""

    path: Path
    """The file that was read."""
    kind: str
    """Whose file it is: fastmoco, official, lightly, solo-learn, or torchvision (and timm)."""
    architecture: Architecture
    """The trunk by the names of `model.arch`, `model.width` and `model.stem`."""
    trunk: dict[str, Tensor]
    """Every entry of the encoder's state dict but those of `fc`."""
    head: dict[str, Tensor]
    """Entries `fc.*` of a projection head; empty without one. Classifiers are left out."""
    epoch: int | None
    """Epochs trained, where the file says so."""
    config: str | None
    """Configuration of the run as YAML, in our checkpoints."""
    pixels: DataConfig = field(default_factory=DataConfig)
    """How pictures are read and normalized for it: ImageNet's way where the file does not say."""

    @property
    def features(self) -> int:
        """D, the length of the features."""
        norm = "bn3" if "layer4.0.bn3.weight" in self.trunk else "bn2"
        return len(self.trunk[f"layer4.0.{norm}.weight"])

    @property
    def head_kind(self) -> Head:
        """`linear` and `mlp` as in `model.head`."""
        return "none" if not self.head else "linear" if "fc.weight" in self.head else "mlp"

    def describe(self) -> str:
        """One line for logs: what was read."""
        age = "" if self.epoch is None else f", epoch {self.epoch}"
        # solo-learn pads its 3x3 stem by two pixels (solo/methods/base.py), everybody else by one.
        padding = self.kind == "solo-learn" and self.architecture.stem == "cifar"
        note = "; its stem was trained with padding 2 and is used with padding 1" * padding
        return f"{self.architecture} ({self.kind}{age}) from {self.path}{note}"


LINEAR = {"fc.weight", "fc.bias"}
MLP = {"fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"}


def read(path: Path | str) -> Weights:
    """The query encoder in a file, or in a run or hub folder.

    Raises `ConfigError` for a file that cannot be read, holds no ResNet, or only part of one, and
    names what is missing.
    """
    file = locate(Path(path))
    return interpret(load(file), file)


def load_encoder(path: str | Path) -> ResNet:
    """The trunk of the query encoder in any file that `read` knows, as an ordinary network.

    A torchvision `ResNet` on the CPU in evaluation mode whose `fc` is the identity: float images
    (N, 3, S, S), RGB in [0, 1] normalized with the mean and standard deviation of ImageNet as for
    torchvision's weights, to features (N, D).

    Raises `ConfigError` as `read` does.
    """
    weights = read(path)
    return weights.architecture.build(weights.trunk)


def interpret(content: dict[str, Any], path: Path) -> Weights:
    """`read` of a content that `files.load` returned."""
    tensors = tensors_of(content)
    named = to_torchvision(tensors, str(path))
    if not named.trunk:
        some = ", ".join(list(tensors)[:3]) or "none at all"
        raise ConfigError(
            f"{path} holds no encoder that fastmoco knows: none of its {len(tensors)} names "
            f"({some}) belongs to a ResNet."
        )
    # Under these names files of others may hold anything.
    header, ours = _table(content.get(METADATA)), _table(content.get(OURS))
    header = {name: text for name, text in header.items() if isinstance(text, str)}
    epoch, config = content.get("epoch", header.get("epoch")), ours.get("config")
    architecture = recognize(named.trunk, str(path))
    if wrong := not_finite({**named.trunk, **named.head}):
        raise ConfigError(
            f"{path} holds NaN or infinite values, in {first(wrong)}: training diverged before it "
            "was written; take an earlier checkpoint."
        )
    return Weights(
        path=path,
        kind="fastmoco" if ours else header.get("source", named.kind),
        architecture=architecture,
        trunk=named.trunk,
        head=_projection_head(named.head, named.kind),
        epoch=None if epoch is None else epoch_said(epoch, path),
        config=config,
        pixels=pixels_of(config, header, architecture.channels, str(path)),
    )


def _table(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _projection_head(head: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A MoCo head; one layer under torchvision's bare names is a classifier, and no such head."""
    if set(head) == MLP or (set(head) == LINEAR and kind != "torchvision"):
        return head
    return {}
