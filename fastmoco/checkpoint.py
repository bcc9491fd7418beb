"""Checkpoints that the official MoCo scripts read as they are, and that resume this run exactly.

A file is `torch.save` of `epoch`, `arch`, `state_dict` and `optimizer` as the official trainer
writes them (names `module.encoder_q.*`, queue (C, K)), plus one entry `fastmoco` with what exact
resume needs beyond it: the step, the gradient scaler and the configuration. The sample order and
the augmentations need nothing: they are functions of the step.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

import fastmoco
from fastmoco.config import Config, ConfigError, dump, load, parse_text
from fastmoco.distributed import World, all_reduce_mean_, barrier
from fastmoco.step import Step
from fastmoco.weights import files
from fastmoco.weights.official import (
    load_model,
    load_optimizer,
    official_optimizer,
    official_state_dict,
    resume_official,
)

LATEST = "latest.pth.tar"
CONFIG = "config.yaml"


def save(folder: Path, step: Step, *, steps: int, epoch: int, config: Config, world: World) -> None:
    """Write a checkpoint after `steps` steps and point `latest.pth.tar` at it, on every rank.

    BN running statistics are first replaced, on every rank, by their mean over ranks: the file then
    speaks for all ranks, and a resumed run goes on exactly as this one does. The file appears
    under its name only when it is complete. `epoch` counts completed epochs.
    """
    all_reduce_mean_(step.moco.running_statistics(), world)
    if world.is_main:
        content = {
            "epoch": epoch,
            "arch": config.model.arch,
            "state_dict": (state := official_state_dict(step)),
            "optimizer": official_optimizer(step.optimizer.state_dict(), state),
            "fastmoco": {
                "version": fastmoco.__version__,
                "step": steps,
                "scaler": step.scaler.state_dict(),
                "config": dump(config),
            },
        }
        path = folder / f"checkpoint_{epoch:04d}_step{steps:08d}.pth.tar"
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(path)
        link = folder / (LATEST + ".partial")
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        link.replace(folder / LATEST)
        _forget_old(folder, config.run.keep_checkpoints)
    barrier(world)


def _forget_old(folder: Path, keep: int) -> None:
    found = sorted(folder.glob("checkpoint_*_step*.pth.tar"), key=_steps_in_name)
    for path in found[:-keep] if keep else []:
        path.unlink()


def _steps_in_name(path: Path) -> int:
    match = re.search(r"_step(\d+)", path.name)
    return int(match.group(1)) if match else -1


def find(config: Config) -> Path | None:
    """The checkpoint to resume from, or None to start afresh.

    Raises `ConfigError` if `run.resume` names a missing file, or forbids to resume where there is
    one.
    """
    latest = Path(config.run.dir) / LATEST
    if config.run.resume == "auto":
        return latest if latest.exists() else None
    if config.run.resume == "never":
        if latest.exists():
            raise ConfigError(
                f"{config.run.dir} already holds a trained run and run.resume is never: "
                "choose another run.dir, or delete that one."
            )
        return None
    if not Path(config.run.resume).is_file():
        raise ConfigError(f"run.resume names {config.run.resume}, which is not a file.")
    path = Path(config.run.resume)
    # A run that began from a foreign file and was interrupted goes on from its own checkpoint.
    foreign = path.resolve().parent != latest.resolve().parent
    return latest if foreign and latest.exists() else path


def resume(path: Path, step: Step, config: Config, steps_per_epoch: int) -> int:
    """Load `path` into the step in place and return the number of steps done.

    `path` is a checkpoint of ours or of the official trainer, which knows epochs only.

    Raises `ConfigError` if the file is neither, or of a run that learns another thing.
    """
    try:
        content: dict[str, Any] = files.load(path)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be resumed from. {error}") from error
    ours = content.get("fastmoco")
    if ours is None:
        return resume_official(content, step, config, steps_per_epoch, str(path))
    _require_same_run(parse_text(ours["config"]), config, str(path))
    load_model(step, content["state_dict"], str(path))
    load_optimizer(step, content["optimizer"], str(path))
    step.scaler.load_state_dict(ours["scaler"])
    return int(ours["step"])


def check_run_directory(config: Config) -> None:
    """Verify, before anything is computed, that `run.dir` can be written and is free or ours.

    Raises `ConfigError` if it cannot be written, or holds a run with another configuration: its
    checkpoints and logs would mix with ours.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"The run directory {folder} cannot be written ({error.strerror}): "
            "set run.dir to a folder that you may write to."
        ) from error
    written = folder / CONFIG
    if written.exists():
        _require_same_run(load(written), config, str(folder))


def claim_run_directory(config: Config) -> None:
    """Write the resolved configuration into `run.dir`: from here on it belongs to this run."""
    (Path(config.run.dir) / CONFIG).write_text(dump(config))


def _require_same_run(theirs: Config, ours: Config, place: str) -> None:
    there, here = theirs.identity(), ours.identity()
    changed = [f"{n} ({there[n]} there, {here[n]} now)" for n in here if there[n] != here[n]]
    if changed:
        raise ConfigError(
            f"{place} holds a run with another configuration: {', '.join(changed)}. "
            "Set run.dir to a new folder, or restore those values to resume it."
        )
