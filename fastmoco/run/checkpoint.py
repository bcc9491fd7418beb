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
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastmoco
from fastmoco.config import Config, ConfigError, dump
from fastmoco.data.sources.fingerprint import Fingerprint
from fastmoco.machine import durable
from fastmoco.machine.collectives import all_gather, averaged, gather_objects
from fastmoco.machine.ranks import World
from fastmoco.method.step import Step
from fastmoco.run.record import METRICS, digest
from fastmoco.weights import files
from fastmoco.weights.checksums import CHECKSUMS, OURS, checksums, first, leaves, not_finite
from fastmoco.weights.formats.official import copied, official_optimizer, official_state_dict

# Seconds before each further try to write the last checkpoint of a run. Batch systems wait about
# 30 s after the first signal.
TRIES_S = (1.0, 4.0)
# Seconds that a write gets which a second signal finds on its way.
LAST_S = 5.0


DATA = "data"
"""Where a checkpoint has the fingerprint of its images: `content["fastmoco"]["data"]`."""

RECORDS = "records"
"""The same for `digest` of the records before it."""


class NotSavedError(OSError):
    """The end of the run could not be written. The message is one sentence for the user."""


@dataclass(frozen=True)
class Snapshot:
    """A copy on the host of all that a checkpoint holds."""

    path: Path
    content: dict[str, Any]
    config: Config
    copied: torch.cuda.Event | None
    """Copies from a GPU have arrived after it."""

    records: int
    """Bytes of metrics.jsonl then: what comes after them belongs to later steps."""

    def write(self) -> str:
        """Write it and point `latest.pth.tar` at it: an empty text, or why nothing was written.

        The file appears under its name only when it is complete and on the disk. A full disk is no
        reason to end a run, which may try again later; older checkpoints are untouched then.
        """
        if self.copied is not None:
            self.copied.synchronize()
        self.content[OURS][RECORDS] = _records(self.path.parent, self.records)
        return _write(self.path, self.content, self.config)


def snapshot(
    folder: Path,
    step: Step,
    *,
    steps: int,
    epoch: int,
    config: Config,
    world: World,
    data: Fingerprint | None = None,
) -> Snapshot | None:
    """A checkpoint after `steps` steps, on the main rank; call it on every one.

    The weights in it have the BN running statistics that are the mean over ranks; those of each
    rank are beside them, so that a resumed run goes on exactly as this one does. `epoch` counts
    completed epochs.
    """
    running = step.moco.running_statistics()
    of_ranks = all_gather(torch.cat([b.reshape(-1) for b in running])[None], world)
    with averaged(running, world):
        if not world.is_main:
            return None
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
                "running_statistics": copied(of_ranks),
                DATA: {name: torch.from_numpy(a) for name, a in vars(data).items()} if data else {},
            },
        }
        path = folder / f"checkpoint_{epoch:04d}_step{steps:08d}.pth.tar"
        event = None
        if world.device.type == "cuda":
            # On the stream of the step: what changes the weights comes after the copies there, so
            # that another stream would have nothing to do meanwhile. The host goes on at once.
            event = torch.cuda.Event()
            event.record()
        return Snapshot(path, content, config, event, _size(folder / METRICS))


class Saver:
    """When this run saves, and what happens where it cannot; the same on every rank.

    A thread writes while training goes on; the next snapshot is taken when it is done, so that
    there is one copy on the host at most. On leaving, what is on its way is waited for.
    """

    def __init__(
        self,
        step: Step,
        config: Config,
        world: World,
        per_epoch: int,
        data: Fingerprint | None = None,
    ) -> None:
        self._step, self._config, self._world, self._data = step, config, world, data
        self.folder, self._per_epoch = Path(config.run.dir), per_epoch
        self._owed, self._saved_at = False, time.monotonic()
        self._writing = False  # on every rank, until all know the outcome
        self._thread: threading.Thread | None = None  # of the main rank
        self._path: Path | None = None  # what it writes
        self._reason = ""

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A second signal wants the end at once, though not in the middle of a file that is nearly
        # there.
        at_once = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        if self._thread is None or self._path is None:
            return
        self._thread.join(LAST_S if at_once else None)
        if self._thread.is_alive():
            with contextlib.suppress(OSError):  # Windows: the next start sweeps it
                durable.partial_of(self._path).unlink()

    def overdue(self) -> bool:
        """Whether `run.checkpoint_minutes` have passed on this rank since the last checkpoint."""
        minutes = self._config.run.checkpoint_minutes
        passed = minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes
        return passed and not self._writing

    def save_if_due(self, done: int, *, overdue: bool = False, end: bool = False) -> str:
        """Save after `done` steps where an epoch, some rank's clock or the end of the run asks.

        Returns while the file is written, but at the `end`. A checkpoint that could not be written
        is due again at the next call that knows; a sentence then, else an empty text. Raises
        `NotSavedError` where that lasts for some seconds at the `end`.
        """
        warning = self._outcome(wait=False)
        epoch, within = divmod(done, self._per_epoch)
        regular = not within and epoch % self._config.run.checkpoint_every == 0
        if not (regular or overdue or end or self._owed):
            return warning
        warning = warning or self._outcome(wait=True)  # never two at once
        if not end:
            self._begin(done)
            return warning
        for pause in (0.0, *TRIES_S):
            time.sleep(pause)
            self._begin(done)
            if not (reason := self._outcome(wait=True)):
                return ""
        older = files.checkpoints(self.folder)
        kept = f"the last checkpoint is {older[0].name}" if older else "there is no checkpoint yet"
        raise NotSavedError(
            f"The run ends at step {done}, but that cannot be saved: {reason} Make {self.folder} "
            f"writable, with enough space, and give the same command; {kept}."
        )

    def _begin(self, done: int) -> None:
        """Take a snapshot and let a thread write it."""
        found = snapshot(
            self.folder,
            self._step,
            steps=done,
            epoch=done // self._per_epoch,
            config=self._config,
            world=self._world,
            data=self._data,
        )
        self._writing, self._owed, self._saved_at = True, False, time.monotonic()
        if found is not None:
            self._reason = "the writing of the checkpoint ended without a word."
            self._path = found.path
            self._thread = threading.Thread(
                target=self._write, args=(found,), name="checkpoint", daemon=True
            )
            self._thread.start()

    def _write(self, one: Snapshot) -> None:
        try:
            self._reason = one.write()
        except Exception as error:  # in a thread nobody else would tell
            self._reason = f"{one.path.name}: {type(error).__name__}: {error}."

    def _outcome(self, *, wait: bool) -> str:
        """Why the last write failed, on every rank; empty also while it goes on."""
        if not self._writing:
            return ""
        if wait and self._thread is not None:
            self._thread.join()
        ended = self._thread is None or not self._thread.is_alive()
        ended, reason = gather_objects((ended, self._reason if ended else ""), self._world)[0]
        if ended:
            self._writing, self._owed, self._thread = False, bool(reason), None
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
        files.point_at(path)
        _forget_old(path, config.run.keep_checkpoints, config.run.keep_every)
    except (ConfigError, OSError) as error:
        return f"{error}"
    return ""


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _records(folder: Path, size: int) -> str:
    with contextlib.suppress(OSError):
        return digest(folder / METRICS, size)
    return ""


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
