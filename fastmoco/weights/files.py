"""Files of weights on disk: where they are, what they hold, and how a new one appears whole."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastmoco.config import ConfigError

LATEST = "latest.pth.tar"
"""Of a run directory: a link to its newest checkpoint, or a text with its name."""
# What a folder without checkpoints is read from, first found: an export, a folder for the hub.
EXPORTED = ("encoder.safetensors", "model.safetensors")
METADATA = "metadata"
"""Key under which `load` puts the header of a safetensors file, beside its `state_dict`."""


def locate(path: Path) -> Path:
    """The file that `path` means: itself, or the weights inside a run or hub folder.

    Raises `ConfigError` if there is none.
    """
    if path.name == LATEST:
        path = path.parent
    if not path.is_dir():
        if not path.is_file():
            raise ConfigError(f"{path} does not exist: name a file of weights or a run directory.")
        return path
    if (newest := latest(path)) is not None:
        return newest
    for name in EXPORTED:
        if (path / name).is_file():
            return path / name
    names = ", ".join((LATEST, *EXPORTED))
    raise ConfigError(f"The folder {path} holds no weights yet (none of {names}).")


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


def load(path: Path) -> dict[str, Any]:
    """Content of a file of weights, on the CPU. Nothing in the file is executed.

    A safetensors file gives `state_dict` and `metadata`, every other one what `torch.save` wrote.

    Raises `ConfigError` for a file that is damaged, or holds objects besides tensors, numbers and
    text, which only running code from it could restore.
    """
    path = locate(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                return {METADATA: opened.metadata() or {}, "state_dict": load_file(path)}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged, or holds "
            "more than tensors, numbers and text; save its state_dict alone to use it."
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds a {type(content).__name__} and no named weights.")
    return dict(content)


def write(path: Path, put: Callable[[Path], object]) -> None:
    """Let `put` write a neighbour of `path` and rename it: nobody ever sees half a file.

    Raises `ConfigError` if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put(partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"Cannot write {path}: {error}.") from error
    finally:
        with contextlib.suppress(OSError):  # where there could be no partial file either
            partial.unlink()


def write_torch(path: Path, content: object) -> None:
    """Write `content` as `torch.save` does. Raises `ConfigError` if that is not possible."""
    write(path, lambda partial: torch.save(content, partial))


def write_safetensors(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and a header of texts. Raises `ConfigError` if that is not possible."""
    # timm and others look for "format" to tell whose tensors these are.
    header = {"format": "pt", **metadata}
    write(path, lambda partial: save_file(state, partial, metadata=header))
