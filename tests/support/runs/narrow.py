"""A narrow step of one rank, and how it resumes from a folder."""

from __future__ import annotations

from pathlib import Path

from fastmoco.config import Config, MocoConfig, ModelConfig, OptimConfig, RunConfig
from fastmoco.method.build import build_step
from fastmoco.method.moco import build_moco
from fastmoco.method.step import Step
from fastmoco.run import resuming
from tests.support.tiny import ONE


def config(folder: Path, seed: int = 0) -> Config:
    return Config(
        run=RunConfig(dir=str(folder), seed=seed, keep_checkpoints=2),
        model=ModelConfig(arch="resnet18", head="mlp", dim=8, width=0.25),
        moco=MocoConfig(queue_size=40, bn_group_size=4),
        optim=OptimConfig(global_batch_size=8),
    )


def built(settings: Config) -> Step:
    moco = build_moco(settings, settings.bn_group_size(1), ONE.device)
    return build_step(settings, moco, ONE, compile_encoders=False)


def build(folder: Path, seed: int = 0) -> Step:
    return built(config(folder, seed))


def resume(folder: Path, step: Step) -> resuming.Resumed:
    return resuming.resume(resuming.find(config(folder), ONE), step, config(folder), 10, ONE)
