"""What a row is about, and whether it may be published."""

from __future__ import annotations

from typing import Any

import torch

from bench.measure.harness import environment
from fastmoco.config import Config, ConfigError
from fastmoco.machine.precision import choose_precision


def device_of(config: Config) -> torch.device:
    """The device that a run of this configuration uses."""
    cuda = torch.cuda.is_available() and config.run.device != "cpu"
    return torch.device("cuda" if cuda else "cpu")


def case_of(config: Config) -> dict[str, Any]:
    """What a row is about; rows of equal cases are comparable."""
    precision = choose_precision(config.run.precision, device_of(config))
    return {
        "arch": config.model.arch,
        "width": config.model.width,
        "image_size": config.augment.image_size,
        "batch": config.optim.global_batch_size,
        "queue_size": config.moco.queue_size,
        "precision": precision.name,
        "precision_why": precision.why,
        "compile": config.run.compile,
        "shuffle_bn": config.shuffle_bn(1),
        "bn_group_size": config.bn_group_size(1),
        "data": config.data.source,
    }


def origin(device: torch.device, publish: bool) -> dict[str, Any]:
    """The environment of rows (`harness.environment`); take it before anything is measured.

    Raises `ConfigError` where rows are to be published from a tree that differs from its commit.
    """
    where = environment(device)
    if publish and where["dirty"]:
        raise ConfigError("The tree differs from its commit, so no row may be kept: commit first.")
    return where
