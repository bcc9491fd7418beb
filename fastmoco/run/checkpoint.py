"""Checkpoints that the official MoCo scripts read as they are, and that resume this run exactly.

A file is `torch.save` of `epoch`, `arch`, `state_dict` and `optimizer` as the official trainer
writes them (names `module.encoder_q.*`, queue (C, K)), plus one entry `fastmoco` with what exact
resume needs beyond it: the step, the gradient scaler and the configuration. The sample order and
the augmentations need nothing: they are functions of the step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastmoco
from fastmoco.config import Config, ConfigError, dump, parse_text
from fastmoco.machine.collectives import all_reduce_mean_, barrier
from fastmoco.machine.ranks import World
from fastmoco.method.step import Step
from fastmoco.run.directory import require_same_run
from fastmoco.weights import files
from fastmoco.weights.official import (
    load_model,
    load_optimizer,
    official_optimizer,
    official_state_dict,
    resume_official,
)

LATEST = "latest.pth.tar"


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
                "precision": step.precision.name,
                "config": dump(config),
            },
        }
        path = folder / f"checkpoint_{epoch:04d}_step{steps:08d}.pth.tar"
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(path)
        _point_at(path)
        _forget_old(folder, config.run.keep_checkpoints)
    barrier(world)


def _point_at(path: Path) -> None:
    """Make `latest.pth.tar` beside `path` a link to it, or a text with its name: see `latest`."""
    pointer = path.with_name(LATEST + ".partial")
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(path.name)
    except (OSError, NotImplementedError):  # Windows without the right to, FAT, some shares
        pointer.write_text(path.name, encoding="utf-8")
    pointer.replace(path.with_name(LATEST))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run directory, None where there is none.

    `latest.pth.tar` is a symbolic link, or, where the file system has none, a text with the file's
    name. Raises `ConfigError` where the checkpoint that it names is gone.
    """
    pointer = folder / LATEST
    if not pointer.is_symlink() and not pointer.is_file():
        return None
    target = pointer.resolve()
    if target.is_file() and target.stat().st_size < 256:
        name = target.read_bytes().decode("utf-8", errors="replace").strip()
        if re.fullmatch(r"checkpoint_\d+_step\d+\.pth\.tar", name):
            target = folder / name
    if not target.is_file():
        raise ConfigError(
            f"{pointer} names {target.name}, which is gone: delete {LATEST} to start afresh, or "
            "name another checkpoint in run.resume."
        )
    return target


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
    one, and as `latest` does.
    """
    folder = Path(config.run.dir)
    if config.run.resume == "auto":
        return latest(folder)
    if config.run.resume == "never":
        if latest(folder) is not None:
            raise ConfigError(
                f"{config.run.dir} already holds a trained run and run.resume is never: "
                "choose another run.dir, or delete that one."
            )
        return None
    named = Path(config.run.resume)
    if not named.is_file():
        raise ConfigError(f"run.resume names {named}, which is not a file.")
    # A run that began from a foreign file and was interrupted goes on from its own checkpoint.
    foreign = named.resolve().parent != Path(config.run.dir).resolve()
    own = latest(Path(config.run.dir)) if foreign else None
    return own or (latest(named.parent) if named.name == LATEST else None) or named


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    step: int
    """Steps done."""
    notes: tuple[str, ...] = ()
    """What is not as it was when the checkpoint was written; sentences for the user."""


def resume(path: Path, step: Step, config: Config, steps_per_epoch: int) -> Resumed:
    """Load `path` into the step in place.

    `path` is a checkpoint of ours or of the official trainer, which knows epochs only.

    Raises `ConfigError` if the file is neither, or of a run that learns another thing.
    """
    try:
        content: dict[str, Any] = files.load(path)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be resumed from. {error}") from error
    ours = content.get("fastmoco")
    if ours is None:
        return Resumed(resume_official(content, step, config, steps_per_epoch, str(path)))
    require_same_run(parse_text(ours["config"]), config, str(path))
    load_model(step, content["state_dict"], str(path))
    load_optimizer(step, content["optimizer"], str(path))
    step.scaler.load_state_dict(ours["scaler"])
    return Resumed(int(ours["step"]), tuple(_changes(ours.get("precision"), step)))


def _changes(precision: str | None, step: Step) -> Iterator[str]:
    """Differences that do not forbid to go on; `precision` is what the checkpoint ran in."""
    now = step.precision
    if precision is not None and precision != now.name:
        yield (
            f"The run was trained in {precision} so far and goes on in {now}: "
            "weights are fp32 in both, but the steps are no longer bit for bit the same."
        )
