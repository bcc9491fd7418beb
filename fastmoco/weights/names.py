"""From the names that a file gives its weights to torchvision's names of the query encoder.

Where the names come from, as read in the public sources of each project in 2026:

* the official MoCo trainer wraps the model in DDP: `module.encoder_q.<torchvision name>`, the key
  encoder beside it as `module.encoder_k.*`; torch.compile puts `_orig_mod.` in front of its part;
* lightly's examples keep `backbone`, the children of a torchvision ResNet without `fc` in an
  `nn.Sequential` (numbers instead of names), and `projection_head.layers.{0,2}`; key encoders
  are `backbone_momentum`, older `momentum_backbone`; its ImageNet benchmark names the trained
  encoder `query_backbone` and the slow one `backbone`; its own small ResNet calls the downsampling
  `shortcut`, in a Sequential without the ReLU and the pooling;
* solo-learn keeps `backbone.<torchvision name>` (before 2022 `encoder.`), `projector.{0,2}`, and
  `momentum_backbone`, `momentum_projector`, `classifier` beside them;
* timm and torchvision give the ResNets that we train the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmoco.config import ConfigError

WRAPPERS = {
    *("module", "_orig_mod", "model", "encoder_q", "encoder", "backbone"),
    *("query_backbone", "query_encoder", "base_encoder"),
}
NESTED = ("state_dict", "model", "model_state_dict")
TRUNK = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
HEADS = ("fc", "projection_head", "query_projection_head", "projector")
# Children of a torchvision ResNet by their place; 2 and 3 are the ReLU and the max pooling.
CHILDREN = {"0": "conv1", "1": "bn1", **{str(3 + i): f"layer{i}" for i in (1, 2, 3, 4)}}
# Children of lightly's own ResNet, which applies ReLU as a function and does not pool.
LIGHTLY_CHILDREN = {"0": "conv1", "1": "bn1", **{str(1 + i): f"layer{i}" for i in (1, 2, 3, 4)}}


@dataclass
class Named:
    """The query encoder of a file under torchvision's names.

    `trunk` has everything but the head; `head` is empty or `fc.*`; `kind` says whose names the file
    had: official, lightly, solo-learn, or torchvision (also timm, whose names are the same).
    """

    kind: str
    trunk: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The named tensors of a file's content, from `state_dict` or `model` where it is nested."""
    while True:
        inner = next((content[n] for n in NESTED if isinstance(content.get(n), Mapping)), None)
        if inner is None:
            return {str(n): t for n, t in content.items() if isinstance(t, Tensor)}
        content = inner


def to_torchvision(state: Mapping[str, Tensor], place: str) -> Named:
    """Pick the query encoder out of `state` and give it torchvision's names.

    The key encoder, the queue and classifiers beside the encoder are left out. A BN layer without
    `num_batches_tracked` (files from before 2018) gets 0, as torch does. `place` names the
    file in errors.

    Raises `ConfigError` if two entries claim one name with different values.
    """
    pieces = {name: name.split(".") for name in state}
    slow = {n for n, parts in pieces.items() if any(_is_slow(part) for part in parts)}
    queries = {n for n, parts in pieces.items() if any(_is_query(part) for part in parts)}
    kept = {n: _unwrapped(pieces[n]) for n in (queries or pieces) if n not in slow}
    children = _children(kept.values())
    found = Named(_kind(pieces.values(), bool(children)))
    for name, parts in kept.items():
        first, rest = children.get(parts[0], parts[0]), parts[1:]
        if first in TRUNK:
            rest = ["downsample" if part == "shortcut" else part for part in rest]
            _enter(found.trunk, ".".join([first, *rest]), state[name], place)
        elif first in HEADS and rest:
            rest = [part for part in rest if part != "layers"]
            _enter(found.head, ".".join(["fc", *rest]), state[name], place)
    for name in [n for n in found.trunk if n.endswith(".running_var")]:
        counter = name.replace("running_var", "num_batches_tracked")
        found.trunk.setdefault(counter, torch.zeros((), dtype=torch.int64))
    return found


def _is_slow(part: str) -> bool:
    return part == "encoder_k" or "momentum" in part


def _is_query(part: str) -> bool:
    return part == "encoder_q" or part.startswith("query_")


def _unwrapped(parts: list[str]) -> list[str]:
    """Without wrappers in front; torch.compile may have wrapped a block in the middle as well."""
    start = next((i for i, part in enumerate(parts[:-1]) if part not in WRAPPERS), len(parts) - 1)
    return [part for part in parts[start:] if part != "_orig_mod"]


def _children(names: Iterable[list[str]]) -> dict[str, str]:
    """What the numbers of an `nn.Sequential` of a ResNet's children mean; empty without numbers."""
    places = {parts[0] for parts in names if len(parts) > 1}
    if places & set(TRUNK) or "0" not in places:
        return {}
    return CHILDREN if "7" in places else LIGHTLY_CHILDREN


def _kind(names: Iterable[list[str]], numbered: bool) -> str:
    parts = {part for pieces in names for part in pieces[:-1]}
    if "encoder_q" in parts:
        return "official"
    if numbered or parts & {"projection_head", "query_projection_head"}:
        return "lightly"
    if parts & {"projector", "momentum_backbone", "momentum_encoder"}:
        return "solo-learn"
    return "torchvision"


def _enter(into: dict[str, Tensor], name: str, tensor: Tensor, place: str) -> None:
    """Add a tensor, as fp32 where it is of a float type."""
    tensor = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    if name in into and not torch.equal(into[name], tensor):
        raise ConfigError(
            f"{place} holds two different weights that both mean {name}: "
            "save the state_dict of the encoder alone to use it."
        )
    into[name] = tensor.contiguous()
