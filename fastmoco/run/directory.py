"""The run directory: may this run write to it, and is it this run's?"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fastmoco.config import Config, ConfigError, dump, load, parse_text
from fastmoco.data.pixels.resolve import resolve_pixels
from fastmoco.data.sources.choose import resolve_folders
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
        require_same_run(load(written), config, str(folder))


def resolved(config: Config) -> Config:
    """The same run with every folder and every number of its pixels spelled out, on every rank.

    What a run in `run.dir`, or the checkpoint that it is to go on from, has measured stays.
    Raises `ConfigError` for data that cannot be used.
    """
    begun, written = None, Path(config.run.dir) / CONFIG
    named = Path(config.run.resume)
    if written.exists():
        begun = load(written)
    elif named.is_file():
        with contextlib.suppress(ConfigError):  # resuming has the reason
            ours = files.load(files.locate(named)).get("fastmoco", {})
            begun = parse_text(ours["config"]) if "config" in ours else None
    return resolve_pixels(resolve_folders(config), begun)


def claim_run_directory(config: Config) -> None:
    """Write the resolved configuration into `run.dir`: from here on it belongs to this run."""
    (Path(config.run.dir) / CONFIG).write_text(dump(config))


def require_same_run(theirs: Config, ours: Config, place: str) -> None:
    there, here = theirs.identity(), ours.identity()
    changed = [f"{n} ({there[n]} there, {here[n]} now)" for n in here if there[n] != here[n]]
    if changed:
        raise ConfigError(
            f"{place} holds a run with another configuration: {', '.join(changed)}. "
            "Set run.dir to a new folder, or restore those values to resume it."
        )
