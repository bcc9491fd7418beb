"""Checkpoints that the official MoCo scripts read as they are, and that resume this run exactly.

A file is `torch.save` of `epoch`, `arch`, `state_dict` and `optimizer` as the official trainer
writes them (names `module.encoder_q.*`, queue (C, K)), plus one entry `fastmoco` with what exact
resume needs beyond it: the step, the gradient scaler, the BN statistics of every rank, the
configuration and checksums. The sample order and the augmentations need nothing: they are functions
of the step.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

import torch

import fastmoco
from fastmoco.config import Config, ConfigError, dump
from fastmoco.data.sources.fingerprint import Fingerprint
from fastmoco.machine.collectives import all_gather, averaged, gather_objects
from fastmoco.machine.ranks import World
from fastmoco.method.step import Step
from fastmoco.run.record import METRICS, digest
from fastmoco.weights import files
from fastmoco.weights.checksums import CHECKSUMS, OURS, checksums, first, leaves, not_finite
from fastmoco.weights.official import official_optimizer, official_state_dict

# Seconds before each further try to write the last checkpoint of a run. Batch systems wait about
# 30 s after the first signal.
TRIES_S = (1.0, 4.0)


DATA = "data"
"""Where a checkpoint has the fingerprint of its images: `content["fastmoco"]["data"]`."""

RECORDS = "records"
"""The same for `digest` of the records before it."""


class NotSavedError(OSError):
    """The end of the run could not be written. The message is one sentence for the user."""


def save(
    folder: Path,
    step: Step,
    *,
    steps: int,
    epoch: int,
    config: Config,
    world: World,
    data: Fingerprint | None = None,
) -> str:
    """Write a checkpoint after `steps` steps and point `latest.pth.tar` at it; call on every rank.

    The weights in the file have the BN running statistics that are the mean over ranks; those of
    each rank are beside them, so that a resumed run goes on exactly as this one does. The file
    appears under its name only when it is complete and on the disk. `epoch` counts completed
    epochs.

    Returns, on every rank, an empty text, or why nothing was written: a full disk is no reason to
    end a run, which may try again later. What older checkpoints hold is untouched then.
    """
    running = step.moco.running_statistics()
    of_ranks = all_gather(torch.cat([b.reshape(-1) for b in running])[None], world).cpu()
    reason = ""
    with averaged(running, world):
        if world.is_main:
            content = {
                "epoch": epoch,
                "arch": config.model.arch,
                "state_dict": (state := official_state_dict(step)),
                "optimizer": official_optimizer(step.optimizer.state_dict(), state),
                OURS: {
                    "version": fastmoco.__version__,
                    "step": steps,
                    "scaler": step.scaler.state_dict(),
                    "precision": step.precision.name,
                    "config": dump(config),
                    "running_statistics": of_ranks,
                    RECORDS: _records_so_far(folder),
                    DATA: {name: torch.from_numpy(a) for name, a in vars(data).items()}
                    if data
                    else {},
                },
            }
            path = folder / f"checkpoint_{epoch:04d}_step{steps:08d}.pth.tar"
            reason = _write(path, content, config)
    return gather_objects(reason, world)[0]


class Saver:
    """When this run saves, and what happens where it cannot; the same on every rank."""

    def __init__(
        self,
        step: Step,
        config: Config,
        world: World,
        per_epoch: int,
        data: Fingerprint | None = None,
    ) -> None:
        self._step, self._config, self._world, self._data = step, config, world, data
        self._folder, self._per_epoch = Path(config.run.dir), per_epoch
        self._owed, self._saved_at = False, time.monotonic()

    def overdue(self) -> bool:
        """Whether `run.checkpoint_minutes` have passed on this rank since the last checkpoint."""
        minutes = self._config.run.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes

    def save_if_due(self, done: int, *, overdue: bool = False, end: bool = False) -> str:
        """Save after `done` steps where an epoch, some rank's clock or the end of the run asks.

        A checkpoint that could not be written is due again at the next call; a sentence then, else
        an empty text. Raises `NotSavedError` where that lasts for some seconds at the `end`.
        """
        epoch, within = divmod(done, self._per_epoch)
        regular = not within and epoch % self._config.run.checkpoint_every == 0
        if not (regular or overdue or end or self._owed):
            return ""
        for pause in (0.0, *TRIES_S) if end else (0.0,):
            time.sleep(pause)
            if not (reason := self._save(done)):
                return ""
        if not end:
            return reason
        older = files.checkpoints(self._folder)
        kept = f"the last checkpoint is {older[0].name}" if older else "there is no checkpoint yet"
        raise NotSavedError(
            f"The run ends at step {done}, but that cannot be saved: {reason} Make {self._folder} "
            f"writable, with enough space, and give the same command; {kept}."
        )

    def _save(self, done: int) -> str:
        reason = save(
            self._folder,
            self._step,
            steps=done,
            epoch=done // self._per_epoch,
            config=self._config,
            world=self._world,
            data=self._data,
        )
        self._owed, self._saved_at = bool(reason), time.monotonic()
        return reason


def _write(path: Path, content: dict[str, Any], config: Config) -> str:
    """Write the file, and then forget old ones. Why that failed, or an empty text."""
    tensors = [t for _, t in leaves(content) if isinstance(t, torch.Tensor)]
    try:
        if bad := not_finite(content):
            return f"{path.name} would hold values that are not finite ({first(bad)})."
        need = sum(t.numel() * t.element_size() for t in tensors)
        if (free := shutil.disk_usage(path.parent).free) < 1.02 * need:
            return (
                f"{path.name} needs {need / 1e6:.0f} MB and {path.parent} has {free / 1e6:.0f} MB "
                "left: free some, or lower run.keep_checkpoints."
            )
        content[OURS][CHECKSUMS] = checksums(content)
        files.write_torch(path, content)
        _point_at(path)
        _forget_old(path, config.run.keep_checkpoints, config.run.keep_every)
    except (ConfigError, OSError) as error:
        return f"{error}"
    return ""


def _records_so_far(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return digest(folder / METRICS)
    return ""


def _point_at(path: Path) -> None:
    """Make `latest.pth.tar` beside `path` a link to it, or a text with its name."""
    pointer = path.with_name(files.LATEST + ".partial")
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(path.name)
    except (OSError, NotImplementedError):  # Windows without the right to, FAT, some shares
        pointer.write_text(path.name, encoding="utf-8")
    pointer.replace(path.with_name(files.LATEST))


def _forget_old(written: Path, keep: int, every: int) -> None:
    """Delete all but the `keep` newest checkpoints, the one just written among them.

    With `every`, the first of each epoch that is a multiple of it stays for good: that is the file
    of its end.
    """
    older = [path for path in files.checkpoints(written.parent) if path != written]
    ends: dict[int, Path] = {files.epoch_in(path): path for path in [written, *older]}
    stays = {path for epoch, path in ends.items() if every and epoch and epoch % every == 0}
    for path in older[keep - 1 :] if keep else []:
        if path not in stays:
            path.unlink()
