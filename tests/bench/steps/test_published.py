"""The baseline that throughput is compared with does the same arithmetic as our step, in fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.models import resnet18

from bench.steps.published import OfficialMoCo, OfficialStep, as_published
from bench.steps.switches import layers_off
from fastmoco.config import Config, MocoConfig, ModelConfig, OptimConfig, RunConfig
from fastmoco.data.batch import Batch
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.moco import build_moco
from fastmoco.method.shuffle_bn import AllToAllShuffle
from fastmoco.network.encoder import NormalizePixels, build_encoder
from tests.support.ranks import Ranks

BATCH, SIDE, STEPS = 16, 40, 3

CONFIG = Config(
    run=RunConfig(precision="fp32", seed=5),
    model=ModelConfig(arch="resnet18", head="linear", dim=16),
    # Three steps fill the queue and wrap around; the published code needs a multiple of the batch.
    moco=MocoConfig(queue_size=2 * BATCH, momentum=0.9, bn_group_size=0),
    optim=OptimConfig(global_batch_size=BATCH, lr=0.01),
)


def compare(world: World) -> dict[str, list[float]]:
    """Relative distances between our step and the official one on this rank, per step."""
    local = BATCH // world.size
    moco = build_moco(CONFIG, CONFIG.bn_group_size(world.size), world.device)
    ours = build_step(CONFIG, moco, world, compile_encoders=False)
    encoder = resnet18(num_classes=CONFIG.model.dim)
    encoder.load_state_dict(moco.encoder_q.state_dict())
    settings = CONFIG.optim
    theirs = OfficialStep(
        OfficialMoCo(
            encoder,
            moco.queue.T.contiguous(),
            momentum=CONFIG.moco.momentum,
            temperature=CONFIG.moco.temperature,
        ),
        lr=settings.lr,
        momentum=settings.momentum,
        decay=settings.weight_decay,
    )
    apart: dict[str, list[float]] = {"loss": [], "top1": [], "queue": [], "weights": []}
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (2, BATCH, SIDE, SIDE, 3), generator=generator)
        rows = slice(world.rank * local, (world.rank + 1) * local)
        im_q, im_k = pixels.to(torch.uint8)[:, rows]
        order = torch.arange(BATCH)
        if isinstance(ours.shuffle, AllToAllShuffle):
            order = torch.from_numpy(ours.shuffle.arrangement(number))
        with mock.patch("torch.randperm", lambda *_, order=order, **__: order.clone()):
            loss, top1, _ = theirs(
                *(NormalizePixels()(images).contiguous() for images in (im_q, im_k))
            )
        # Rounding grows ten- to a hundredfold in every step, by flips at the kinks of ReLU. So both
        # have oneDNN's convolutions; how far ours are from float64 is shown in tests/kernels.
        with layers_off(("convolutions",)):
            result = ours([Batch(im_q, im_k)], number)
        apart["loss"].append(abs(float(result.loss) - loss) / loss)
        apart["top1"].append(abs(100 * float((result.rank == 0).float().mean()) - top1))
        apart["queue"].append(distance(moco.queue, theirs.moco.queue.T))
        weights = (
            torch.cat([p.detach().flatten() for p in encoder.parameters()])
            for encoder in (moco.encoder_q, theirs.moco.encoder_q)
        )
        apart["weights"].append(distance(*weights))
    return apart


def distance(a: Tensor, b: Tensor) -> float:
    """Euclidean distance relative to the length of the vectors."""
    return float((a - b).norm() / b.norm())


def check(apart: dict[str, list[float]]) -> None:
    assert max(apart["loss"]) < 2e-4
    assert max(apart["top1"]) == 0
    assert max(apart["queue"]) < 1e-3
    assert max(apart["weights"]) < 1e-3


@pytest.mark.parametrize("arch", ["resnet18", "resnet50_w2x"])
def test_published_encoder_runs_the_code_of_torchvision_on_the_same_weights(arch: str) -> None:
    encoder = build_encoder(ModelConfig(arch=arch, dim=4)).double()  # type: ignore[arg-type]
    x = torch.randn(2, 3, 64, 64).double()
    ours = encoder(x)
    published = as_published(copy.deepcopy(encoder))
    torch.testing.assert_close(published(x), ours)
    assert not any("fastmoco" in type(module).__module__ for module in published.modules())
    assert any("fastmoco" in type(module).__module__ for module in encoder.modules())


def test_official_step_equals_ours_on_one_rank(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        check(compare(World(0, 0, 1, torch.device("cpu"), "gloo")))
    finally:
        dist.destroy_process_group()


def test_official_step_equals_ours_on_two_ranks(two_ranks: Ranks) -> None:
    for apart in two_ranks.run(compare):
        check(apart)
