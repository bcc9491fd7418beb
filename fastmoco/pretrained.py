"""A trained encoder as an ordinary torchvision network: `fastmoco.load_encoder(path)`.

N batch, S image side, D trunk width (512, 2048 or a multiple of it).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from fastmoco.batchnorm import SplitBatchNorm2d
from fastmoco.checkpoint import latest
from fastmoco.config import ConfigError
from fastmoco.resnet import BACKBONES

TRUNK = "module.encoder_q."
STEM = 64  # channels of the first convolution at model.width 1
# torchvision's own networks wherever they can be: every program that knows ResNets takes them.
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


def load_encoder(path: str | Path) -> resnet.ResNet:
    """The trunk of the query encoder, from a run directory or a checkpoint file.

    A torchvision `ResNet` on the CPU in evaluation mode whose `fc` is the identity: float images
    (N, 3, S, S), RGB in [0, 1] normalized with the mean and standard deviation of ImageNet as for
    torchvision's weights, to features (N, D). Where `model.width` or the architecture is not
    torchvision's, it is a subclass. Official MoCo checkpoints are read as well.

    Raises `ConfigError` where there is no checkpoint, or not one of MoCo.
    """
    file = Path(path)
    if file.is_dir():
        newest = latest(file)
        if newest is None:
            raise ConfigError(f"{file} holds no checkpoint yet: name a run directory that trained.")
        file = newest
    if not file.is_file():
        raise ConfigError(f"There is no run directory or checkpoint {file}.")
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        arch = str(content["arch"])
        state: dict[str, Tensor] = {
            name.removeprefix(TRUNK): tensor
            for name, tensor in content["state_dict"].items()
            if name.startswith(TRUNK) and not name.startswith(f"{TRUNK}fc.")
        }
        network = _build(arch, state)
    except Exception as error:  # unpickling raises anything
        raise ConfigError(
            f"{file} holds no encoder that can be read ({type(error).__name__}): name a complete "
            "checkpoint of fastmoco or of the official MoCo."
        ) from error
    return network.eval()


def _build(arch: str, state: dict[str, Tensor]) -> resnet.ResNet:
    """The network around the tensors of `state`. Raises `KeyError` or `RuntimeError`."""
    stem = state["conv1.weight"]
    with torch.device("meta"):  # no memory, and no random numbers drawn
        if arch in NETWORKS and len(stem) == STEM:
            network = NETWORKS[arch]()
        else:
            norm = partial(SplitBatchNorm2d, group_size=0)
            network = BACKBONES[arch](norm_layer=norm, width=len(stem) / STEM)
        if stem.shape[-1] == 3:  # model.stem cifar
            network.conv1 = nn.Conv2d(3, stem.shape[0], 3, stride=1, padding=1, bias=False)
            network.add_module("maxpool", nn.Identity())
    network.add_module("fc", nn.Identity())
    network.load_state_dict(state, assign=True)
    return network
