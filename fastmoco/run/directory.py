"""The run directory: may this run write to it, and is it this run's?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastmoco.config import Config, ConfigError, dump, load, parse_text
from fastmoco.data.bad_samples import BAD_SAMPLES
from fastmoco.data.pixels.resolve import resolve_pixels
from fastmoco.data.sources.choose import open_source, resolve_folders
from fastmoco.data.sources.index import begin_anew
from fastmoco.data.sources.remote.store import is_remote
from fastmoco.data.sources.source import Source
from fastmoco.machine import durable, owner
from fastmoco.weights import files

CONFIG = "config.yaml"


def check_run_directory(config: Config) -> None:
    """Verify, before anything is computed, that `run.dir` can be written and is free or ours.

    Raises `ConfigError` if it cannot be written, or holds a run with another configuration: its
    checkpoints and logs would mix with ours.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One name for every start: what a failing disk keeps, the next start takes away.
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The run directory {folder} cannot be written ({error.strerror}): "
            "set run.dir to a folder that you may write to."
        ) from error
    with _owner_as_config_error():
        owner.require_free(folder)
    written = folder / CONFIG
    for path in (written, folder / BAD_SAMPLES):
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no regular file: delete it, or choose another run.dir.")
    if written.exists():
        require_same_run(_written_by_us(written), config, str(folder))


def resolved(config: Config) -> tuple[Config, Source | None]:
    """The same run with every folder and every number of its pixels spelled out, and its images.

    Every rank calls it. What a run in `run.dir`, or the checkpoint that it is to go on from, has
    measured stays. Raises `ConfigError` for data that cannot be used.
    """
    begin_anew()
    config, begun, written = resolve_folders(config), None, Path(config.run.dir) / CONFIG
    _require_apart(config)
    named = Path(config.run.resume)
    if written.is_file():
        begun = _written_by_us(written)
    elif named.is_file():
        with contextlib.suppress(ConfigError):  # resuming has the reason
            text = files.configuration_in(named)
            begun = None if text is None else parse_text(text)
    source = None if config.data.source == "synthetic" else open_source(config)
    return resolve_pixels(config, source, begun), source


def _require_apart(config: Config) -> None:
    """Raises `ConfigError` where the pictures that a run draws would become its training images."""
    run, root = (Path(os.path.realpath(path)) for path in (config.run.dir, config.data.root))
    if (
        config.data.source == "folder"
        and not is_remote(config.data.root)
        and run.is_relative_to(root)
    ):
        raise ConfigError(
            f"run.dir {config.run.dir} lies in data.root {config.data.root}, so that the pictures "
            "of the run would become its training images: set run.dir to a folder outside."
        )


def _written_by_us(path: Path) -> Config:
    try:
        if not path.read_bytes().strip():
            raise ConfigError("it is empty.")
        return load(path)
    except (OSError, ConfigError) as error:
        raise ConfigError(
            f"{path} cannot be read as a configuration: {str(error).rstrip('.')}; delete it if it "
            "is damaged, for every checkpoint holds the configuration too."
        ) from error


@contextmanager
def claimed(config: Config, enabled: bool) -> Iterator[None]:
    """`run.dir` belongs to this process inside, and has the resolved configuration.

    Parts of files that a killed run left are deleted. Raises `ConfigError` where the folder has
    another owner by now. Does nothing unless `enabled`: one rank does it for all.
    """
    if not enabled:
        yield
        return
    folder = Path(config.run.dir)
    with ExitStack() as stack:
        with _owner_as_config_error():
            stack.enter_context(owner.Owner(folder))
        durable.sweep(folder)
        files.write(folder / CONFIG, lambda path: path.write_text(dump(config), encoding="utf-8"))
        yield


@contextmanager
def _owner_as_config_error() -> Iterator[None]:
    try:
        yield
    except owner.OwnedError as error:
        raise ConfigError(str(error)) from error


def require_same_run(theirs: Config, ours: Config, place: str) -> str:
    """An empty text, or what `run.resume_changes` allows to differ, as a sentence for the user.

    Raises `ConfigError` for a difference that it does not allow.
    """
    there, here = theirs.identity(), ours.identity()
    changed = [n for n in here if there[n] != here[n]]
    if not changed:
        return ""
    if ours.run.resume_changes == "allow":
        diff = ", ".join(f"{n} {there[n]} -> {here[n]}" for n in changed)
        return f"The run goes on with other settings, as run.resume_changes allows: {diff}."
    named = ", ".join(f"{n} ({there[n]} there, {here[n]} now)" for n in changed)
    raise ConfigError(
        f"{place} holds a run with another configuration: {named}. Set run.dir to a new folder, "
        "restore those values, or go on with the new ones by --run.resume_changes allow."
    )
