"""From which checkpoint a run goes on, and how it is put back.

A checkpoint is trusted when all of it is as it was written. Where the newest is not, the one
before is taken, and the user is told.
"""

from __future__ import annotations

import contextlib
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from fastmoco.config import Config, ConfigError, parse_text
from fastmoco.data.loader import Loader
from fastmoco.data.sources.fingerprint import Fingerprint
from fastmoco.machine.collectives import gather_objects
from fastmoco.machine.ranks import World
from fastmoco.method.step import Step
from fastmoco.run.checkpoint import DATA, RECORDS
from fastmoco.run.directory import require_same_run
from fastmoco.run.record import METRICS, digest
from fastmoco.weights import files
from fastmoco.weights.checksums import OURS, first, not_finite
from fastmoco.weights.files import LATEST
from fastmoco.weights.formats.official import load_model, load_optimizer, resume_official

DAMAGED = ".damaged"
"""Ends the name of a checkpoint that could not be read: retention and resume pass it over."""


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from."""

    path: Path
    content: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What was lost on the way to it; sentences for the user."""


def read(path: Path) -> Found:
    """A checkpoint, ours or the official trainer's, whose every tensor is as it was written.

    Raises `ConfigError` for a file that is damaged, or holds values that are not finite.
    """
    try:
        content = files.load(path)
    except ConfigError as error:
        raise ConfigError(f"{str(error).rstrip('.')}; it cannot be resumed from.") from error
    if bad := not_finite(content):
        raise ConfigError(
            f"{path} cannot be resumed from: it holds values that are not finite, in {first(bad)}."
        )
    return Found(path, content)


def find(config: Config, world: World) -> Found | None:
    """The checkpoint to go on from, or None to start afresh; call on every rank.

    A run directory with checkpoints always goes on from its newest good one. `run.resume` can name
    where a new directory starts.

    Raises `ConfigError` if `run.resume` names a missing file, or forbids to resume where there is
    something to, if no checkpoint can be read, or if not every rank sees them.
    """
    folder = Path(config.run.dir)
    own = _candidates(folder, world)
    if config.run.resume == "never" and own:
        raise ConfigError(
            f"{config.run.dir} already holds a trained run and run.resume is never: "
            "choose another run.dir, or delete that one."
        )
    if own:
        found = _newest_good(own, world)
        if world.is_main and found.path.name != LATEST:
            _mend_pointer(found.path)
        return replace(found, notes=(*found.notes, *_passed_over(config, found.path)))
    if config.run.resume in ("auto", "never"):
        return None
    named = Path(config.run.resume)
    if named.name == LATEST and (theirs := _candidates(named.parent, world)):
        return _newest_good(theirs, world)
    if not named.is_file():
        raise ConfigError(f"run.resume names {named}, which is not a file.")
    return read(named)


def _mend_pointer(newest: Path) -> None:
    """After a power loss it may name an older file, and a complete run writes no more.

    A pointer that is itself a file stays: a copy by a tool that follows links.
    """
    with contextlib.suppress(OSError):
        named = files.pointed_at(newest.parent)
        if named is None or files.steps_in(named) not in (-1, files.steps_in(newest)):
            files.point_at(newest)


def _passed_over(config: Config, own: Path) -> Iterator[str]:
    """A sentence where `run.resume` names an older checkpoint of the run's own directory."""
    named = Path(config.run.resume)
    if named.parent.resolve() == own.parent.resolve() and files.steps_in(named) not in (
        -1,
        files.steps_in(own),
    ):
        yield (
            f"run.resume names {named.name}, but this directory goes on from its newest, "
            f"{own.name}: to go back, name that file with a new run.dir."
        )


def _candidates(folder: Path, world: World) -> list[Path]:
    """Checkpoints of the folder, the newest first, as rank 0 sees them.

    Raises `ConfigError` as `files.latest` does, and where ranks do not see the same folder.
    """
    found = files.checkpoints(folder)
    if not found and (alone := files.latest(folder)) is not None:
        found = [alone]
    names = gather_objects([path.name for path in found], world)
    for rank, theirs in enumerate(names):
        if theirs != names[0]:
            raise ConfigError(
                f"Rank {rank} sees {len(theirs)} checkpoints in {folder} and rank 0 "
                f"{len(names[0])}: set run.dir to a folder that all nodes share."
            )
    return found


def _newest_good(candidates: Sequence[Path], world: World) -> Found:
    """The first that can be read, with a note on every newer one; damaged ones are renamed."""
    lost: list[str] = []
    pointed = files.pointed_at(candidates[0].parent)
    if pointed is not None and files.steps_in(pointed) > files.steps_in(candidates[0]):
        lost.append(f"{pointed.name}, which {LATEST} names, is gone")
    for path in candidates:
        try:
            found, reason = read(path), ""
        except ConfigError as error:
            found, reason = None, str(error)
        told = gather_objects(reason, world)
        if found is not None and not any(told):
            return Found(path, found.content, tuple(_lost(lost, path)))
        if not told[0]:
            raise ConfigError(f"Rank {[bool(r) for r in told].index(True)}: {max(told)}")
        lost.append(told[0])
        if world.is_main and path.name != LATEST:
            with contextlib.suppress(OSError):
                path.rename(path.with_name(path.name + DAMAGED))
    raise ConfigError(
        f"None of the {len(candidates)} checkpoints in {candidates[0].parent} can be read: "
        f"{lost[-1]} Delete them to start afresh."
    )


def _lost(reasons: list[str], path: Path) -> Iterator[str]:
    if reasons:
        yield (
            f"{' '.join(reasons)} The run goes on from {path.name}, the newest good checkpoint; "
            "the steps since then are computed again."
        )


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on."""

    step: int
    """Steps done."""
    notes: tuple[str, ...] = ()
    """What is not as it was when the checkpoint was written; sentences for the user."""


def resume(
    found: Found | None, step: Step, config: Config, steps_per_epoch: int, world: World
) -> Resumed:
    """Load a checkpoint into the step in place; None is the start of a run.

    It is one of ours or of the official trainer, which knows epochs only.

    Raises `ConfigError` if the file is neither, or of a run that learns another thing.
    """
    if found is None:
        return Resumed(0)
    content, place = found.content, str(found.path)
    ours = content.get(OURS)
    try:
        if ours is None:
            steps = resume_official(content, step, config, steps_per_epoch, place)
            return Resumed(steps, found.notes)
        changed = require_same_run(parse_text(ours["config"]), config, place)
        load_model(step, content["state_dict"], place)
        load_optimizer(step, content["optimizer"], place)
        if ours["scaler"]:  # empty of a run that was not in fp16
            step.scaler.load_state_dict(ours["scaler"])
        _load_own_statistics(step, ours.get("running_statistics"), world)
        notes = (*found.notes, *([changed] if changed else []), *_other_records(found, config))
        return Resumed(_step_number(ours["step"]), (*notes, *_changes(ours.get("precision"), step)))
    except ConfigError:
        raise
    except (
        ArgumentError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        yaml.YAMLError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{place} cannot be resumed from: it is no checkpoint of fastmoco or of the official "
            f"trainer ({type(error).__name__}: {reason})."
        ) from error


def require_same_data(found: Found | None, loader: Loader, config: Config) -> list[str]:
    """What `run.resume_changes` allows to differ in the images, as sentences for the user.

    Raises `ConfigError` for another data set than the checkpoint's, unless they are allowed. One
    without a fingerprint, of an older version or of the official trainer, fits every data set.
    """
    then = _images_of(found) if found else None
    if found is None or then is None or not (changed := loader.changes_since(then)):
        return []
    if config.run.resume_changes == "allow":
        told = f"{changed} ({len(then.names):,} images then, {loader.num_samples:,} now)"
        return [f"The run goes on with other images, as run.resume_changes allows: {told}."]
    raise ConfigError(
        f"The images in {config.data.root} are not those that {found.path} was trained on: "
        f"{changed}. The same numbers would mean other images: restore them, set run.dir to a new "
        "folder, or go on with them by --run.resume_changes allow."
    )


def _images_of(found: Found) -> Fingerprint | None:
    ours = found.content.get(OURS)
    kept = ours.get(DATA) if isinstance(ours, Mapping) else None
    if not kept:
        return None
    try:
        return Fingerprint(*(kept[field.name].reshape(-1).numpy() for field in fields(Fingerprint)))
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"{found.path} cannot be resumed from: its fingerprint of the images is none "
            f"({type(error).__name__})."
        ) from error


def _step_number(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"step {value!r}")
    return value


def _load_own_statistics(step: Step, of_ranks: torch.Tensor | None, world: World) -> None:
    """Running statistics of this rank; their mean, which is loaded, on another number of ranks."""
    running = step.moco.running_statistics()
    if of_ranks is None or len(of_ranks) != world.size:
        return
    parts = of_ranks[world.rank].split([b.numel() for b in running])
    for buffer, part in zip(running, parts, strict=True):
        buffer.copy_(part.view_as(buffer))


def _other_records(found: Found, config: Config) -> Iterator[str]:
    """A sentence where metrics.jsonl has not what it had when the checkpoint was written."""
    then, metrics = found.content[OURS].get(RECORDS), Path(config.run.dir) / METRICS
    if not isinstance(then, str) or found.path.parent.resolve() != metrics.parent.resolve():
        return
    with contextlib.suppress(OSError, ValueError):
        if then and digest(metrics, int(then.split()[0])) != then:
            yield (
                f"{metrics} does not hold what it held when {found.path.name} was written: it was "
                "changed or damaged. Training is not affected; lines that are no records are lost."
            )


def _changes(precision: str | None, step: Step) -> Iterator[str]:
    """Differences that do not forbid to go on; `precision` is what the checkpoint ran in."""
    now = step.precision
    if precision is not None and precision != now.name:
        yield (
            f"The run was trained in {precision} so far and goes on in {now}: "
            "weights are fp32 in both, but the steps are no longer bit for bit the same."
        )
