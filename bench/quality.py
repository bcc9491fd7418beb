"""Does it learn the same? Whole runs of our step and of the published one on the same views.

    python -m bench.quality --config FILE [--seeds 3 --first 0] [dotted overrides]

Both start from the same weights and queue and see the same batches at the same learning rates. On
one rank the published step normalizes a whole batch together and shuffles nothing, so ours does
too here: `moco.shuffle_bn none`, `moco.bn_group_size 0`. What is left is the order of roundings,
which training makes larger until two runs differ like two seeds. A row per seed and step: loss
(mean of an epoch) and kNN top-1 in [0, 1] at the epochs that `knn.every` asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from bench.measure.program import Options, command, parser
from bench.measure.rows import Row, case_of
from bench.steps.contestants import published_step
from fastmoco.config import Config, dump
from fastmoco.data.batch import Batch
from fastmoco.data.loader import build_loader
from fastmoco.data.sources.choose import resolve_folders
from fastmoco.evaluate.monitor import KnnMonitor
from fastmoco.machine import ranks
from fastmoco.machine.host import settle
from fastmoco.machine.ranks import World
from fastmoco.method.build import build_step
from fastmoco.method.moco import MoCo, build_moco
from fastmoco.method.optim.update import lr_at, set_lr
from fastmoco.network.encoder import NormalizePixels
from fastmoco.train import join_world

SAME = ("--moco.shuffle_bn=none", "--moco.bn_group_size=0", "--optim.accumulate=1")
Learner = tuple[Callable[[Batch, int, float], Tensor], Callable[[], MoCo]]
"""One step on a batch with its number and learning rate, which returns the loss; what it is now."""


def ours(config: Config, moco: MoCo, world: World) -> Learner:
    """The step of `fastmoco.train`."""
    step = build_step(config, moco, world, compile_encoders=False)

    def learn(batch: Batch, number: int, lr: float) -> Tensor:
        set_lr(step.optimizer, lr)
        return step([batch], number).loss

    return learn, lambda: moco


def published(config: Config, moco: MoCo, world: World) -> Learner:
    """The published step from the same weights and queue."""
    step = published_step(config, moco.encoder_q, moco.queue.T)
    normalize_pixels = NormalizePixels(world.device)

    def learn(batch: Batch, number: int, lr: float) -> Tensor:
        set_lr(step.optimizer, lr)
        images = (normalize_pixels(views).contiguous() for views in (batch.im_q, batch.im_k))
        return torch.tensor(step(*images)[0])

    def now() -> MoCo:
        moco.encoder_q.load_state_dict(step.moco.encoder_q.state_dict())
        return moco

    return learn, now


STEPS = {"published": published, "ours": ours}


def curve(config: Config, world: World, name: str) -> dict[str, list[float]]:
    """Loss of every epoch, and kNN at those that are monitored, of a whole run."""
    monitor = KnnMonitor(config, world)
    moco = build_moco(config, config.bn_group_size(world.size), world.device)
    learn, now = STEPS[name](config, moco, world)
    loss, knn = [], [monitor.trained(moco)]
    with build_loader(config, device=world.device) as loader:
        each = loader.steps_per_epoch
        batches = loader.batches(0, each * config.optim.epochs)
        for epoch in range(config.optim.epochs):
            total = torch.zeros((), device=world.device)
            for number, batch in enumerate(islice(batches, each), epoch * each):
                total += learn(batch, number, lr_at(config, number / each)).detach()
            loss.append(round(float(total) / each, 4))
            if (epoch + 1) % config.knn.every == 0 or epoch + 1 == config.optim.epochs:
                knn.append(round(monitor.trained(now()), 4))
    return {"loss": loss, "knn": knn}


PARSER = parser("quality", __doc__, only=False, windows=False, steps=False)
PARSER.add_argument("--seeds", type=int, default=3)
PARSER.add_argument("--first", type=int, default=0, help="the smallest seed")


@command(PARSER, words=lambda own: [*own.rest, *SAME])
def main(own: Options) -> Iterator[list[Row]]:
    """Rows of each seed as they come."""
    config = resolve_folders(own.config)
    world = join_world(config)
    settle(world.device)
    for seed in range(own.first, own.first + own.seeds):
        seeded = replace(config, run=replace(config.run, seed=seed))
        for name in STEPS:
            row = {"benchmark": "quality", "case": case_of(config), "contestant": name}
            yield [{**row, "seed": seed, **curve(seeded, world, name), "config": dump(seeded)}]
            ranks.stop()  # the published step is in a process group even alone


if __name__ == "__main__":
    sys.exit(main())
