"""A small run on disk, and encoders whose every number is its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from fastmoco.config import Config, MocoConfig, ModelConfig, OptimConfig, RunConfig
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.moco import build_moco
from fastmoco.method.step import Step
from tests.support.runs import saved

ONE = World(0, 0, 1, torch.device("cpu"), "none")

CONFIG = Config(
    run=RunConfig(precision="fp32"),
    model=ModelConfig(arch="resnet18", head="mlp", dim=8),
    # One BN group, and keys beside their queries: what the published code does on one device.
    moco=MocoConfig(queue_size=40, momentum=0.9, bn_group_size=0, shuffle_bn="none"),
    optim=OptimConfig(global_batch_size=8, lr=0.1),
)


def scrambled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The same module with random parameters and plausible random BN statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(3)
        elif name.endswith("running_var") or tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return module.eval()


@pytest.fixture(scope="session")
def trunk() -> dict[str, Tensor]:
    """Trunk of a torchvision ResNet-18: what the reader must find again, bit for bit."""
    state = scrambled(resnet18()).state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


@pytest.fixture
def config() -> Config:
    """Configuration of `new_step`."""
    return CONFIG


@pytest.fixture
def new_step() -> Callable[..., Step]:
    """Builds a step from a configuration."""

    def build(config: Config = CONFIG) -> Step:
        moco = build_moco(config, config.bn_group_size(1), ONE.device)
        return build_step(config, moco, ONE, compile_encoders=False)

    return build


@pytest.fixture
def images() -> Callable[[int], Any]:
    """Both views of a batch of 8, by its number."""

    def draw(number: int) -> Any:
        generator = torch.Generator().manual_seed(100 + number)
        both = torch.randint(0, 256, (2, 8, 32, 32, 3), generator=generator).to(torch.uint8)
        return SimpleNamespace(im_q=both[0], im_k=both[1])

    return draw


@pytest.fixture
def save() -> Callable[[Path, Step, int], Path]:
    """Writes a checkpoint of a step into a folder; its path."""

    def write(folder: Path, step: Step, epoch: int) -> Path:
        saved.save(folder, step, steps=6 * epoch, epoch=epoch, config=CONFIG, world=ONE)
        return (folder / "latest.pth.tar").resolve()

    return write


@pytest.fixture
def run(
    tmp_path: Path,
    new_step: Callable[..., Step],
    images: Callable[[int], Any],
    save: Callable[[Path, Step, int], Path],
) -> Path:
    """A run directory after one step, with a checkpoint, a record and a picture."""
    folder = tmp_path / "run"
    folder.mkdir()
    step = new_step()
    scrambled(step.moco.encoder_q).train()
    step([images(0)], 0)
    save(folder, step, 2)
    records = [
        {"kind": "knn_baseline", "step": 0, "chance": 0.1, "raw_pixel": 0.25, "untrained": 0.3},
        {"kind": "knn", "step": 6, "epoch": 1.0, "knn_top1": 0.4},
        {"kind": "knn", "step": 12, "epoch": 2.0, "knn_top1": 0.515},
        {"kind": "knn", "step": 18, "epoch": 3.0, "knn_top1": 0.6},  # after the checkpoint
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines + '{"kind": "kn')
    (folder / "curves.png").write_bytes(b"a picture")
    return folder
